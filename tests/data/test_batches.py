"""Packed and padded batches: nothing lost, nothing mixed, and the same after a restart."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from lora_jax.data import batches
from lora_jax.data.text import Example

T, K = 64, 40


def make_examples(count, seed=0):
  """Examples of 8 to 44 tokens, each with tokens of its own, so that it can be recognized."""
  generator = np.random.default_rng(seed)
  examples = []
  for i in range(count):
    context, targets = generator.integers(4, 24), generator.integers(4, 20)
    tokens = 1000 * (i + 1) + np.arange(context + targets, dtype=np.int32)
    index = np.arange(context, context + targets, dtype=np.int32)
    examples.append(Example(tokens, tokens[index] + 1, index))
  return examples


def packed(examples, **settings):
  settings = {"batch_size": 4, "row_length": T, "loss_length": K, "seed": 0, **settings}
  return batches.packed_batches(examples, **settings)


def padded(examples, **settings):
  settings = {"batch_size": 4, "row_lengths": [32, T], "loss_length": K, "seed": 0, **settings}
  return batches.padded_batches(examples, **settings)


KINDS = pytest.mark.parametrize("make", [packed, padded])


def taken_apart(batch):
  """Yields each segment's tokens, positions, and (index in the segment, target) pairs."""
  for b in range(len(batch["tokens"])):
    segments = batch["segment_ids"][b]
    for segment in range(1, segments.max(initial=0) + 1):
      (where,) = np.nonzero(segments == segment)
      assert (np.diff(where) == 1).all()
      real = (batch["target_weights"][b] == 1) & np.isin(batch["target_index"][b], where)
      pairs = (batch["target_index"][b][real] - where[0], batch["targets"][b][real])
      yield batch["tokens"][b][where], batch["positions"][b][where], pairs


@KINDS
def test_every_example_once_an_epoch_whole_and_with_its_targets(make):
  examples = make_examples(301)
  data = make(examples, num_epochs=2)
  for start, stop in zip((0, *data.epoch_ends), data.epoch_ends, strict=False):
    seen = Counter()
    for i in range(start, stop):
      for tokens, positions, (index, targets) in taken_apart(data[i]):
        number = tokens[0] // 1000 - 1
        seen[number] += 1
        np.testing.assert_array_equal(tokens, examples[number].tokens)
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        np.testing.assert_array_equal(index, examples[number].target_index)
        np.testing.assert_array_equal(targets, examples[number].targets)
    assert seen == Counter(range(301))
  assert len(data) == data.epoch_ends[-1]


@KINDS
def test_padding_is_zero_and_counts_agree(make):
  examples = make_examples(301)
  data = make(examples)
  total = 0
  for batch in data:
    empty = batch["segment_ids"] == 0
    assert not batch["tokens"][empty].any()
    assert not batch["positions"][empty].any()
    unused = batch["target_weights"] == 0
    assert not batch["targets"][unused].any()
    assert not batch["target_index"][unused].any()
    total += batch["target_weights"].sum()
  assert total == sum(len(example.targets) for example in examples)


@KINDS
def test_shapes_and_types_are_fixed(make):
  for batch in make(make_examples(30)):
    assert {name: array.dtype.name for name, array in batch.items()} == {
      "tokens": "int32",
      "positions": "int32",
      "segment_ids": "int32",
      "target_index": "int32",
      "targets": "int32",
      "target_weights": "float32",
    }
    length = batch["tokens"].shape[1]
    assert length in ((T,) if make is packed else (32, T))
    assert {array.shape for array in batch.values()} == {(4, length), (4, K)}


def test_padded_batches_take_the_shortest_length_that_fits():
  data = padded(make_examples(60), batch_size=2, row_lengths=[T, 24, 32])
  lengths = Counter()
  for batch in data:
    longest = (batch["segment_ids"] > 0).sum(axis=1).max()
    lengths[batch["tokens"].shape[1]] += 1
    assert batch["tokens"].shape[1] == min(n for n in (24, 32, T) if n >= longest)
  assert set(lengths) == {24, 32, T}


def test_padded_rows_have_one_example():
  data = padded(make_examples(30))
  assert len(data) == 8  # 30 rows in batches of 4, the last of 2 and 2 empty ones
  assert max(batch["segment_ids"].max() for batch in data) == 1
  assert (data[7]["segment_ids"].max(axis=1) == [1, 1, 0, 0]).all()


def test_pack_is_first_fit():
  examples = make_examples(1500)
  rows, room = [], []
  for i, example in enumerate(examples):
    n, m = len(example.tokens), len(example.targets)
    fitting = (r for r, (t, k) in enumerate(room) if t >= n and k >= m)
    place = next(fitting, len(rows))
    if place == len(rows):
      rows.append([])
      room.append((T, K))
    rows[place].append(i)
    room[place] = (room[place][0] - n, room[place][1] - m)
  assert batches.pack(examples, T, K) == rows


def test_the_order_depends_on_the_seed_and_the_epoch():
  examples = make_examples(100)
  for make in (packed, padded):
    first, second = make(examples, num_epochs=2), make(examples, num_epochs=1, seed=1)
    length = first.epoch_ends[0]
    orders = [
      [tokens[0] for i in numbers for tokens, *_ in taken_apart(data[i])]
      for data, numbers in (
        (first, range(length)),
        (first, range(length, len(first))),
        (second, range(len(second))),
      )
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    repeated = make(examples, num_epochs=3)
    assert all((repeated[i]["tokens"] == first[i]["tokens"]).all() for i in range(len(first)))


def test_without_a_seed_the_order_is_the_examples():
  order = [
    tokens[0] // 1000 - 1
    for b in padded(make_examples(30), seed=None)
    for tokens, *_ in taken_apart(b)
  ]
  assert order == list(range(30))


@KINDS
@pytest.mark.parametrize("local_rows", [[0, 1], [2, 3], [1, 3], [2]])
def test_a_process_builds_its_rows_of_the_whole_batch(make, local_rows):
  examples = make_examples(101)
  whole, part = make(examples), make(examples, local_rows=local_rows)
  assert len(whole) == len(part)
  for i in range(len(whole)):
    for name, array in whole[i].items():
      np.testing.assert_array_equal(part[i][name], array[local_rows])


def test_bad_settings_are_refused():
  examples = make_examples(20)
  longest = max(len(example.tokens) for example in examples)
  most = max(len(example.targets) for example in examples)
  for call in (
    lambda: packed(examples, row_length=longest - 1),
    lambda: padded(examples, row_lengths=[8, longest - 1]),
    lambda: packed(examples, loss_length=most - 1),
    lambda: padded(examples, loss_length=most - 1),
  ):
    with pytest.raises(ValueError, match=f"at least {longest} tokens .* at least {most} targets"):
      call()
  for rows in ([], [1, 0], [1, 1], [3, 4]):
    message = rf"local_rows must be ascending row numbers in 0\.\.3, got \{rows}"
    with pytest.raises(ValueError, match=message):
      packed(examples, local_rows=rows)
  with pytest.raises(ValueError, match="at least one example"):
    packed([])


def test_the_suggested_loss_length_keeps_packing_full():
  examples = make_examples(2000)
  loss_length = batches.suggest_loss_length(examples, T)
  assert loss_length % 8 == 0
  rows = [len(batches.pack(examples, T, k)) for k in (loss_length, loss_length - 8, T)]
  assert rows[0] <= 1.02 * rows[2] < rows[1]


DIGEST = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tests.data.test_batches import as_iterator, digests, make_examples, packed
iterator = as_iterator(packed(make_examples(301), num_epochs=3))
iterator.set_state(json.loads(sys.argv[2]))
print(json.dumps(digests(iterator)))
"""


def as_iterator(data):
  return iter(batches.as_grain(data))


def digests(iterator):
  """Returns the SHA-256 of each remaining batch's arrays."""
  return [
    hashlib.sha256(b"".join(array.tobytes() for array in batch.values())).hexdigest()
    for batch in iterator
  ]


def test_grain_gives_the_same_batches_and_resumes_in_another_process(request):
  pytest.importorskip("grain", reason="needs grain")
  data = packed(make_examples(301), num_epochs=3)
  iterator = as_iterator(data)
  for i in range(data.epoch_ends[0] + 7):  # into the second epoch
    batch = next(iterator)
    assert all((array == data[i][name]).all() for name, array in batch.items())
  state = json.dumps(iterator.get_state())
  rest = digests(iterator)
  assert len(rest) == len(data) - data.epoch_ends[0] - 7
  command = [sys.executable, "-c", DIGEST, str(request.config.rootpath), state]
  run = subprocess.run(command, capture_output=True, text=True, check=True)
  assert json.loads(run.stdout) == rest
