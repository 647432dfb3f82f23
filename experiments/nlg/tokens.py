"""The ids of the tokens whose embeddings a run trains, from `lora.tokens` of its config.

    --config.method=trainable_tokens --config.lora.tokens="('<|endoftext|>',)"    these rows only
    --config.lora.tokens="('<|im_start|>', '<|im_end|>')"                         beside LoRA

A text is one that the tokenizer has as a single token, as in the data: " food" is another token
than "food". An integer is an id. The stored config has the ids.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from experiments.harness.config import replace_fields
from experiments.harness.methods import EMBEDDINGS, TOKENS, check_used, find_method
from experiments.nlg.base import model_folder
from experiments.nlg.config import E2EConfig, FinetuneConfig
from lora_jax.models.text.tokenizer import load_tokenizer

Config = TypeVar("Config", E2EConfig, FinetuneConfig)


def with_token_ids(config: Config) -> Config:
  """Returns a run's config with ids for the texts in `lora.tokens`.

  Raises:
    ValueError: if the method trains no tokens and there are some, or needs some and there are none,
      `lora.target` has the embedding too, a text is not a single token, or a token is given twice.
  """
  tokens = config.lora.tokens
  if tokens:
    check_used(config.method, {TOKENS: tokens}, config.NAME)
  if find_method(config.method).needs_tokens and not tokens:
    raise ValueError(
      f"method={config.method} trains the embeddings of lora.tokens, which is empty. Give texts or "
      "ids: --config.lora.tokens=\"('<|endoftext|>', 17)\""
    )
  if tokens and any(re.fullmatch(config.lora.target, name) for name in EMBEDDINGS):
    raise ValueError(
      f"lora.target={config.lora.target} has the embedding of lora.tokens, too. Leave it out, or "
      "give no tokens"
    )
  ids = [token for token in tokens if isinstance(token, int)]
  if len(ids) < len(tokens):
    tokenizer = load_tokenizer(model_folder(config))
    ids = [token if isinstance(token, int) else _id_of(tokenizer, token) for token in tokens]
  _check_different(tokens, ids)
  return replace_fields(config, {"lora.tokens": tuple(ids)})


def _id_of(tokenizer: Any, text: str) -> int:
  """Returns the id of a text; raises ValueError if the tokenizer has it as several tokens."""
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
  if len(ids) != 1 or pieces[0].strip() != text.strip():
    raise ValueError(
      f"lora.tokens has {text!r}, which is not a single token of the tokenizer, but "
      f"{' + '.join(map(repr, pieces)) or 'none'}. Give each of these, or an id"
    )
  return ids[0]


def _check_different(tokens: Sequence[int | str], ids: Sequence[int]) -> None:
  for i, token in enumerate(tokens):
    if ids[i] in ids[:i]:
      raise ValueError(
        f"lora.tokens has {tokens[ids.index(ids[i])]!r} and {token!r}, which are both token "
        f"{ids[i]}; expected each once"
      )
