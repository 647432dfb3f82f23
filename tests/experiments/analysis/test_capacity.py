"""Capacity: bits of known distributions, random codes, and pairs that double until they fill."""

import math

import numpy as np
import pytest

from experiments.analysis.capacity import (
  BITS,
  DIGITS,
  KEY_TOKENS,
  capacity_arms,
  code_examples,
  curve,
  is_saturated,
  next_runs,
  remembered_bits,
)
from experiments.configs.mechanism import FULL
from experiments.harness.launch import RATE
from lora_jax.models.text.tokenizer import load_tokenizer

from tests.experiments.analysis.records import made, remembering
from tests.tiny_e2e import EMBEDDED


def test_bits_of_known_distributions():
  pairs, uniform = 7, 7 * DIGITS * math.log(10)  # nats of a guess over the digits
  assert remembered_bits(uniform, pairs) == pytest.approx(0, abs=1e-9)
  assert remembered_bits(0.0, pairs) == pytest.approx(7 * math.log2(10**6))
  one_digit = uniform - pairs * math.log(10)  # of each code, with certainty
  assert remembered_bits(one_digit, pairs) == pytest.approx(pairs * math.log2(10))
  assert remembered_bits(2 * uniform, pairs) == 0


def test_the_codes_are_random_digits_after_random_keys():
  tokenizer, end = load_tokenizer(EMBEDDED), 0
  examples = code_examples(tokenizer, end, 400)
  digits = [tokenizer.encode(str(digit)).ids[0] for digit in range(10)]
  keys = {tuple(example.tokens[:KEY_TOKENS].tolist()) for example in examples}
  assert len(keys) == 400
  assert end not in {token for key in keys for token in key}
  codes = np.stack([example.targets for example in examples])
  counts = np.array([(codes == digit).mean() for digit in digits])
  assert counts.sum() == pytest.approx(1)
  assert np.abs(counts - 0.1).max() < 0.03
  for example in examples[:3]:
    assert (example.tokens[KEY_TOKENS:] == example.targets[:-1]).all()
    assert (example.tokens[example.target_index[1:]] == example.targets[:-1]).all()
    assert example.target_index[0] == KEY_TOKENS - 1
  again = code_examples(tokenizer, end, 400)
  assert all((a.tokens == b.tokens).all() for a, b in zip(examples, again, strict=True))


def test_the_pairs_double_until_the_bits_grow_no_more():
  limit = 50 * BITS  # between 32 and 64 pairs
  records = remembering("dora", limit)
  rates = {record["settings"][RATE] for record in records}
  assert len(rates) == 3
  assert [record["settings"]["pairs"] for record in records] == [32, 32, 32, 64, 128]
  bits = [record["bits"] for record in curve(FULL, "dora", records).values()]
  assert bits == pytest.approx([32 * BITS, limit, limit])
  assert is_saturated(FULL, bits)
  whole = curve(FULL, "dora", remembering("dora", 1e9))
  assert list(whole) == [*FULL.pairs]
  assert not is_saturated(FULL, [record["bits"] for record in whole.values()])


def test_more_pairs_take_the_best_learning_rate_and_failed_runs_are_none():
  first = next_runs(FULL, ["dora"], [])
  low, middle, high = (planned.settings[RATE] for planned in first)
  assert low < middle < high
  results = [{"bits": 90.0, "nats": 5.0}, {"bits": 90.0, "nats": 4.0}, {}]
  records = [made(planned, **result) for planned, result in zip(first, results, strict=True)]
  records[2]["status"] = "failed"
  (planned,) = next_runs(FULL, ["dora"], records)
  assert (planned.settings["pairs"], planned.settings[RATE]) == (64, middle)
  assert curve(FULL, "dora", [records[2]]) == {}


def test_arms_without_a_capacity_of_their_own():
  assert capacity_arms(["lora", "lora_rank1_v", "full_finetuning", "dora"]) == ["lora", "dora"]
