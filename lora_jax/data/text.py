"""Token sequences for completion models, in the format of Hu et al.'s code.

    context   completion            tokens      c1 c2 EOS w1 w2
    "c1 c2"   "w1 w2"         ->    targets            w1 w2 EOS
                                    target_index       2  3  4

The end token is also the separator after the context. Only the completion and its end token are
supervised: the output at position `target_index[i]` has to predict `targets[i]`. The last end
token predicts nothing, so it is not an input. `batches.py` puts examples into arrays.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int32

from lora_jax.data.sets.e2e import Record
from lora_jax.slots import Slots

if TYPE_CHECKING:
  from tokenizers import Encoding, Tokenizer

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 128  # far above any text's mean; a word of megabytes takes minutes to encode


class Example(NamedTuple):
  """An encoded example of N tokens, M of which are supervised."""

  tokens: Int32[np.ndarray, " N"]
  targets: Int32[np.ndarray, " M"]
  target_index: Int32[np.ndarray, " M"]


def encode_texts(
  tokenizer: "Tokenizer", texts: Sequence[str | tuple[str, str]], special: bool = False
) -> list["Encoding"]:
  """Returns the encodings of texts, or of pairs.

  Args:
    special: whether the tokenizer puts its special tokens around them.
  Raises:
    ValueError: if the tokenizer fails, as by a regular expression that backtracks without end.
  """
  try:
    return tokenizer.encode_batch(list(texts), add_special_tokens=special)
  except BaseException as error:  # of Rust's panics, which are not Exceptions
    if isinstance(error, Exception) or type(error).__name__ != "PanicException":
      raise
    raise ValueError(
      f"the tokenizer fails on one of {len(texts)} texts, of up to "
      f"{max(len(''.join(text)) for text in texts):,} characters: {error}"
    ) from None


def encode_context(tokenizer: "Tokenizer", contexts: Sequence[str], eos_id: int) -> list[list[int]]:
  """Returns each context's tokens with the separator: the prompt of a completion."""
  _check(tokenizer, eos_id)
  distinct = list(dict.fromkeys(contexts))  # E2E has nine texts for each context
  encodings = encode_texts(tokenizer, distinct)
  ids = {c: [*encoding.ids, eos_id] for c, encoding in zip(distinct, encodings, strict=True)}
  return [list(ids[context]) for context in contexts]


def encode(
  tokenizer: "Tokenizer",
  records: Sequence[Record],
  eos_id: int,
  max_length: int,
  truncate: bool = False,
) -> list[Example]:
  """Returns `context + [eos] + (" " + completion) + [eos]` of each record, as tokens.

  Args:
    tokenizer: without padding and truncation of its own.
    eos_id: the token that ends the context and the completion.
    max_length: tokens of the whole, both end tokens counted (512 in Hu et al.'s code).
    truncate: whether longer ones are truncated at their end, as in that code, and logged;
      otherwise it is an error.
  Raises:
    ValueError: if a record is too long, or has no room left for its completion.
  """
  texts = [
    check_length([record.context, " " + record.completion], max_length, f"record {i}", truncate)
    for i, record in enumerate(records)
  ]
  contexts = encode_context(tokenizer, [context for context, _ in texts], eos_id)
  completions = encode_texts(tokenizer, [text for _, text in texts])
  examples, too_long = [], []
  for i, (context, completion) in enumerate(zip(contexts, completions, strict=True)):
    whole = [*context, *completion.ids, eos_id]
    if len(whole) > max_length:
      too_long.append(i)
      if len(context) >= max_length:
        raise ValueError(
          f"record {i}: the context has {len(context)} tokens, max_length is {max_length}; "
          "expected room for a completion"
        )
    whole = np.asarray(whole[:max_length], np.int32)
    index = np.arange(len(context) - 1, len(whole) - 1, dtype=np.int32)
    examples.append(Example(whole[:-1], whole[len(context) :], index))
  if too_long and not truncate:
    raise ValueError(
      f"{len(too_long)} of {len(records)} records have more than max_length = {max_length} tokens, "
      f"the first is record {too_long[0]}. Raise max_length, or set truncate=True"
    )
  if too_long:
    logger.warning(
      "%d of %d records truncated to %d tokens", len(too_long), len(records), max_length
    )
  return examples


def with_slots(examples: Sequence[Example], slots: Slots) -> list[Example]:
  """Returns examples with the slots of prefix methods around their prompts.

  The output at the last infix slot predicts a completion's first token.

  Raises:
    ValueError: if there are infix slots, and an example has several completions, as a conversation
      with several answers.
  """
  if not slots.count:
    return list(examples)
  result = []
  for i, example in enumerate(examples):
    if slots.num_infix and (np.diff(example.target_index) != 1).any():
      raise ValueError(
        f"example {i} has several answers, and {slots.num_infix} infix slots, which come before "
        "the answer, need a single one. Set num_infix to 0"
      )
    end = int(example.target_index[0]) + 1 if len(example.target_index) else len(example.tokens)
    tokens = [*slots.around(example.tokens[:end]), *example.tokens[end:]]
    index = example.target_index + slots.count
    result.append(Example(np.asarray(tokens, np.int32), example.targets, index))
  return result


def check_length(
  parts: Sequence[str], max_length: int, where: str, truncate: bool = False
) -> list[str]:
  """Returns an example's texts, at most 128 characters for each of `max_length` tokens.

  Args:
    parts: the texts in their order; of a truncated example, those without a character left go.
    max_length: tokens of all parts.
    where: the example, for messages.
    truncate: whether longer ones are cut at their end.
  Raises:
    ValueError: if they are longer and not cut, or the first leaves no room for another.
  """
  limit, size = CHARACTERS_PER_TOKEN * max_length, sum(map(len, parts))
  if size <= limit:
    return list(parts)
  if not truncate or len(parts[0]) >= limit:
    raise ValueError(
      f"{where}: {size:,} characters, more than {CHARACTERS_PER_TOKEN} for each of "
      f"max_length = {max_length} tokens; expected a text that fits"
    )
  cut, room = [], limit
  for part in parts:
    cut.append(part[:room])
    room -= len(cut[-1])
  return [part for part in cut if part]


def _check(tokenizer: "Tokenizer", eos_id: int) -> None:
  if tokenizer.padding is not None or tokenizer.truncation is not None:
    raise ValueError(
      "expected a tokenizer without padding and truncation of its own; call its no_padding() "
      "and no_truncation() first"
    )
  size = tokenizer.get_vocab_size()
  if not 0 <= eos_id < size:
    raise ValueError(f"expected an eos_id below the tokenizer's {size} tokens, got {eos_id}")
