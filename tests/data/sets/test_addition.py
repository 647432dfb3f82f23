"""Addition: right sums, splits without a common pair, and counts that only add records."""

import re

import pytest

from lora_jax.data.sets import addition


def pairs(records):
  found = []
  for context, completion in records:
    a, b = map(int, re.fullmatch(r"(\d{4}) \+ (\d{4}) =", context).groups())
    assert completion == str(a + b)
    found.append((min(a, b), max(a, b)))
  return found


def test_sums_are_right_and_no_pair_is_in_two_splits():
  splits = {"train": 3000, "valid": 1000, "test": 1000}
  found = [pair for split, count in splits.items() for pair in pairs(addition.read(split, count))]
  assert len(set(found)) == 5000
  numbers = [number for pair in found for number in pair]
  assert min(numbers) >= 1000
  assert sum(numbers) / len(numbers) == pytest.approx(5500, abs=80)  # 3 standard deviations


def test_a_seed_gives_the_same_records_and_more_of_them_add_to_fewer():
  assert addition.read("train", 50)[:20] == addition.read("train", 20)
  assert addition.read("test", 20, seed=1) != addition.read("test", 20)
  assert addition.read("test", 2) == [("8599 + 7821 =", "16420"), ("4785 + 3330 =", "8115")]


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'dev'"):
    addition.read("dev", 1)
  with pytest.raises(ValueError, match="count of test must be at most 1,000, got 1,001"):
    addition.read("test", 1001)
  with pytest.raises(ValueError, match="count"):
    addition.read("test", 0)
  with pytest.raises(ValueError, match="seed"):
    addition.read("test", 1, seed=-1)
