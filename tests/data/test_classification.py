"""Batches to classify: tokens of pairs, buckets of lengths, every example exactly once."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from lora_jax.data.batches import as_grain
from lora_jax.data.classification import Example, bucketed_batches, encode, fill, with_slots
from lora_jax.data.sets.glue import Record
from lora_jax.slots import FIRST_SLOT, Slots

from tests.tiny_tokenizer import tiny_tokenizer

DRAW = np.random.default_rng(0)
TOKENIZER = tiny_tokenizer(["a b c d e f"])  # a is 4, f is 9


def examples(count=103, lowest=3, highest=30):
  """Returns examples whose first token is their number plus 1."""
  built = []
  for i in range(count):
    tokens = np.full(DRAW.integers(lowest, highest + 1), 7, np.int32)
    tokens[0] = i + 1
    built.append(Example(tokens, np.zeros_like(tokens), i % 3))
  return built


def batches(data, **settings):
  settings = {"batch_size": 8, "row_lengths": [16, 32], "seed": 0, **settings}
  return bucketed_batches(data, **settings)


def covered(batch):
  """Returns the numbers of a batch's examples."""
  return (batch["tokens"][batch["weights"] > 0, 0] - 1).tolist()


def test_a_pair_has_special_tokens_and_types():
  (pair, single) = encode(TOKENIZER, [Record("a b", "c", 1), Record("d", None, 0)], 16)
  assert pair.tokens.tolist() == [2, 4, 5, 3, 6, 3]
  assert pair.token_types.tolist() == [0, 0, 0, 0, 1, 1]
  assert pair.label == 1
  assert single.tokens.tolist() == [2, 7, 3]
  assert encode(TOKENIZER, [Record("d", None, None)], 16)[0].label == -1


def test_the_longer_text_is_truncated_with_a_warning(caplog):
  records = [Record("a b c d e f", "a b", 0), Record("a", "b", 0)]
  long, short = encode(TOKENIZER, records, 8)
  assert long.tokens.tolist() == [2, 4, 5, 6, 3, 4, 5, 3]
  assert len(short.tokens) == 5
  assert "1 of 2 records truncated to 8 tokens" in caplog.text
  assert TOKENIZER.truncation is None


def test_texts_of_any_length_are_truncated():
  record = Record("a b c " * 1000, "d " * 1000, 0)
  assert encode(TOKENIZER, [record], 9)[0].tokens.tolist() == [2, 4, 5, 6, 3, 7, 7, 7, 3]


def test_a_tokenizers_own_padding_is_ignored():
  padding = Tokenizer.from_str(TOKENIZER.to_str())
  padding.enable_padding(length=20)
  padding.enable_truncation(4)
  data = [Record("a b c", "d e", 0)]
  assert (
    encode(padding, data, 16)[0].tokens.tolist() == encode(TOKENIZER, data, 16)[0].tokens.tolist()
  )


def test_a_tokenizer_without_special_tokens_is_refused():
  bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
  with pytest.raises(ValueError, match=r"puts special tokens around two texts.*got 0"):
    encode(bare, [Record("a", None, 0)], 16)
  with pytest.raises(ValueError, match=r"their number; got 3 of them"):
    encode(TOKENIZER, [Record("a", "b", 0)], 3)


def test_the_arrays_of_a_batch():
  rows = [
    Example(np.array([2, 5, 3], np.int32), np.array([0, 0, 0], np.int32), 1),
    Example(np.array([2, 3, 4, 3], np.int32), np.array([0, 0, 1, 1], np.int32), 2),
  ]
  batch = fill(rows, 3, 5)
  assert batch["tokens"].tolist() == [[2, 5, 3, 0, 0], [2, 3, 4, 3, 0], [0] * 5]
  assert batch["token_types"].tolist() == [[0] * 5, [0, 0, 1, 1, 0], [0] * 5]
  assert batch["segment_ids"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0] * 5]
  assert batch["labels"].tolist() == [1, 2, 0]
  assert batch["labels"].dtype == np.int32
  assert batch["weights"].tolist() == [1, 1, 0]
  scored = [row._replace(label=2.6) for row in rows]
  assert fill(scored, 2, 5, float)["labels"].dtype == np.float32
  scored = bucketed_batches(scored, batch_size=2, row_lengths=[5], seed=None)
  assert scored[0]["labels"].tolist() == [np.float32(2.6)] * 2


@pytest.mark.parametrize("window", [1, 3, 50])
def test_every_example_once_an_epoch_in_rows_that_fit(window):
  data = examples()
  built = batches(data, num_epochs=2, window=window)
  assert built.epoch_ends == (13, 26)
  assert len(built) == 26
  orders = []
  for first in (0, 13):
    actual = [covered(built[i]) for i in range(first, first + 13)]
    assert actual == [built.numbers(i) for i in range(first, first + 13)]
    orders.append([i for numbers in actual for i in numbers])
    assert sorted(orders[-1]) == list(range(103))
    assert sorted(map(len, actual)) == [7] + [8] * 12
  assert orders[0] != orders[1]
  for i in range(len(built)):
    longest = max(len(data[n].tokens) for n in built.numbers(i))
    assert built[i]["tokens"].shape == (8, 16 if longest <= 16 else 32)
    assert int(np.count_nonzero(built[i]["segment_ids"])) == sum(
      len(data[n].tokens) for n in built.numbers(i)
    )


def test_buckets_save_padding_and_random_batches_are_random():
  data = examples(800)

  def padding(**settings):
    built = batches(data, **settings)
    return sum(np.count_nonzero(built[i]["segment_ids"] == 0) for i in range(len(built)))

  assert padding(seed=None) <= padding(window=50) < 0.6 * padding(window=1)
  lengths = [len(data[n].tokens) for n in batches(data, window=1).numbers(0)]
  assert max(lengths) - min(lengths) > 10


def test_evaluation_is_sorted_and_whole():
  data = examples()
  built = batches(data, seed=None)
  order = [n for i in range(len(built)) for n in built.numbers(i)]
  assert sorted(order) == list(range(103))
  lengths = [len(data[i].tokens) for i in order]
  assert lengths == sorted(lengths)
  assert sum(built[i]["weights"].sum() for i in range(len(built))) == 103


def test_the_order_depends_on_the_seed_and_the_epoch():
  data = examples()

  def order(**settings):
    built = batches(data, **settings)
    return [built.numbers(i) for i in range(len(built))]

  assert order(num_epochs=2)[:13] == order(num_epochs=1)
  assert order(seed=0) == order(seed=0) != order(seed=1)


def test_an_iterator_resumes():
  built = batches(examples(), num_epochs=2)
  iterator = iter(as_grain(built))
  for _ in range(5):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  rest = [covered(batch) for batch in iterator]
  resumed = iter(as_grain(built))
  resumed.set_state(state)
  assert [covered(batch) for batch in resumed] == rest
  assert len(rest) == 21


def test_a_process_builds_its_rows_of_the_whole_batch():
  data = examples()
  whole, part = batches(data), batches(data, local_rows=[1, 2, 6])
  for i in range(len(whole)):
    for name, array in whole[i].items():
      np.testing.assert_array_equal(part[i][name], array[[1, 2, 6]])


def test_bad_settings_are_refused():
  data = examples(10)
  with pytest.raises(ValueError, match="row_length of at least"):
    batches(data, row_lengths=[8])
  with pytest.raises(ValueError, match="at least one example"):
    batches([])
  with pytest.raises(ValueError, match=r"local_rows must be ascending row numbers in 0\.\.7"):
    batches(data, local_rows=[8])


def test_slots_leave_the_first_token_the_first():
  pair = Example(np.array([2, 7, 3, 8, 3]), np.array([0, 0, 0, 1, 1]), 1)
  (example,) = with_slots([pair], Slots(2, 1))
  first = FIRST_SLOT
  assert example.tokens.tolist() == [2, first, first + 1, 7, 3, 8, 3, first + 2]
  assert example.token_types.tolist() == [0, 0, 0, 0, 0, 1, 1, 0]
  assert example.label == 1
  assert with_slots([pair], Slots())[0] is pair
