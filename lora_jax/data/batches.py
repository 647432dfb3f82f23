"""Examples in arrays of fixed shapes: several in a row (packed) or one (padded).

A row of T tokens and K targets; a batch has B rows:

    tokens          a1 a2 a3 b1 b2 -  -  -      positions start at 0 in every segment
    positions       0  1  2  0  1  0  0  0
    segment_ids     1  1  1  2  2  0  0  0      0 is padding
    targets         a3 a4 b3 -                  target_index: where in the row they are predicted
    target_index    1  2  4  0
    target_weights  1  1  1  0                  0 is padding

Each epoch's order and packing are a function of (seed, epoch). All batches of a run are therefore
known at the start, by their number: `len` is exact, the state of an iterator is one integer, and
every process of a job builds its rows of the same global batch.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypedDict, TypeVar

import numpy as np
from jaxtyping import Float32, Int32

from lora_jax.data.text import Example
from lora_jax.extras import require
from lora_jax.fields import Count, CountOrZero, read_value

if TYPE_CHECKING:
  import grain

MAX_TOKENS = 2**27  # of a batch: half a gigabyte an array
MAX_EXAMPLES = 10**8  # of all epochs: their order takes gigabytes

Row = list[int]
"""The numbers of the examples in a row, in their order."""


class Batch(TypedDict):
  """The arrays of a batch: B rows, T tokens and K targets a row."""

  tokens: Int32[np.ndarray, "B T"]
  positions: Int32[np.ndarray, "B T"]
  segment_ids: Int32[np.ndarray, "B T"]
  target_index: Int32[np.ndarray, "B K"]
  targets: Int32[np.ndarray, "B K"]
  target_weights: Float32[np.ndarray, "B K"]


class Batches:
  """All batches of a run, built when they are accessed.

  Attributes:
    epoch_ends: the number of batches up to the end of each epoch.
    batch_size: rows of a global batch.
    row_lengths: the T that a batch may have, ascending; it takes the first that fits its rows.
    loss_length: K.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    epochs: Sequence[list[Row]],
    *,
    batch_size: int,
    row_lengths: Sequence[int],
    loss_length: int,
    local_rows: Sequence[int] | None,
  ):
    chunks = [
      [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)] for rows in epochs
    ]
    self._examples = examples
    self._rows = [chunk for epoch in chunks for chunk in epoch]
    self._local_rows = read_local_rows(local_rows, batch_size)
    self.epoch_ends = tuple(itertools.accumulate(len(epoch) for epoch in chunks))
    self.batch_size = batch_size
    self.row_lengths = tuple(sorted(row_lengths))
    self.loss_length = loss_length

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Batch:
    """Returns the batch of that number, or this process's rows of it."""
    rows = [[self._examples[i] for i in row] for row in self._rows[index]]
    longest = max(sum(len(example.tokens) for example in row) for row in rows)
    row_length = next(length for length in self.row_lengths if length >= longest)
    local = [rows[i] for i in self._local_rows if i < len(rows)]
    return fill(local, len(self._local_rows), row_length, self.loss_length)


def read_local_rows(local_rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
  """Returns one process's rows of a global batch.

  Raises:
    ValueError: if they are not ascending numbers of its rows.
  """
  if local_rows is None:
    return range(batch_size)
  if sorted({*local_rows} & {*range(batch_size)}) != [*local_rows] or not local_rows:
    raise ValueError(
      f"local_rows must be ascending row numbers in 0..{batch_size - 1}, got {[*local_rows]!r:.100}"
    )
  return local_rows


def check_sizes(
  num_examples: int,
  *,
  batch_size: int,
  row_lengths: Sequence[int],
  loss_length: int = 1,
  seed: int | None,
  num_epochs: int,
) -> None:
  """Raises ValueError, naming the argument, unless the batches of a run can be built."""
  if not num_examples:
    raise ValueError("expected at least one example, got none")
  read_value(Count, batch_size, "batch_size")
  read_value(Count, loss_length, "loss_length")
  read_value(Count, num_epochs, "num_epochs")
  read_value(CountOrZero | None, seed, "seed")
  lengths = read_value(tuple[Count, ...], row_lengths, "row_lengths")
  if not lengths:
    raise ValueError("row_lengths must have at least one length, got none")
  if batch_size * max(*lengths, loss_length) > MAX_TOKENS:
    raise ValueError(
      f"a batch must have at most {MAX_TOKENS:,} tokens, got batch_size {batch_size:,}, "
      f"row_length {max(lengths):,} (row_lengths) and loss_length {loss_length:,}"
    )
  if num_epochs * num_examples > MAX_EXAMPLES:
    raise ValueError(
      f"all epochs must have at most {MAX_EXAMPLES:,} examples, got num_epochs {num_epochs:,} and "
      f"{num_examples:,} examples"
    )


def packed_batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  row_length: int,
  loss_length: int,
  seed: int | None,
  num_epochs: int = 1,
  local_rows: Sequence[int] | None = None,
) -> Batches:
  """Returns batches with as many examples in a row as fit; every example once an epoch.

  Args:
    examples: as in `text.encode`.
    batch_size: rows of a global batch. The last of an epoch is filled up with empty rows.
    row_length: T, tokens.
    loss_length: K, targets; see `suggest_loss_length`.
    seed: of the order, another one in each epoch; None keeps the examples' order.
    local_rows: the rows of a global batch that this process builds, ascending, as
      `lora_jax.training.mesh.local_rows` returns them; None is all.
  Raises:
    ValueError: if an example does not fit into a row, or a size is out of range.
  """
  read_value(Count, row_length, "row_length")
  check_sizes(
    len(examples),
    batch_size=batch_size,
    row_lengths=[row_length],
    loss_length=loss_length,
    seed=seed,
    num_epochs=num_epochs,
  )
  epochs = []
  for order, generator in epoch_orders(len(examples), seed, num_epochs):
    rows = pack([examples[i] for i in order], row_length, loss_length)
    rows = [[int(order[i]) for i in row] for row in rows]
    if generator is not None:  # the last rows are emptier: spread them over the epoch
      rows = [rows[int(i)] for i in generator.permutation(len(rows))]
    epochs.append(rows)
  return Batches(
    examples,
    epochs,
    batch_size=batch_size,
    row_lengths=[row_length],
    loss_length=loss_length,
    local_rows=local_rows,
  )


def padded_batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  row_lengths: Sequence[int],
  loss_length: int,
  seed: int | None,
  num_epochs: int = 1,
  local_rows: Sequence[int] | None = None,
) -> Batches:
  """Returns batches with one example in a row, padded at its end.

  Args:
    row_lengths: the lengths T to pad to, tokens. A batch takes the shortest that fits its
      examples, and one program is compiled for each; `[512]` is Hu et al.'s code.

  The other arguments, the order and the errors are those of `packed_batches`.
  """
  check_sizes(
    len(examples),
    batch_size=batch_size,
    row_lengths=row_lengths,
    loss_length=loss_length,
    seed=seed,
    num_epochs=num_epochs,
  )
  _check_fit(examples, max(row_lengths), loss_length)
  epochs = [[[int(i)] for i in order] for order, _ in epoch_orders(len(examples), seed, num_epochs)]
  return Batches(
    examples,
    epochs,
    batch_size=batch_size,
    row_lengths=row_lengths,
    loss_length=loss_length,
    local_rows=local_rows,
  )


def epoch_orders(
  num_examples: int, seed: int | None, num_epochs: int
) -> Iterator[tuple[np.ndarray, np.random.Generator | None]]:
  """Yields each epoch's order of the examples and its random generator, None without a seed."""
  for epoch in range(num_epochs):
    generator = None if seed is None else np.random.default_rng([seed, epoch])
    order = np.arange(num_examples) if generator is None else generator.permutation(num_examples)
    yield order, generator


def pack(examples: Sequence[Example], row_length: int, loss_length: int) -> list[Row]:
  """Puts each example, in order, into the first row with room for its tokens and targets.

  Args:
    row_length: T, tokens in a row.
    loss_length: K, targets in a row.
  Returns:
    The rows, each with the numbers of its examples.
  Raises:
    ValueError: if an example does not fit into an empty row, naming the shortest lengths.
  """
  _check_fit(examples, row_length, loss_length)
  sizes = np.array([(len(e.tokens), len(e.targets)) for e in examples], np.int64).reshape(-1, 2)
  smallest = sizes.min(axis=0, initial=max(row_length, loss_length))
  rows: list[Row] = []
  room = np.zeros((2, 0), np.int64)  # of the open rows: tokens, targets
  numbers = np.zeros(0, np.int64)  # of the open rows
  for i, size in enumerate(sizes):
    if i % 256 == 0:  # close the rows that can take no more, and open as many as may be needed
      useful = (room[0] >= smallest[0]) & (room[1] >= smallest[1]) & (numbers < len(rows))
      unused = np.arange(len(rows), len(rows) + 256)
      numbers = np.concatenate([numbers[useful], unused])
      fresh = np.broadcast_to([[row_length], [loss_length]], (2, 256))
      room = np.concatenate([room[:, useful], fresh], axis=1)
    place = int(np.argmax((room[0] >= size[0]) & (room[1] >= size[1])))
    room[:, place] -= size
    if numbers[place] == len(rows):
      rows.append([])
    rows[numbers[place]].append(i)
  return rows


def _check_fit(examples: Sequence[Example], row_length: int, loss_length: int) -> None:
  if not examples:
    raise ValueError("expected at least one example, got none")
  longest = max(len(example.tokens) for example in examples)
  most = max(len(example.targets) for example in examples)
  if longest > row_length or most > loss_length:
    raise ValueError(
      f"an example must fit into a row: expected a row_length of at least {longest} tokens and a "
      f"loss_length of at least {most} targets, got {row_length} and {loss_length}"
    )


def suggest_loss_length(examples: Sequence[Example], row_length: int) -> int:
  """Returns the smallest K, a multiple of 8, that costs packing at most 1 % more rows.

  Logits are computed for K positions of each row, filled or not.

  Args:
    row_length: T, tokens in a row.
  """
  sample = examples[:: max(1, len(examples) // 4096)]
  limit = 1.01 * len(pack(sample, row_length, row_length))
  tokens = sum(len(example.tokens) for example in examples)
  targets = sum(len(example.targets) for example in examples)
  most = max(len(example.targets) for example in examples)
  smallest = max(most, row_length * targets // tokens)  # fewer would leave tokens' room unused
  for loss_length in range(-(-smallest // 8) * 8, row_length, 8):
    if len(pack(sample, row_length, loss_length)) <= limit:
      return loss_length
  return row_length


def fill(
  rows: Sequence[Sequence[Example]], batch_size: int, row_length: int, loss_length: int
) -> Batch:
  """Returns the arrays of a batch with these rows, and empty ones up to `batch_size`."""
  batch = Batch(
    tokens=np.zeros((batch_size, row_length), np.int32),
    positions=np.zeros((batch_size, row_length), np.int32),
    segment_ids=np.zeros((batch_size, row_length), np.int32),
    target_index=np.zeros((batch_size, loss_length), np.int32),
    targets=np.zeros((batch_size, loss_length), np.int32),
    target_weights=np.zeros((batch_size, loss_length), np.float32),
  )
  for b, row in enumerate(rows):
    start = loss_start = 0
    for segment, example in enumerate(row, start=1):
      stop, loss_stop = start + len(example.tokens), loss_start + len(example.targets)
      batch["tokens"][b, start:stop] = example.tokens
      batch["positions"][b, start:stop] = np.arange(stop - start)
      batch["segment_ids"][b, start:stop] = segment
      batch["target_index"][b, loss_start:loss_stop] = example.target_index + start
      batch["targets"][b, loss_start:loss_stop] = example.targets
      batch["target_weights"][b, loss_start:loss_stop] = 1
      start, loss_start = stop, loss_stop
  return batch


AnyBatch = TypeVar("AnyBatch", covariant=True)


class BatchSource(Protocol[AnyBatch]):
  """Batches by their number."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> AnyBatch: ...


def as_grain(batches: BatchSource[AnyBatch], prefetch: int = 2) -> "grain.IterDataset[AnyBatch]":
  """Returns the batches as a grain data set, built ahead of their use in a thread.

  Its iterators have `get_state()`, a small dict for JSON, and `set_state(state)`: the batches
  after that are the same bit for bit, and no earlier batch is built again.

  Args:
    prefetch: the number of batches to build ahead.
  """
  require("grain")
  import grain

  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
  return grain.MapDataset.source(batches).to_iter_dataset(options)
