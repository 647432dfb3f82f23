"""Patterns of paths match as Python's regular expressions do, and always in a short time."""

import random
import re
import time

import pytest

import lora_jax as lj
from lora_jax import patterns, trees


def random_pattern(draw: random.Random, depth: int) -> str:
  """Returns a pattern made of every kind of item; it may be one that Python refuses."""

  def inner() -> str:
    return random_pattern(draw, depth - 1)

  repeats = ["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?"]
  kinds = [
    lambda: inner() + inner(),
    lambda: f"({inner()}|{inner()})",
    lambda: f"(?:{inner()}){draw.choice(repeats)}",
    lambda: f"(?{draw.choice('=!')}{inner()})",
    lambda: f"(?<{draw.choice('=!')}[ab]{draw.choice('a/.')})",
    lambda: f"(?i:{inner()})",
  ]
  if depth == 0 or draw.random() < 0.25:
    return draw.choice([*"ab/_1.^$", r"\d", r"\w", r"\b", "[ab]", "[^a/]", r"\."])
  return draw.choices(kinds, weights=[4, 3, 4, 1, 1, 1])[0]()


def test_they_match_what_python_matches():
  draw = random.Random(0)
  count = 0
  for _ in range(600):
    pattern = random_pattern(draw, 4)
    try:
      expected = re.compile(pattern)
    except re.error:
      continue
    count += 1
    for _ in range(5):
      path = "".join(draw.choices("abA/_1", k=draw.randint(0, 7)))
      assert patterns.fullmatch(pattern, path) == (expected.fullmatch(path) is not None), (
        f"{pattern!r} on {path!r}"
      )
  assert count > 400


@pytest.mark.parametrize(
  "pattern",
  [
    "(a+)+b",
    "(a|a)*b",
    "(.*)*b",
    "((((a*)*)*)*)*b",
    ".*.*.*.*.*.*.*.*.*b",
    "(a?){3000}a{3000}",
    "(?:a{0,9999}){0,9999}b",
    "(?=(a+)+b)a*",
    "(?:a?){4000000000}b",
    "(a|aa)+b",
  ],
)
def test_a_pattern_with_many_ways_to_match_answers(pattern):
  assert not trees.matches(pattern, 200 * "a")


def test_a_text_with_another_ending_costs_little():
  """An adapter with a rank for each module asks for each pair of modules."""
  pattern = r"(.*\.)?(model\.layers\.0\.self_attn\.q_proj)"
  start = time.process_time()
  for i in range(50_000):
    assert not patterns.fullmatch(pattern, f"model.layers.{i}.mlp.down_proj")
  assert time.process_time() - start < 1  # seconds; without a look at the ending 3


def test_ordinary_patterns_are_all_accepted():
  paths = ["h_0/attn/query/kernel", "h_11/mlp/up/kernel", "lm_head/kernel"]
  matching = {
    ".*/(attn|mlp)/.*kernel": 2,
    r"(\w+/)*kernel": 3,
    "(?!lm_head).*kernel": 2,
    r"(?i)H_\d+/.*": 2,
    ".*(?<!up)/kernel": 2,
    r"h_\d{2}/.*": 1,
  }
  for pattern, count in matching.items():
    assert sum(trees.matches(pattern, path) for path in paths) == count, pattern


@pytest.mark.parametrize(
  ("pattern", "reason"),
  [
    ("(", "missing ), unterminated subpattern"),
    (r"(a)\1", "back references, atomic groups and possessive repeats are not supported"),
    ("(a)(?(1)b|c)", "back references"),
    ("(?>a+)b", "atomic groups"),
    ("a++", "possessive repeats"),
    ("(?<=a+)b", "a lookbehind needs a fixed width"),
    ("a{99999999999999999999}", "the repetition number is too large"),
    (200 * "(" + 200 * ")", "more than 100 groups within one another"),
    (4000 * "(" + 4000 * ")", "nested too deeply"),
    (10_001 * "a", "has 10,001 characters; a pattern has at most 10,000"),
  ],
)
def test_other_patterns_are_refused_by_the_name_of_the_setting(pattern, reason):
  with pytest.raises(ValueError, match=f"^pattern: .*{re.escape(reason)}"):
    lj.match({"a": 1}, pattern)
  with pytest.raises(ValueError, match=f"^extra: .*{re.escape(reason)}"):
    lj.trainable_mask({"base": {}, "adapter": {}}, extra=pattern)
  with pytest.raises(ValueError, match=f"^train: .*{re.escape(reason)}"):
    lj.partial_finetuning(lambda p: p, pattern).init(None, {"a": 1})
  with pytest.raises(ValueError, match=f"target.*{re.escape(reason)}"):
    lj.LoraConfig(2, 2.0, pattern)
  with pytest.raises(ValueError, match=f"extra.*{re.escape(reason)}"):
    lj.LoraConfig(2, 2.0, ".*", extra=["a", pattern])
  with pytest.raises(ValueError, match=f"pattern.*{re.escape(reason)}"):
    lj.LoraRule(pattern)
