"""Decides a claim under one condition, from the intervals of differences to a control.

Each rule maps a `Difference` to holds, fails or cannot be told, as `compare_losses` has it: an
arm's loss minus the control's, with simultaneous 95 % intervals over the arms that a claim names,
by a bootstrap crossed over seeds and inputs. A claim about several arms holds if it holds for all
of them, and fails if it fails for one. Differences within the margin do not matter. On GLUE the
loss is the score in [0, 1] with a minus sign, and the intervals are over seeds only.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from experiments.comparison.statistics import (
  Difference,
  Verdict,
  compare,
  compare_losses,
  compare_sums,
)
from experiments.configs.paper import MARGIN, STUDIES
from experiments.nlg.scores import lower_is_better, metric_of, reaches_floor
from experiments.reproduction.plan import num_seeds
from experiments.reproduction.runs import Record
from lora_jax.metrics.coco import meteor_formula
from lora_jax.metrics.ngrams import bleu_formula, nist_formula

Word = Literal["holds", "fails", "cannot be told", "not run"]
Rule = Callable[[Difference], Word]
Reported = Mapping[str, Sequence[Record]]
"""The reported runs of a study by arm, each by seed."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What decides a claim under one condition.

  Attributes:
    word: the decision.
    interval: the differences with their intervals, or the reason why there are none.
  """

  word: Word
  interval: str = ""


# ---- rules on losses, where smaller is better --------------------------------------------


def _by(name: str, holds: Sequence[Verdict], fails: Sequence[Verdict]) -> Rule:
  def rule(difference: Difference) -> Word:
    verdict = difference.verdict(MARGIN)
    return "holds" if verdict in holds else "fails" if verdict in fails else "cannot be told"

  rule.__name__ = name  # the report has it
  return rule


on_par_or_better = _by("on_par_or_better", ["equivalent", "better"], ["worse"])
equivalent = _by("equivalent", ["equivalent"], ["better", "worse"])
better = _by("better", ["better"], ["equivalent", "worse"])
worse = _by("worse", ["worse"], ["equivalent", "better"])


def higher(difference: Difference) -> Word:
  """Decides that an arm has the higher score; there is no margin."""
  if difference.low <= 0 <= difference.high:
    return "cannot be told"
  return "holds" if difference.low > 0 else "fails"


def lower(difference: Difference) -> Word:
  """Decides that an arm has the lower error rate; there is no margin."""
  word = higher(difference)
  return "fails" if word == "holds" else "holds" if word == "fails" else word


def joined(words: Sequence[Word]) -> Word:
  """Returns the decision on all arms of a claim."""
  if "fails" in words:
    return "fails"
  return "holds" if set(words) == {"holds"} else "cannot be told"


# ---- differences -------------------------------------------------------------------------


def reported(records: Sequence[Record], study: str) -> dict[str, list[Record]]:
  """Returns the reported runs of a study by arm, each by seed."""
  by_arm: dict[str, list[Record]] = {}
  for record in sorted(records, key=lambda record: record["seed"]):
    if record["study"] == study and record["kind"] == "reported":
      by_arm.setdefault(record["arm"], []).append(record)
  return by_arm


def unfit(runs: Reported, arms: Sequence[str], count: Mapping[str, int]) -> Outcome | None:
  """Returns the outcome of arms that cannot be compared; None if they can.

  Args:
    runs: of a study.
    arms: that a claim compares.
    count: the number of planned seeds of each.
  """
  missing = [arm for arm in arms if len(runs.get(arm, ())) < count[arm]]
  if missing:
    return Outcome("not run", f"missing: {', '.join(missing)}")
  failed = [arm for arm in arms if any(run["status"] == "failed" for run in runs[arm])]
  if failed:
    return Outcome("cannot be told", f"training failed: {', '.join(failed)}")
  if all(len(runs[arm]) < 2 for arm in arms):
    return Outcome("cannot be told", "no second seed")
  return None


def loss_differences(runs: Reported, control: str, arms: Sequence[str]) -> dict[str, Difference]:
  """Returns the differences in validation loss to the control, nats per token."""
  names = (control, *arms)
  tokens = {tuple(run["input_tokens"]) for arm in names for run in runs[arm]}
  if len(tokens) != 1:
    raise ValueError("the runs were evaluated on different inputs: they cannot be compared")
  losses = {arm: np.array([run["input_losses"] for run in runs[arm]], float) for arm in names}
  return compare_losses(losses, np.array(tokens.pop(), float), control)


def metric_differences(
  runs: Reported, metric: str, control: str, arms: Sequence[str]
) -> dict[str, Difference]:
  """Returns the differences in a task's metric to the control, in the metric's units."""
  rows = {arm: np.array([run["rows"][metric] for run in runs[arm]], float) for arm in arms}
  rows = {control: np.array([run["rows"][metric] for run in runs[control]], float), **rows}
  return compare_sums(rows, _formula(metric), control)


def _formula(metric: str) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a metric's map from sums of its rows to scores; see `SegmentStatistics`."""
  name = metric_of(metric)
  known = {"bleu": bleu_formula, "nist": nist_formula, "meteor": meteor_formula}
  if name in known:
    return known[name]
  scale = 100.0 if name == "slots" else 1.0
  return lambda sums: scale * sums[..., 0] / sums[..., 1]


def seed_differences(
  runs: Reported, values: Callable[[Record], float], control: str, arms: Sequence[str]
) -> dict[str, Difference]:
  """Returns the differences of values that are known by run only: intervals over seeds."""
  scores = {arm: np.array([values(run) for run in runs[arm]]) for arm in (control, *arms)}
  means = np.array([of_arm.mean() for of_arm in scores.values()])

  def resampled(counts: np.ndarray) -> np.ndarray:
    return np.broadcast_to(means, (len(counts), len(means)))

  return compare(scores, 1, resampled, control)


# ---- decisions on the runs of a study ----------------------------------------------------


def decide(
  records: Sequence[Record], study: str, control: str, arms: Sequence[str], rule: Rule
) -> Outcome:
  """Decides by validation loss, nats per token; on GLUE by the score of each run, over seeds."""
  runs, planned = reported(records, study), _counts(study)
  outcome = unfit(runs, (control, *arms), planned)
  if outcome is not None:
    return outcome
  if STUDIES[study].base == "minilm":
    differences = seed_differences(runs, lambda run: run["valid_loss"], control, arms)
    return _outcome(differences, rule, "of the score in [0, 1], reversed, over seeds only")
  return _outcome(loss_differences(runs, control, arms), rule, "nats/token")


def decide_by_metric(
  records: Sequence[Record], study: str, metric: str, control: str, arms: Sequence[str]
) -> Outcome:
  """Decides that the arms have a better score than the control; at a floor nothing is told."""
  runs = reported(records, study)
  outcome = unfit(runs, (control, *arms), _counts(study))
  if outcome is not None:
    return outcome
  names = (control, *arms)
  absent = [arm for arm in names if any(metric not in run["rows"] for run in runs[arm])]
  if absent:
    return Outcome("cannot be told", f"without {metric}: {', '.join(absent)}")
  low = [arm for arm in names if at_any_floor(runs, arm, metric)]
  if low:
    return Outcome("cannot be told", f"at the floor: {', '.join(low)}")
  rule = lower if lower_is_better(metric) else higher
  return _outcome(metric_differences(runs, metric, control, arms), rule, metric)


def decide_forgetting(
  records: Sequence[Record], study: str, control: str, arms: Sequence[str]
) -> Outcome:
  """Decides that the arms have a smaller loss on Wikipedia than the control, over seeds."""
  runs = reported(records, study)
  outcome = unfit(runs, (control, *arms), _counts(study))
  if outcome is not None:
    return outcome
  differences = seed_differences(runs, lambda run: run["wikipedia_loss"], control, arms)
  return _outcome(differences, better, "nats/token on Wikipedia, over seeds only")


def _counts(study: str) -> dict[str, int]:
  return {name: num_seeds(STUDIES[study], arm) for name, arm in STUDIES[study].arms.items()}


def _outcome(differences: Mapping[str, Difference], rule: Rule, unit: str) -> Outcome:
  words: list[Word] = [rule(difference) for difference in differences.values()]
  intervals = [f"{arm} {in_words(difference)}" for arm, difference in differences.items()]
  return Outcome(joined(words), f"{'; '.join(intervals)} ({unit})")


def in_words(difference: Difference, digits: int = 3) -> str:
  """Returns a difference with its interval, and the smallest one that would be detected."""
  ends = (f"{end:+.{digits}f}" for end in (difference.difference, difference.low, difference.high))
  value, low, high = ends
  return f"{value} [{low}, {high}], detectable {difference.detectable:.{digits}f}"


# ---- floors ------------------------------------------------------------------------------


def floor_of(runs: Reported, metric: str) -> float:
  """Returns the score that needs no model; without a run of it 0, or infinite of an error rate."""
  scores = (record["scores"].get(metric) for record in runs.get("floor", ()))
  usual = math.inf if lower_is_better(metric) else 0.0
  return next((score for score in scores if score is not None), usual)


def at_floor(record: Record, metric: str, floor: float) -> bool:
  """Tells whether a run's score, or its interval over the inputs, reaches the floor."""
  score = record["scores"].get(metric)
  interval = record["intervals"].get(metric) or (score, score)
  return score is None or reaches_floor(metric, interval, floor)


def at_any_floor(runs: Reported, arm: str, metric: str) -> bool:
  """Tells whether a run of an arm reaches the floor of its study."""
  floor = floor_of(runs, metric)
  known = [r for r in runs.get(arm, ()) if r.get("scores", {}).get(metric) is not None]
  return any(at_floor(record, metric, floor) for record in known)
