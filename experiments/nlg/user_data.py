"""A user's examples as batches, for `experiments.finetune`."""

import dataclasses
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.methods import slots_of
from experiments.harness.workdir import examples_digest
from experiments.nlg.config import FinetuneConfig
from lora_jax.data import batches as data_batches
from lora_jax.data.jsonl import (
  Completion,
  Conversation,
  Rendered,
  encode_chat_prompts,
  encode_completions,
  encode_prompts,
  encode_rendered,
  read_jsonl,
)
from lora_jax.data.text import Example, with_slots
from lora_jax.files import read_text
from lora_jax.models.text.chat import (
  ChatTemplate,
  Message,
  chat_parts,
  load_chat_template,
  prompt_parts,
  text_after_answers,
)
from lora_jax.models.text.gguf import read_model_json
from lora_jax.models.text.tokenizer import END_OF_TEXT, load_tokenizer, read_special_tokens
from lora_jax.models.zoo import LanguageModel

logger = logging.getLogger(__name__)
TODAY = "2024-07-26"


class Data(NamedTuple):
  """The batches of a run, and held-out prompts with their answers.

  Attributes:
    train: the batches of all epochs.
    valid: the batches of the held-out examples.
    prompts: tokens of the first held-out prompts.
    answers: the answers to them in the data.
    num_train: the number of training examples.
    num_valid: the number of held-out examples.
    digest: a digest of all examples.
  """

  train: data_batches.Batches
  valid: data_batches.Batches
  prompts: list[list[int]]
  answers: list[str]
  num_train: int
  num_valid: int
  digest: str


class Text(NamedTuple):
  """A model's tokenizer, chat template and end tokens.

  Attributes:
    tokenizer: the tokenizer of its folder.
    end_id: the token that ends a text.
    template: the chat template; None if the examples are not chats.
    end_ids: the tokens that end an answer, ascending.
  """

  tokenizer: Any
  end_id: int
  template: ChatTemplate | None
  end_ids: tuple[int, ...]


def load_data(config: FinetuneConfig, model: LanguageModel) -> tuple[Text, Data]:
  """Returns the model's tokenizer, and the batches to train on and held out."""
  options = config.data
  records: Sequence[Any] = read_jsonl(options.file, options.ignored_fields)
  if options.valid_file:
    held_out: Sequence[Any] = read_jsonl(options.valid_file, options.ignored_fields)
    if type(records[0]) is not type(held_out[0]):
      raise ValueError(
        f"{options.file} and {options.valid_file} have two formats: expected prompts and "
        "completions in both, or messages in both"
      )
  else:
    records, held_out = _hold_out(config, records)
  chats = isinstance(records[0], Conversation)
  text = load_text(model, chats, options.chat_template, options.today)
  slots = slots_of(config)
  limit = (options.row_length or model.num_positions) - slots.count
  if slots.count and limit < 2:
    raise ValueError(
      f"the {slots.count} slots of prefix.num_prefix and prefix.num_infix leave no room in rows of "
      f"{limit + slots.count} tokens. Lower them, or raise data.row_length"
    )
  train, valid = (
    with_slots(encode(text, part, limit, options.truncate), slots) for part in (records, held_out)
  )
  longest = max(len(example.tokens) for example in (*train, *valid))
  row_length = options.row_length or min(-(-longest // 64) * 64, model.num_positions)

  loss_length = data_batches.suggest_loss_length([*train, *valid], row_length)
  chunk = config.fit.loss_chunk or 1  # which must divide it

  def batches(
    examples: list[Example], seed: int | None, epochs: int, accumulation_steps: int = 1
  ) -> data_batches.Batches:
    shape: dict[str, Any] = {
      "batch_size": options.batch_size,
      "loss_length": -(-loss_length // chunk) * chunk,
      "seed": seed,
      "num_epochs": epochs,
      "local_rows": config.local_rows(options.batch_size, accumulation_steps),
    }
    if options.packing:
      return data_batches.packed_batches(examples, row_length=row_length, **shape)
    return data_batches.padded_batches(examples, row_lengths=[row_length], **shape)

  sampled = held_out[: config.samples.count]
  data = Data(
    train=batches(train, config.seed, options.num_epochs, config.fit.accumulation_steps),
    valid=batches(valid, None, 1),
    prompts=prompts(text, sampled),
    answers=[_answer(record) for record in sampled],
    num_train=len(train),
    num_valid=len(valid),
    digest=examples_digest(train, valid),
  )
  return text, data


def end_token_id(folder: Path, tokenizer: Any) -> int:
  """Returns the id of the token that ends a text; raises ValueError if the folder names none."""
  name = read_special_tokens(folder).get("eos_token", END_OF_TEXT)
  token_id = tokenizer.token_to_id(name)
  if token_id is None:
    raise ValueError(
      f"{folder}: the tokenizer has no token {name!r} to end a text with; name its own as "
      "eos_token in tokenizer_config.json, in a GGUF file as tokenizer.ggml.eos_token_id"
    )
  return token_id


def load_text(
  model: LanguageModel, chats: bool, chat_template: str = "", today: str = TODAY
) -> Text:
  """Returns the tokenizer of a model's folder, its end tokens, and of chats the template.

  Args:
    model: its weights are not needed.
    chats: whether the examples are chats.
    chat_template: a file with a template; "" is the model's own.
    today: the date for templates that write one.
  """
  tokenizer = load_tokenizer(model.folder, model.module.config.vocab_size)
  end_id, template = end_token_id(model.folder, tokenizer), None
  if chats and chat_template:
    source = read_text(chat_template)
    template = ChatTemplate(source, read_special_tokens(model.folder))
  elif chats:
    template = load_chat_template(model.folder)
  if template is not None:
    special = {"eos_token": tokenizer.id_to_token(end_id), **template.special_tokens}
    day = datetime.fromisoformat(today)
    template = dataclasses.replace(template, special_tokens=special, today=day)
  end_ids = {end_id, *generation_end_ids(model.folder, model.module.config.vocab_size)}
  if template is not None:
    end_ids.update(_turn_end_ids(tokenizer, template))
  return Text(tokenizer, end_id, template, tuple(sorted(end_ids)))


def generation_end_ids(folder: Path, vocab_size: int) -> list[int]:
  """Returns the end tokens of generation_config.json or a GGUF file, which servers stop at."""
  value = read_model_json(folder, "generation_config.json").get("eos_token_id")
  ids = value if isinstance(value, list) else [] if value is None else [value]
  for token_id in ids:
    if type(token_id) is not int or not 0 <= token_id < vocab_size:
      raise ValueError(
        f"{folder}/generation_config.json: eos_token_id must be one or several integers in "
        f"[0, {vocab_size}), got {value!r:.100}"
      )
  return ids


def _turn_end_ids(tokenizer: Any, template: ChatTemplate) -> list[int]:
  """Returns the token that ends the assistant's turn: the template's first special one after it."""
  added = tokenizer.get_added_tokens_decoder()
  after = tokenizer.encode(text_after_answers(template), add_special_tokens=False).ids
  special = [i for i in after if i in added and added[i].content.strip()]
  if not special:
    logger.warning(
      "the chat template writes no special token after an answer: a model that is trained with it "
      "does not learn to end its answers, and generates until samples.max_new_tokens"
    )
  return special[:1]


def _hold_out(config: FinetuneConfig, records: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """Splits examples, the same way whatever the seed; those of one prompt stay together."""
  prompts: dict[str, list[Any]] = {}
  for record in records:
    prompts.setdefault(_prompt(record), []).append(record)
  groups = list(prompts.values())
  count = max(1, round(config.data.valid_share * len(groups)))
  if count >= len(groups):
    raise ValueError(
      f"{config.data.file} has {len(groups)} different prompts, of which {count} are held out; "
      "expected some to train on. Give more examples, or --config.data.valid_file"
    )
  held_out = set(np.random.default_rng(0).permutation(len(groups))[:count].tolist())
  train = [record for i, group in enumerate(groups) if i not in held_out for record in group]
  return train, [record for i in sorted(held_out) for record in groups[i]]


def _prompt(record: Completion | Conversation) -> str:
  if isinstance(record, Completion):
    return record.prompt
  return next((m["content"] for m in record.messages if m["role"] == "user"), record.where)


def encode(text: Text, records: Sequence[Any], limit: int, truncate: bool) -> list[Example]:
  """Returns the tokens of examples of either format, `limit` of each at most."""
  if isinstance(records[0], Completion):
    return encode_completions(text.tokenizer, records, text.end_id, limit, truncate)
  assert text.template is not None, "chats have a template"
  rendered = [Rendered(record.where, _parts(text.template, record)) for record in records]
  return encode_rendered(text.tokenizer, rendered, limit, truncate)


def _parts(template: ChatTemplate, record: Conversation) -> list[list[tuple[str, bool]]]:
  try:
    return chat_parts(template, record.messages)
  except ValueError as error:
    raise ValueError(f"{record.where}: {error}") from error


def prompts(text: Text, records: Sequence[Any]) -> list[list[int]]:
  """Returns the tokens before each example's completion, or before the assistant's last turn.

  They are a prefix of the tokens that `encode` returns for it.
  """
  if not records:
    return []
  if isinstance(records[0], Completion):
    return encode_prompts(text.tokenizer, [record.prompt for record in records], text.end_id)
  return chat_prompts(text, [record.messages[: _last_answer(record)] for record in records])


def chat_prompts(text: Text, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
  """Returns the tokens that the assistant's next answer to each chat is generated from."""
  if text.template is None:
    raise ValueError("expected a model with a chat template, to answer messages")
  return encode_chat_prompts(text.tokenizer, [prompt_parts(text.template, chat) for chat in chats])


def _last_answer(record: Conversation) -> int:
  return max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")


def _answer(record: Completion | Conversation) -> str:
  if isinstance(record, Completion):
    return record.completion
  return record.messages[_last_answer(record)]["content"]
