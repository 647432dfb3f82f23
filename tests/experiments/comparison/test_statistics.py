"""The comparison's statistics on simulated runs: coverage, false positives, power, verdicts."""

import numpy as np
import pytest

from experiments.comparison.statistics import Difference, compare, compare_losses, expected_best

SEED_SD, INPUT_SD, INTERACTION_SD = 0.005, 0.4, 0.02  # nats a token, as on the embedded base model
ARMS, SEEDS, INPUTS = 10, 3, 100
TOKENS = np.full(INPUTS, 25.0)


def simulated(generator, differences=None, seeds=SEEDS, scale=None):
  """Returns losses, arms x seeds x inputs: the first arm is the control."""
  differences = np.zeros(ARMS) if differences is None else np.asarray(differences)
  arms = len(differences)
  scale = np.ones(arms) if scale is None else np.asarray(scale)
  means = 1.6 + differences[:, None, None]
  by_seed = SEED_SD * scale[:, None, None] * generator.normal(size=(arms, seeds, 1))
  by_input = INPUT_SD * generator.normal(size=INPUTS)
  by_both = INTERACTION_SD * generator.normal(size=(arms, seeds, INPUTS))
  losses = (means + by_seed + by_input + by_both) * TOKENS
  return {f"arm{i}": losses[i] for i in range(arms)}


def excluding(results, differences):
  """Returns how many intervals do not hold the true difference."""
  truth = np.asarray(differences)[1:] - differences[0]
  pairs = zip(results.values(), truth, strict=True)
  return sum(not result.low <= true <= result.high for result, true in pairs)


def family_errors(differences, repeats=400, **options):
  """Returns the share of simulated experiments in which some interval is wrong."""
  generator = np.random.default_rng(0)
  wrong = [
    excluding(
      compare_losses(simulated(generator, differences, **options), TOKENS, "arm0", resamples=300),
      differences,
    )
    for _ in range(repeats)
  ]
  return float(np.mean(np.array(wrong) > 0))


@pytest.mark.parametrize(
  "repeats", [60, pytest.param(1000, marks=pytest.mark.long)], ids=["60", "1000"]
)
def test_all_intervals_hold_together_in_95_of_100_experiments(repeats):
  assert 0.01 <= family_errors(np.zeros(ARMS), repeats) <= 0.07  # false positives


@pytest.mark.long
def test_coverage_is_the_same_with_differences_few_arms_and_an_unstable_one():
  assert family_errors(np.linspace(-0.1, 0.1, ARMS)) <= 0.08
  assert family_errors(np.zeros(2)) <= 0.08
  scale = np.ones(ARMS)
  scale[3] = 6.0
  assert family_errors(np.zeros(ARMS), scale=scale) <= 0.1


def test_uncorrected_intervals_would_find_differences_that_are_not_there(monkeypatch):
  """The positive control: without the maximum over arms the same simulation has errors."""
  quantile = np.quantile
  monkeypatch.setattr(np, "quantile", lambda ratios, q: 1.96)
  assert family_errors(np.zeros(ARMS), repeats=40) > 0.15
  monkeypatch.setattr(np, "quantile", quantile)


def test_a_detectable_difference_is_detected_in_80_of_100_experiments():
  generator = np.random.default_rng(1)

  def results(differences):
    experiments = (simulated(generator, differences) for _ in range(40))
    return [compare_losses(losses, TOKENS, "arm0", resamples=300)["arm1"] for losses in experiments]

  differences = np.zeros(ARMS)
  differences[1] = np.median([result.detectable for result in results(differences)])
  assert 0.01 < differences[1] < 0.04
  assert 0.65 < np.mean([result.low > 0 for result in results(differences)]) < 0.95


def test_arms_with_one_seed_share_the_others_noise():
  generator = np.random.default_rng(2)
  losses = simulated(generator)
  both = compare_losses(losses, TOKENS, "arm0")
  single = {arm: values[:1] if arm == "arm4" else values for arm, values in losses.items()}
  one = compare_losses(single, TOKENS, "arm0")
  assert one["arm4"].high - one["arm4"].low > 1.2 * (both["arm4"].high - both["arm4"].low)
  with pytest.raises(ValueError, match="no arm has several seeds"):
    compare_losses({arm: values[:1] for arm, values in losses.items()}, TOKENS, "arm0")


def test_inputs_of_unequal_length_count_by_their_tokens():
  tokens = np.array([1.0, 9.0])
  losses = {"a": np.array([[1.0, 18.0], [1.0, 18.0]]), "b": np.array([[2.0, 18.0], [2.0, 18.0]])}
  result = compare_losses(losses, tokens, "a")["b"]
  assert result.difference == pytest.approx(0.1)
  assert result.low < 0.1 < result.high  # over the inputs: both seeds agree


@pytest.mark.parametrize(
  ("low", "high", "verdict"),
  [
    (-0.01, 0.015, "equivalent"),
    (-0.015, -0.001, "equivalent"),
    (-0.05, -0.001, "better"),
    (0.001, 0.03, "worse"),
    (-0.01, 0.03, "cannot be told"),
    (-0.02, 0.0, "cannot be told"),
  ],
)
def test_verdicts(low, high, verdict):
  difference = Difference((low + high) / 2, low, high, 0.03)
  assert difference.verdict(0.02) == verdict


@pytest.mark.parametrize(
  ("losses", "message"),
  [
    ({"a": np.ones((2, 3)), "b": np.ones((2, 4))}, "b: expected finite losses, seeds x 3 inputs"),
    ({"a": np.ones((2, 3)), "b": np.full((2, 3), np.nan)}, "b: expected finite losses"),
    ({"a": np.ones((2, 3))}, "expected 'a' and other arms, got a"),
    ({"b": np.ones((2, 3)), "c": np.ones((2, 3))}, "expected 'a' and other arms, got b, c"),
  ],
)
def test_losses_that_cannot_be_compared(losses, message):
  with pytest.raises(ValueError, match=message):
    compare_losses(losses, np.ones(3), "a")


def test_any_score_can_be_compared():
  rows = np.random.default_rng(0).normal(size=(2, 3, 40)) + np.array([0.0, 1.0])[:, None, None]
  scores = {"a": rows[0].mean(axis=1), "b": rows[1].mean(axis=1)}
  means = rows.mean(axis=1).T
  result = compare(scores, 40, lambda counts: counts @ means / 40, "a")["b"]
  assert result.difference == pytest.approx(scores["b"].mean() - scores["a"].mean())
  assert result.low < 1 < result.high


def test_expected_best_is_the_mean_over_all_choices():
  losses = [5.0, 1.0, 4.0, 2.0]
  pairs = [min(a, b) for i, a in enumerate(losses) for b in losses[i + 1 :]]
  assert expected_best(losses, 2) == pytest.approx(np.mean(pairs))
  assert expected_best(losses, 1) == pytest.approx(np.mean(losses))
  with pytest.raises(ValueError, match="count must be at most the 4 losses, got 5"):
    expected_best(losses, 5)
