"""Intervals and paired differences, on statistics made by hand."""

import numpy as np
import pytest

from lora_jax import metrics
from lora_jax.metrics.segments import mean_of_segments


def measured(scores):
  return metrics.Measured({"nist": mean_of_segments(np.asarray(scores, float))}, {})


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  trials = 400
  covered = 0
  for trial in range(trials):
    system = measured(rng.exponential(size=200))
    actual = metrics.intervals(system, resamples=300, confidence=0.8, seed=trial)["nist"]
    covered += actual.low <= 1.0 <= actual.high
  assert 0.75 < covered / trials < 0.85  # 2.5 standard deviations of 400 draws


def test_an_interval_is_as_wide_as_the_standard_error():
  scores = np.random.default_rng(1).normal(size=500)
  actual = metrics.intervals(measured(scores), resamples=4000)["nist"]
  assert actual.score == pytest.approx(scores.mean())
  half_width = 1.96 * scores.std() / np.sqrt(500)
  assert actual.high - actual.score == pytest.approx(half_width, rel=0.08)
  assert actual.score - actual.low == pytest.approx(half_width, rel=0.08)


def test_a_seed_gives_the_same_interval_and_another_seed_another():
  system = measured(np.random.default_rng(2).normal(size=50))
  first = metrics.intervals(system, seed=3)
  assert first == metrics.intervals(system, seed=3)
  assert first != metrics.intervals(system, seed=4)


def test_a_paired_difference_resamples_both_systems_alike():
  rng = np.random.default_rng(5)
  inputs = rng.normal(scale=10, size=300)  # some inputs are much harder than others
  a, b = inputs + rng.normal(0.2, 1, size=300), inputs + rng.normal(0, 1, size=300)
  actual = metrics.differences(measured(a), measured(b))["nist"]
  alone = metrics.intervals(measured(a - b))["nist"]
  assert actual.difference == pytest.approx(alone.score)
  assert (actual.low, actual.high) == pytest.approx((alone.low, alone.high))
  turned = metrics.differences(measured(b), measured(a))["nist"]
  assert (turned.low, turned.high) == pytest.approx((-actual.high, -actual.low))
  assert turned.share_against == actual.share_against


def test_the_share_against_is_a_one_sided_p_value():
  scores = np.random.default_rng(6).normal(size=200)
  shift = scores.mean() - scores.std() / np.sqrt(200)  # the mean is one standard error above
  actual = metrics.differences(measured(scores), measured(np.full(200, shift)), resamples=4000)
  assert actual["nist"].share_against == pytest.approx(0.159, abs=0.03)
  same = metrics.differences(measured(scores), measured(scores))["nist"]
  assert same == metrics.Difference(0.0, 0.0, 0.0, share_against=1.0)


def test_metrics_that_are_missing_have_no_interval(monkeypatch):
  monkeypatch.setenv("PATH", "")
  actual = metrics.bootstrap(["a b"], [["a b"]], resamples=10)
  assert list(actual) == ["bleu", "nist", "meteor", "rouge_l", "cider"]
  assert actual["nist"] == metrics.Interval(1.0, 1.0, 1.0)
  assert actual["meteor"] is actual["rouge_l"] is actual["cider"] is None


def test_settings_out_of_range():
  system = measured([1.0, 2.0])
  with pytest.raises(ValueError, match=r"resamples must be an integer in \[1, inf\), got 0"):
    metrics.intervals(system, resamples=0)
  with pytest.raises(ValueError, match=r"confidence must be an? .* in \(0, 1\), got 95"):
    metrics.differences(system, system, confidence=95)
  with pytest.raises(ValueError, match="2 and 3 segments"):
    metrics.differences(system, measured([1.0, 2.0, 3.0]))
