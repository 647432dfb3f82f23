"""Metrics of exact answers: the share that is right, whole or in parts.

Both give statistics of each segment, which `bootstrap.intervals` and `differences` resample as
part of a `Measured`. Of several references, the best one counts.

| task          | metric                | `canonical` or `parts`           |
|---------------|-----------------------|----------------------------------|
| WikiSQL       | logical-form accuracy | `data.sets.wikisql.logical_form` |
| E2E reversed  | exact, and per slot   | `data.sets.e2e_reversed.slots`   |
| MNLI as text  | accuracy              | the text without further spaces  |
| addition      | accuracy              | the text without further spaces  |
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_jax.metrics.nlg import check_hypotheses, check_references
from lora_jax.metrics.segments import SegmentStatistics, mean_of_segments


def one_spaced(text: str) -> str:
  """Returns a text with one space between its words and none at its ends."""
  return " ".join(text.split())


def exact_match(
  hypotheses: Sequence[str],
  references: Sequence[Sequence[str]],
  canonical: Callable[[str], object] = one_spaced,
) -> SegmentStatistics:
  """Returns the share of answers that equal a reference, x 100.

  Args:
    hypotheses: one text for each input; it may be empty.
    references: for each input its right answers, at least one.
    canonical: maps texts that count as the same answer to equal values.
  Raises:
    ValueError: if there are no inputs, they do not pair up, or a reference has no word.
  """
  check_references(references)
  check_hypotheses(hypotheses, references)
  right = [
    canonical(text) in [canonical(answer) for answer in answers]
    for text, answers in zip(hypotheses, references, strict=True)
  ]
  return mean_of_segments(100 * np.array(right, float))


def part_accuracy(
  hypotheses: Sequence[str],
  references: Sequence[Sequence[str]],
  parts: Callable[[str], Mapping[str, str]],
) -> SegmentStatistics:
  """Returns the share of parts that are right, x 100, over all segments together.

  A part is right if hypothesis and reference have the same value under its name. Parts that only
  one of them has count as wrong.

  Args:
    hypotheses: one text for each input; it may be empty.
    references: for each input its right answers, at least one.
    parts: maps a text to its named parts.
  Raises:
    ValueError: as `exact_match`.
  """
  check_references(references)
  check_hypotheses(hypotheses, references)
  rows = []
  for text, answers in zip(hypotheses, references, strict=True):
    actual = parts(text)
    counts = [_count(actual, parts(answer)) for answer in answers]
    rows.append(max(counts, key=lambda row: row[0] / row[1]))
  return SegmentStatistics(np.array(rows, float), lambda sums: 100 * sums[..., 0] / sums[..., 1])


def _count(actual: Mapping[str, str], expected: Mapping[str, str]) -> tuple[int, int]:
  """Returns the number of parts that are right, and of all."""
  right = sum(name in actual and actual[name] == value for name, value in expected.items())
  return right, len(actual.keys() | expected.keys())
