"""The runs of a study: first those that choose each arm's learning rate, then the reported ones."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from experiments.comparison.plan import (
  ADDED,
  CORES,
  FIXED,
  MEASURING,
  PER_INPUT,
  PER_LINE,
  PER_VALID_LINE,
  SLOWER,
  best_rate,
  next_rate,
  on_grid,
)
from experiments.configs import Config
from experiments.configs.paper import MAX_ADDED_RATES, RATE_SEED, STUDIES, TINY, Arm, Study
from experiments.configs.variants import Changes
from experiments.harness.config import flat
from experiments.harness.launch import RATE, apply
from experiments.harness.methods import default_learning_rate, find_method

LINE_TOKENS = {"embedded": 80.0, "smollm2": 55.0}  # of E2E, for which PER_LINE was measured
TRAINING_LINES = {"e2e": 42_061, "e2e_reversed": 42_061, "dial": 94}  # where 0 is all
GREEDY = 1 / 3  # of the time of 10 beams: an allowance, not measured
GLUE_SECONDS = 500.0  # CPU time of a run on MiniLM (docs/glue.md: 5 hours for 72 on two cores)

Losses = Mapping[str, Mapping[float, float]]
"""By arm and learning rate; infinite where training failed."""


class Planned(NamedTuple):
  """One run; `rate` is None for a method that does not train."""

  study: str
  arm: str
  kind: Literal["rates", "reported"]
  rate: float | None
  seed: int

  @property
  def name(self) -> str:
    """The name of its folder in the study's."""
    rate = "" if self.rate is None else f",rate={self.rate:g}"
    return f"{self.kind},{self.arm}{rate},seed={self.seed}"


def trains(arm: Arm) -> bool:
  """Tells whether an arm's method trains."""
  return find_method(str(arm.changes["method"])).trains


def config_of(planned: Planned, workdir: str, tiny: bool = False) -> Config:
  """Returns the config of a planned run."""
  study = STUDIES[planned.study]
  arm, config = study.arms[planned.arm], study.make()
  changes: Changes = {**arm.changes, "seed": planned.seed, "workdir": workdir}
  if planned.kind == "rates":
    changes |= study.rate_changes if arm.rate_changes is None else arm.rate_changes
  if planned.rate is not None:
    changes[RATE] = planned.rate
  config = apply(config, changes)
  if not tiny:
    return config
  fields = flat(config)
  small = {n: value for n, value in TINY.items() if n in fields and (fields[n] or "train" in n)}
  if "data.num_epochs" in fields:
    small["data.num_epochs"] = 1
  return apply(config, small)


# ---- learning rates ----------------------------------------------------------------------


def first_rates(study: Study, arm: Arm, points: int) -> list[float]:
  """Returns an arm's first learning rates, half a decade apart, around its method's default."""
  config = study.make()
  usual = config.optimizer.learning_rate
  centre = on_grid(default_learning_rate(usual, "lora", str(arm.changes["method"])))
  return [on_grid(centre, step) for step in range(-(points // 2), points - points // 2)]


def rate_runs(name: str, losses: Losses) -> list[Planned]:
  """Returns the runs that choose learning rates, and are possible now.

  Args:
    name: of the study.
    losses: of earlier runs; empty at first.
  """
  study, runs = STUDIES[name], list[Planned]()
  for arm_name, arm in study.arms.items():
    if not trains(arm) or arm.rate is not None:
      continue
    known = losses.get(arm_name, {})
    wanted = set(first_rates(study, arm, study.rate_points))
    if wanted <= known.keys():
      added = len(known) - study.rate_points
      further = next_rate(known) if added < MAX_ADDED_RATES else None
      wanted = set() if further is None else {further}
    runs += [
      Planned(name, arm_name, "rates", rate, RATE_SEED) for rate in sorted(wanted - known.keys())
    ]
  return runs


def chosen_rates(name: str, losses: Losses) -> dict[str, float]:
  """Returns the best learning rate of each arm whose best is between two others, or was known."""
  study, rates = STUDIES[name], dict[str, float]()
  for arm_name, arm in study.arms.items():
    known = losses.get(arm_name, {})
    if arm.rate is not None:
      rates[arm_name] = arm.rate
    elif trains(arm) and set(first_rates(study, arm, study.rate_points)) <= known.keys():
      best = best_rate(known)
      if best is not None and next_rate(known) is None:
        rates[arm_name] = best
  return rates


def reported_runs(name: str, rates: Mapping[str, float]) -> list[Planned]:
  """Returns the reported runs: the first seed of every arm comes first.

  Args:
    name: of the study.
    rates: the best learning rate of each arm; an arm that trains and has none is left out.
  """
  study = STUDIES[name]
  return [
    Planned(name, arm_name, "reported", rates.get(arm_name), seed)
    for i, seed in enumerate(study.seeds)
    for arm_name, arm in study.arms.items()
    if i < num_seeds(study, arm) and (arm_name in rates or not trains(arm))
  ]


def num_seeds(study: Study, arm: Arm) -> int:
  """Returns an arm's number of reported runs."""
  return 1 if not trains(arm) else arm.seeds or len(study.seeds)


# ---- hours -------------------------------------------------------------------------------


class Hours(NamedTuple):
  """The expected effort of a stage: runs, and their hours on all cores."""

  runs: float
  hours: float

  @property
  def minutes_each(self) -> float:
    return 60 * self.hours * CORES / self.runs


def expected(name: str) -> Hours:
  """Returns the runs and hours of a study; estimates, for 2 CPU cores with a process each."""
  study, runs, seconds = STUDIES[name], 0.0, 0.0
  for arm_name, arm in study.arms.items():
    counts = {"reported": float(num_seeds(study, arm))}
    if trains(arm) and arm.rate is None:
      counts["rates"] = study.rate_points + ADDED
    for kind, count in counts.items():
      rate = 1e-3 if trains(arm) else None
      planned = Planned(name, arm_name, kind, rate, 1)  # pyright: ignore[reportArgumentType]
      runs += count
      seconds += count * _seconds(planned)
  return Hours(runs, seconds / CORES / 3600)


def _seconds(planned: Planned) -> float:
  """Returns the CPU time of a run, seconds."""
  study = STUDIES[planned.study]
  if study.base == "minilm":
    return GLUE_SECONDS
  fields, base = flat(config_of(planned, "")), study.base
  seconds = FIXED[base] + PER_VALID_LINE[base] * (fields["data.num_valid_records"] or 10)
  if planned.rate is not None:
    lines = fields["data.num_train_records"] or TRAINING_LINES[fields["data.name"]]
    share = study.tokens / LINE_TOKENS[base]
    seconds += PER_LINE[base] * share * lines * fields["data.num_epochs"]
  beams = 1.0 if fields["decoding.num_beams"] > 1 else GREEDY
  seconds += beams * PER_INPUT[base] * fields["decoding.num_inputs"]
  if planned.kind == "reported":
    seconds += MEASURING[base]
  return SLOWER * seconds


def losses_of(records: Iterable[Mapping[str, Any]], name: str) -> dict[str, dict[float, float]]:
  """Returns the validation losses of a study's runs that choose learning rates."""
  losses: dict[str, dict[float, float]] = {}
  for record in records:
    if record["study"] == name and record["kind"] == "rates":
      loss = record["valid_loss"] if record["status"] == "finished" else math.inf
      losses.setdefault(record["arm"], {})[record["rate"]] = loss
  return losses
