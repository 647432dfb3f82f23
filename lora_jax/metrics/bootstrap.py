"""Confidence intervals by resampling the segments (Koehn 2004; Efron and Tibshirani 1993).

A resample draws as many segments as there are, with replacement, and is scored from the
segments' statistics; no text is scored twice. Statistics of the whole reference set, NIST's
information of n-grams and CIDEr's document frequencies, are not resampled. The intervals are only
over the inputs. They say nothing about another seed or another training run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Float

from lora_jax.fields import Count, CountOrZero, Within, read_value
from lora_jax.metrics.nlg import Measured, measure

MAX_DRAWS = 2**27  # resamples times segments: a gigabyte


@dataclasses.dataclass(frozen=True)
class Interval:
  """A score with its percentile interval, in the metric's units."""

  score: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Difference:
  """The score of a first system minus that of a second one, with its percentile interval.

  Attributes:
    difference: in the metric's units; positive if the first system scores higher.
    low: the interval's lower end.
    high: its upper end.
    share_against: the share of resamples in which the difference is zero or has the other sign:
      Koehn's estimate of a one-sided p-value.
  """

  difference: float
  low: float
  high: float
  share_against: float


def bootstrap(
  hypotheses: Sequence[str],
  references: Sequence[Sequence[str]],
  *,
  resamples: int = 1000,
  confidence: float = 0.95,
  seed: int = 0,
) -> dict[str, Interval | None]:
  """Returns the scores of one system with their intervals; None where `score` has None.

  Args:
    hypotheses: one text for each input.
    references: for each input its references.
    resamples: the number of corpora to draw.
    confidence: the share of the resamples within the interval, in (0, 1).
    seed: of the draws; the same seed gives the same intervals.
  Raises:
    ValueError: as `score`, or if `resamples` or `confidence` is out of range.
  """
  draws = {"resamples": resamples, "confidence": confidence, "seed": seed}
  return intervals(measure([hypotheses], references)[0], **draws)


def paired_bootstrap(
  hypotheses_a: Sequence[str],
  hypotheses_b: Sequence[str],
  references: Sequence[Sequence[str]],
  *,
  resamples: int = 1000,
  confidence: float = 0.95,
  seed: int = 0,
) -> dict[str, Difference | None]:
  """Compares two systems on the same inputs, each resample holding the same inputs for both.

  Args:
    hypotheses_a: the first system's texts, one for each input.
    hypotheses_b: the second system's, which are subtracted.
    references: for each input its references.
    resamples: the number of corpora to draw.
    confidence: the share of the resamples within the interval, in (0, 1).
    seed: of the draws.
  Raises:
    ValueError: as `bootstrap`.
  """
  draws = {"resamples": resamples, "confidence": confidence, "seed": seed}
  return differences(*measure([hypotheses_a, hypotheses_b], references), **draws)


def intervals(
  measured: Measured, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval | None]:
  """Does what `bootstrap` does, for a system that `measure` has measured."""
  by_metric: dict[str, Interval | None] = dict.fromkeys([*measured.statistics, *measured.missing])
  counts = _draw(measured, resamples, seed)
  for name, statistics in measured.statistics.items():
    samples = statistics.resampled(counts)
    by_metric[name] = Interval(statistics.score(), *percentile_interval(samples, confidence))
  return by_metric


def differences(
  a: Measured, b: Measured, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Difference | None]:
  """Does what `paired_bootstrap` does, for two systems that `measure` has measured together."""
  if _size(a) != _size(b):
    raise ValueError(f"the systems have {_size(a)} and {_size(b)} segments; expected the same")
  by_metric: dict[str, Difference | None] = dict.fromkeys([*a.statistics, *a.missing])
  counts = _draw(a, resamples, seed)
  for name in a.statistics.keys() & b.statistics.keys():
    first, second = a.statistics[name], b.statistics[name]
    difference = first.score() - second.score()
    samples = first.resampled(counts) - second.resampled(counts)
    against = float(np.mean(samples * np.sign(difference) <= 0))
    ends = percentile_interval(samples, confidence)
    by_metric[name] = Difference(difference, *ends, against)
  return by_metric


def _size(measured: Measured) -> int:
  if not measured.statistics:
    raise ValueError(
      f"expected statistics of at least one metric, got none; missing: {measured.missing}"
    )
  return len(next(iter(measured.statistics.values())).rows)


def _draw(
  measured: Measured, resamples: int, seed: int
) -> Float[np.ndarray, "{resamples} segments"]:
  """Returns how often each resample holds each segment."""
  read_value(Count, resamples, "resamples")
  read_value(CountOrZero, seed, "seed")
  size = _size(measured)
  if resamples * size > MAX_DRAWS:
    raise ValueError(
      f"resamples must be at most {MAX_DRAWS // size:,} for {size:,} segments, got {resamples:,}"
    )
  generator = np.random.default_rng(seed)
  return generator.multinomial(size, np.full(size, 1 / size), size=resamples).astype(float)


def percentile_interval(
  samples: Float[np.ndarray, " resamples"], confidence: float = 0.95
) -> tuple[float, float]:
  """Returns the ends of the interval that holds this share of the samples, from the middle."""
  read_value(Annotated[float, Within("(0, 1)")], confidence, "confidence")
  tail = (1 - confidence) / 2
  low, high = np.quantile(samples, [tail, 1 - tail])
  return float(low), float(high)
