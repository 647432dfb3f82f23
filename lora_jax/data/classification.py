"""Texts to classify in arrays of fixed shapes: one example in a row, rows of a length together.

A batch has B rows of T tokens, padded at their end:

    tokens       [CLS] w1 w2 [SEP] v1 [SEP] -      token_types   0 0 0 0 1 1 0
    segment_ids    1    1  1   1    1   1   0      0 is padding

    labels (B,)  the class's number, or the score of a regression
    weights (B,) 1, or 0 where a row only fills the batch

Each epoch's order is a function of (seed, epoch), so all batches of a run are known at the start
by their number, as in `batches.py`; `batches.as_grain` iterates over these as well.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from lora_jax.data.batches import check_sizes, epoch_orders, read_local_rows
from lora_jax.data.sets.glue import Record
from lora_jax.data.text import CHARACTERS_PER_TOKEN, encode_texts
from lora_jax.fields import Count, read_value
from lora_jax.slots import Slots

if TYPE_CHECKING:
  from tokenizers import Tokenizer

logger = logging.getLogger(__name__)


class Example(NamedTuple):
  """An encoded example of N tokens; its label is an int for classes, a float for a regression."""

  tokens: Int32[np.ndarray, " N"]
  token_types: Int32[np.ndarray, " N"]
  label: int | float


class Batch(TypedDict):
  """The arrays of a batch: B rows of T tokens."""

  tokens: Int32[np.ndarray, "B T"]
  token_types: Int32[np.ndarray, "B T"]
  segment_ids: Int32[np.ndarray, "B T"]
  labels: Int32[np.ndarray, " B"] | Float32[np.ndarray, " B"]
  weights: Float32[np.ndarray, " B"]


def encode(tokenizer: "Tokenizer", records: Sequence[Record], max_length: int) -> list[Example]:
  """Returns the records as tokens, with the special tokens that the tokenizer puts around them.

  Records of more than `max_length` tokens are truncated, of two texts the longer one first, and
  their number is logged. A hidden label becomes -1.

  Raises:
    ValueError: if the tokenizer puts no special tokens around a text.
  """
  from tokenizers import Tokenizer

  added = tokenizer.num_special_tokens_to_add(True)
  if not added or max_length <= added:
    raise ValueError(
      f"expected a tokenizer that puts special tokens around two texts, and a max_length above "
      f"their number; got {added} of them and max_length {max_length}. Take a folder whose "
      "tokenizer.json has a post-processor"
    )
  tokenizer = Tokenizer.from_str(tokenizer.to_str())  # the caller's own is not changed
  tokenizer.no_padding()
  tokenizer.enable_truncation(max_length, strategy="longest_first")
  limit = CHARACTERS_PER_TOKEN * max_length  # of each text, long before it is truncated
  firsts = [record.first[:limit] for record in records]
  texts = [
    first if record.second is None else (first, record.second[:limit])
    for first, record in zip(firsts, records, strict=True)
  ]
  encodings = encode_texts(tokenizer, texts, special=True)
  num_cut = sum(bool(encoding.overflowing) for encoding in encodings)
  if num_cut:
    logger.warning("%d of %d records truncated to %d tokens", num_cut, len(records), max_length)
  return [
    Example(
      np.asarray(encoding.ids, np.int32),
      np.asarray(encoding.type_ids, np.int32),
      -1 if record.label is None else record.label,
    )
    for encoding, record in zip(encodings, records, strict=True)
  ]


def with_slots(examples: Sequence[Example], slots: Slots) -> list[Example]:
  """Returns examples with the slots of prefix methods, of token type 0.

  The first token, whose output the head reads, stays the first: prefix slots follow it, and infix
  slots come after the last token.
  """
  if not slots.count:
    return list(examples)
  result = []
  for tokens, types, label in examples:
    tokens = [tokens[0], *slots.around(tokens[1:])]
    types = [types[0], *[0] * slots.num_prefix, *types[1:], *[0] * slots.num_infix]
    result.append(Example(np.asarray(tokens, np.int32), np.asarray(types, np.int32), label))
  return result


class Batches:
  """All batches of a run, built when they are accessed.

  Attributes:
    epoch_ends: the number of batches up to the end of each epoch.
    batch_size: rows of a global batch.
    row_lengths: the T that a batch may have, ascending; it takes the first that fits its rows.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    epochs: Sequence[list[list[int]]],
    *,
    batch_size: int,
    row_lengths: Sequence[int],
    local_rows: Sequence[int] | None,
  ):
    self._examples = examples
    self._rows = [rows for epoch in epochs for rows in epoch]
    self._local_rows = read_local_rows(local_rows, batch_size)
    self.epoch_ends = tuple(itertools.accumulate(len(epoch) for epoch in epochs))
    self.batch_size = batch_size
    self.row_lengths = tuple(sorted(row_lengths))

  def __len__(self) -> int:
    return len(self._rows)

  def numbers(self, index: int) -> list[int]:
    """Returns the numbers of the examples in a global batch, in the order of its rows."""
    return self._rows[index]

  def __getitem__(self, index: int) -> Batch:
    """Returns the batch of that number, or this process's rows of it."""
    rows = [self._examples[i] for i in self._rows[index]]
    longest = max(len(example.tokens) for example in rows)
    row_length = next(length for length in self.row_lengths if length >= longest)
    local = [rows[i] for i in self._local_rows if i < len(rows)]
    return fill(local, len(self._local_rows), row_length, type(self._examples[0].label))


def bucketed_batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  row_lengths: Sequence[int],
  seed: int | None,
  num_epochs: int = 1,
  window: int = 50,
  local_rows: Sequence[int] | None = None,
) -> Batches:
  """Returns batches of examples of similar length; every example exactly once an epoch.

  Args:
    examples: as in `encode`.
    batch_size: rows of a global batch. An epoch's last batch is filled up with empty rows.
    row_lengths: the lengths T to pad to, tokens; one program is compiled for each.
    seed: of the order, another one in each epoch: random, then sorted by length within windows,
      and the batches shuffled. None, for evaluation, sorts all by length.
    window: batches that are sorted together; 1 leaves the batches entirely random.
    local_rows: as in `lora_jax.data.batches.packed_batches`.
  Raises:
    ValueError: if an example does not fit into a row, a label is not finite or of another type
      than the first, or a size is out of range.
  """
  check_sizes(
    len(examples),
    batch_size=batch_size,
    row_lengths=row_lengths,
    seed=seed,
    num_epochs=num_epochs,
  )
  read_value(Count, window, "window")
  for i, example in enumerate(examples):
    if type(example.label) is not type(examples[0].label) or not np.isfinite(example.label):
      raise ValueError(
        f"example {i}: expected a finite label of type {type(examples[0].label).__name__}, as the "
        f"first has, got {example.label!r}"
      )
  lengths = np.array([len(example.tokens) for example in examples])
  if lengths.max() > max(row_lengths):
    raise ValueError(
      f"expected a row_length of at least {lengths.max()} tokens, the longest example's; got "
      f"{max(row_lengths)}"
    )
  epochs = []
  for order, generator in epoch_orders(len(examples), seed, num_epochs):
    size = len(order) if generator is None else window * batch_size
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    if window > 1 or generator is None:
      chunks = [chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks]
    order = np.concatenate(chunks).tolist()
    rows = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if generator is not None:
      rows = [rows[int(i)] for i in generator.permutation(len(rows))]
    epochs.append(rows)
  return Batches(
    examples,
    epochs,
    batch_size=batch_size,
    row_lengths=row_lengths,
    local_rows=local_rows,
  )


def fill(
  rows: Sequence[Example], batch_size: int, row_length: int, label_type: type = int
) -> Batch:
  """Returns the arrays of a batch with these rows, and empty ones up to `batch_size`."""
  batch = Batch(
    tokens=np.zeros((batch_size, row_length), np.int32),
    token_types=np.zeros((batch_size, row_length), np.int32),
    segment_ids=np.zeros((batch_size, row_length), np.int32),
    labels=np.zeros(batch_size, np.float32 if label_type is float else np.int32),
    weights=np.zeros(batch_size, np.float32),
  )
  for b, example in enumerate(rows):
    length = len(example.tokens)
    batch["tokens"][b, :length] = example.tokens
    batch["token_types"][b, :length] = example.token_types
    batch["segment_ids"][b, :length] = 1
    batch["labels"][b] = example.label
    batch["weights"][b] = 1
  return batch
