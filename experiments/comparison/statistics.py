"""Compares arms with a control: simultaneous intervals over seeds and inputs, and verdicts.

A score m of an arm varies with the seed and with the inputs that it is computed on. For the arms a,
compared with a control 0,

    difference_a = mean_seeds m_a - mean_seeds m_0
    T_a          = |noise_a| / deviation_a

`noise` is a bootstrap draw of the difference's error, crossed over seeds and inputs (Owen 2007,
arXiv 0712.1111). Inputs are drawn with replacement, the same for all arms. Seeds are drawn from the
residuals of all arms with several seeds, since three of one arm's own say little; an arm keeps its
own deviation if it is more than twice the pooled one. `sqrt(df / chi2_df)` widens these draws,
since the pooled deviation is an estimate, as in Dunnett's comparisons with a control (1955).

All intervals are `difference +- c * deviation`, with c the 95 % quantile of max_a T_a (Westfall and
Young 1993): with a probability of about 95 % all of them hold together, whatever their number.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float

from lora_jax.fields import Count, Within, read_value

Verdict = Literal["better", "worse", "equivalent", "cannot be told"]
Scores = Mapping[str, Float[np.ndarray, " seeds"]]
POWER = 0.8  # of the smallest detectable difference
RESAMPLES = 4000
UNSTABLE = 2.0  # times the pooled deviation, which three seeds exceed in 2 of 100 cases


@dataclasses.dataclass(frozen=True)
class Difference:
  """An arm's score minus the control's, with its simultaneous interval, in the score's units.

  Attributes:
    difference: of the means over seeds.
    low: the interval's lower end.
    high: its upper end.
    detectable: the smallest true difference whose interval excludes 0 in 80 % of such experiments.
  """

  difference: float
  low: float
  high: float
  detectable: float

  def verdict(self, margin: float) -> Verdict:
    """Returns whether the arm's loss is equivalent to the control's within a margin, or smaller.

    An interval within the margin is equivalent, also if it excludes 0 (Schuirmann 1987).
    """
    if -margin < self.low and self.high < margin:
      return "equivalent"
    if self.low <= 0 <= self.high:
      return "cannot be told"
    return "better" if self.high < 0 else "worse"


def compare_losses(
  losses: Mapping[str, Float[np.ndarray, "seeds inputs"]],
  tokens: Float[np.ndarray, " inputs"],
  control: str,
  *,
  resamples: int = RESAMPLES,
  confidence: float = 0.95,
  seed: int = 0,
) -> dict[str, Difference]:
  """Compares mean losses per token, nats.

  Args:
    losses: by arm, the sums of the token losses of each input, nats; the seeds may differ in
      number.
    tokens: the supervised tokens of each input.
    control: the arm that the others are compared with.
    resamples: the number of bootstrap draws.
    confidence: the probability that all intervals hold together, in (0, 1).
    seed: of the draws; the same seed gives the same intervals.
  Raises:
    ValueError: if an arm has other inputs, a loss is not finite, or no arm has several seeds.
  """
  for arm, values in losses.items():
    if values.ndim != 2 or values.shape[1] != len(tokens) or not np.isfinite(values).all():
      raise ValueError(
        f"{arm}: expected finite losses, seeds x {len(tokens)} inputs, got shape {values.shape}"
      )
  scores = {arm: values.sum(axis=1) / tokens.sum() for arm, values in losses.items()}
  means = np.stack([values.mean(axis=0) for values in losses.values()], axis=1)

  def resampled(counts: np.ndarray) -> np.ndarray:
    return counts @ means / (counts @ tokens)[:, None]

  draws = {"resamples": resamples, "confidence": confidence, "seed": seed}
  return compare(scores, len(tokens), resampled, control, **draws)


def compare_sums(
  rows: Mapping[str, Float[np.ndarray, "seeds inputs counts"]],
  formula: Callable[[np.ndarray], np.ndarray],
  control: str,
) -> dict[str, Difference]:
  """Compares scores of sums over the inputs, such as BLEU.

  Args:
    rows: by arm, the statistics of each input; the seeds may differ in number.
    formula: from sums of rows to scores.
    control: as in `compare_losses`.
  """
  scores = {arm: formula(values.sum(axis=1)) for arm, values in rows.items()}

  def resampled(counts: np.ndarray) -> np.ndarray:
    means = [
      np.mean([formula(counts @ of_seed) for of_seed in values], axis=0) for values in rows.values()
    ]
    return np.stack(means, axis=1)

  return compare(scores, rows[control].shape[1], resampled, control)


def compare(
  scores: Scores,
  num_inputs: int,
  resampled: Callable[[np.ndarray], np.ndarray],
  control: str,
  *,
  resamples: int = RESAMPLES,
  confidence: float = 0.95,
  seed: int = 0,
) -> dict[str, Difference]:
  """Compares any scores of arms with those of a control; errors as in `compare_losses`.

  Args:
    scores: by arm, the score of each seed, over all inputs.
    num_inputs: the number of inputs.
    resampled: from counts, (resamples, inputs), how often each resample holds each input, to the
      scores, (resamples, arms), means over the seeds.
    control, resamples, confidence, seed: as in `compare_losses`.
  """
  if control not in scores or len(scores) < 2:
    raise ValueError(f"expected {control!r} and other arms, got {', '.join(scores) or 'none'}")
  read_value(Count, resamples, "resamples")
  read_value(Annotated[float, Within("(0, 1)")], confidence, "confidence")
  generator = np.random.default_rng(seed)
  counts = generator.multinomial(num_inputs, np.full(num_inputs, 1 / num_inputs), size=resamples)
  by_inputs = resampled(counts.astype(float))
  by_seeds, df = _seed_noise(list(scores.values()), resamples, generator)
  widening = np.sqrt(df / generator.chisquare(df, size=(resamples, 1)))
  arms = list(scores)
  at = arms.index(control)

  def differences(values: np.ndarray) -> np.ndarray:
    return np.delete(values - values[..., at : at + 1], at, axis=-1)

  input_noise, seed_noise = differences(by_inputs), differences(by_seeds)
  input_noise = input_noise - input_noise.mean(axis=0)
  deviations = np.sqrt(input_noise.var(axis=0) + seed_noise.var(axis=0))
  noise = np.abs(input_noise + widening * seed_noise)
  ratios = np.divide(noise, deviations, out=np.zeros_like(noise), where=deviations > 0)
  critical = float(np.quantile(ratios.max(axis=1), confidence))
  centre = differences(np.array([values.mean() for values in scores.values()]))
  detectable = critical + statistics.NormalDist().inv_cdf(POWER)
  others = [arm for arm in arms if arm != control]
  return {
    arm: Difference(
      float(d), float(d - critical * s), float(d + critical * s), float(detectable * s)
    )
    for arm, d, s in zip(others, centre, deviations, strict=True)
  }


def _seed_noise(
  scores: Sequence[np.ndarray], resamples: int, generator: np.random.Generator
) -> tuple[Float[np.ndarray, "resamples arms"], int]:
  """Returns draws of the errors of the means over seeds, and the pooled degrees of freedom."""
  several = [values for values in scores if len(values) > 1]
  df = sum(len(values) - 1 for values in several)
  if not df:
    raise ValueError("no arm has several seeds, so their noise is unknown: run one arm with two")
  squares = [float(np.sum(np.square(values - values.mean()))) for values in several]
  pooled = math.sqrt(sum(squares) / df)
  residuals = np.concatenate(
    [(values - values.mean()) * math.sqrt(len(values) / (len(values) - 1)) for values in several]
  )
  noise = np.zeros((resamples, len(scores)))
  for i, values in enumerate(scores):
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    larger = deviation / pooled if deviation > UNSTABLE * pooled > 0 else 1.0
    drawn = generator.choice(residuals, size=(resamples, len(values)))
    noise[:, i] = larger * drawn.mean(axis=1)
  return noise, df


def expected_best(losses: Sequence[float], count: int) -> float:
  """Returns the expected smallest loss of `count` draws without replacement.

  The unbiased estimate; the one with replacement (Dodge et al. 2019, arXiv 1909.03004, eq. 3) is
  too optimistic (Tang et al. 2020, arXiv 2004.13705).

  >>> expected_best([3.0, 1.0, 2.0], 1), expected_best([3.0, 1.0, 2.0], 3)
  (2.0, 1.0)
  """
  read_value(Count, count, "count")
  if count > len(losses):
    raise ValueError(f"count must be at most the {len(losses)} losses, got {count}")
  number = len(losses)
  ways = [math.comb(number - 1 - i, count - 1) for i in range(number)]  # the i-th is the smallest
  total = sum(w * loss for w, loss in zip(ways, sorted(losses), strict=True))
  return total / math.comb(number, count)
