"""The runs of the comparison: which arms, at which sizes and learning rates, in which order.

rates          embedded base: learning rates of all arms, one epoch of 1,000 examples, one seed
seeds          embedded base: all arms at their best learning rate, 4,000 examples, three seeds
effort         embedded base: random draws of learning rate, alpha, weight decay and warmup
smollm2_rates  SmolLM2: learning rates of the ten best known
smollm2        SmolLM2: these at their best, 4,000 examples; five with three seeds and BLEU
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.comparison.sizes import Size, count_parameters, match_rank
from experiments.configs import Config
from experiments.configs.variants import (
  ARMS,
  BEST_KNOWN,
  CONTROL,
  DRAW_SEED,
  MAX_ADDED_RATES,
  RANK,
  RATE_SEED,
  SCALING,
  TOLERANCE,
  WITH_BLEU,
  Changes,
  Sizes,
  get_config,
)
from experiments.harness.config import read_config
from experiments.harness.launch import RATE, apply
from experiments.harness.methods import default_learning_rate, find_method
from experiments.harness.table import aligned
from experiments.nlg.config import E2EConfig

FROZEN = "frozen_base"
STAGES = {  # and their base models
  "rates": "embedded",
  "seeds": "embedded",
  "effort": "embedded",
  "smollm2_rates": "smollm2",
  "smollm2": "smollm2",
}

CORES = 2  # each has a process
CPU_SECONDS = 1.6  # of 2 cores in a second, where a single process does not fill both

# CPU seconds. The embedded base: measured for LoRA's second run in a process, on a machine with
# other work: 0.59 a step, of which 1,000 examples are 52, and 18 besides. SmolLM2: 277 tokens a
# second on two cores (docs/benchmarks.md), 55 tokens in an example of training, 61 of validation.
FIXED = {"embedded": 12.0, "smollm2": 45.0}  # loading, tracing, compiling, saving
PER_LINE = {"embedded": 0.031, "smollm2": 2 * 55.0 / 277}
PER_VALID_LINE = {"embedded": 0.012, "smollm2": 2 * 61.0 / 3 / 277}
PER_INPUT = {"embedded": 0.2, "smollm2": 2 * 26.6 / 20}  # decoded with 10 beams
MEASURING = {"embedded": 8.0, "smollm2": 100.0}  # losses by input, and those of Wikipedia
SLOWER = 1.2  # than LoRA: an allowance for the mean arm, not measured
ADDED = 0.5  # learning rates added per arm until the best is bracketed: an allowance


class Planned(NamedTuple):
  """One run: `changes` are the fields that differ from its base's config."""

  stage: str
  arm: str
  changes: Changes

  @property
  def base(self) -> str:
    return STAGES[self.stage]

  @property
  def rate(self) -> float:
    rate = self.changes[RATE]
    assert isinstance(rate, float)
    return rate

  @property
  def name(self) -> str:
    """The name of its folder in the stage's."""
    if self.arm == FROZEN:
      return FROZEN
    return f"{self.arm},rate={self.rate:g},seed={self.changes['seed']}"


def arms_of(stage: str, chosen: Sequence[str] = ()) -> list[str]:
  """Returns the arms of a stage, or those that were chosen of them; always with the control.

  Raises:
    ValueError: if a chosen arm does not exist.
  """
  for arm in chosen:
    if arm not in ARMS:
      raise ValueError(f"the arms must be of {', '.join(ARMS)}, got {arm!r}")
  arms = ARMS if STAGES[stage] == "embedded" else BEST_KNOWN
  return [arm for arm in arms if not chosen or arm in (CONTROL, *chosen)]


@functools.cache
def size_of(arm: str, base: str) -> Size:
  """Returns an arm's rank and number of trained parameters on a base model."""
  config, row = get_config(base), ARMS[arm]

  def count(rank: int | None) -> int:
    fields = row.changes if rank is None else {**row.changes, **_rank(rank)}
    changed = apply(config, _used(row.method, {"method": row.method, **fields}))
    return count_parameters(read_config(E2EConfig, changed))

  if not find_method(row.method).uses("lora.rank"):
    return Size(None, count(None), False, "its own size")
  rank = row.changes.get("lora.rank")
  if isinstance(rank, int):
    return Size(rank, count(rank), False, "its own size")
  wanted = count(RANK) if arm == CONTROL else size_of(CONTROL, base).parameters
  size = match_rank(count, wanted, TOLERANCE, first=RANK)
  return size if row.is_matched else size._replace(is_matched=False, reason="its own size")


def _rank(rank: int, scaling: float = SCALING) -> Changes:
  return {"lora.rank": rank, "lora.alpha": float(f"{scaling * rank:.6g}")}


def _used(method: str, changes: Mapping[str, object]) -> Changes:
  """Returns the changes that have an effect on a method."""
  return {name: value for name, value in changes.items() if find_method(method).uses(name)}


def changes_of(
  arm: str, base: str, fields: Mapping[str, object], scaling: float = SCALING
) -> Changes:
  """Returns the changes of an arm's run; `fields` are those besides the method and its rank."""
  row, rank = ARMS[arm], size_of(arm, base).rank
  ranks = {} if rank is None else _rank(rank, scaling)
  return _used(row.method, {"method": row.method, **row.changes, **ranks, **fields})


def config_of(planned: Planned, sizes: Sizes, workdir: str) -> Config:
  """Returns the config of a planned run."""
  fields = {"data.num_valid_records": sizes.valid_lines, **planned.changes, "workdir": workdir}
  return apply(get_config(planned.base), fields)


# ---- learning rates ----------------------------------------------------------------------


def on_grid(rate: float, steps: int = 0) -> float:
  """Returns the nearest of 1, 3, 10, 30, ... times a power of ten, some half decades away.

  >>> on_grid(1.1e-3), on_grid(1e-3, 1), on_grid(1e-3, -1)
  (0.001, 0.003, 0.0003)
  """
  decade, half = divmod(round(2 * math.log10(rate)) + steps, 2)
  return float(f"{3 if half else 1}e{decade}")


def first_rates(arm: str, base: str, count: int) -> list[float]:
  """Returns an arm's first learning rates, half a decade apart, around its method's default."""
  centre = default_rate(arm, base)
  return [on_grid(centre, step) for step in range(-(count // 2), count - count // 2)]


def default_rate(arm: str, base: str) -> float:
  """Returns the default of an arm's method: a multiple, in the table of methods, of LoRA's."""
  rate = get_config(base).optimizer.learning_rate
  return on_grid(default_learning_rate(rate, ARMS[CONTROL].method, ARMS[arm].method))


def best_rate(losses: Mapping[float, float]) -> float | None:
  """Returns the learning rate with the smallest loss; None if all are infinite."""
  best = min(losses, key=lambda rate: losses[rate])
  return best if math.isfinite(losses[best]) else None


def next_rate(losses: Mapping[float, float]) -> float | None:
  """Returns the learning rate to try next; None if the best is bracketed.

  Args:
    losses: by learning rate; infinite for a failed run.
  """
  best = best_rate(losses)
  if best is None or best == min(losses):
    return on_grid(min(losses), -1)
  return on_grid(best, 1) if best == max(losses) else None


def bracketed(
  stage: str, sizes: Sizes, losses: Mapping[str, Mapping[float, float]], chosen: Sequence[str] = ()
) -> list[str]:
  """Returns the arms whose best learning rate is between others; see `rate_runs` for the args."""
  base = STAGES[stage]
  return [
    arm
    for arm in arms_of(stage, chosen)
    if set(first_rates(arm, base, sizes.rate_points[base])) <= losses.get(arm, {}).keys()
    and next_rate(losses[arm]) is None
  ]


def rate_runs(
  stage: str, sizes: Sizes, losses: Mapping[str, Mapping[float, float]], chosen: Sequence[str] = ()
) -> list[Planned]:
  """Returns the runs that choose learning rates, and are possible now.

  An arm whose best learning rate is not bracketed after many more were added has none: its method
  may not train at all.

  Args:
    stage: rates or smollm2_rates.
    sizes: of the comparison.
    losses: of earlier runs, by arm and learning rate; empty at first.
    chosen: arms; empty is all.
  """
  base, runs = STAGES[stage], list[Planned]()
  for arm in arms_of(stage, chosen):
    known = losses.get(arm, {})
    points = sizes.rate_points[base]
    wanted = set(first_rates(arm, base, points))
    if wanted <= known.keys():
      further = next_rate(known) if len(known) < points + MAX_ADDED_RATES else None
      wanted = set() if further is None else {further}
    runs += [
      Planned(stage, arm, _trained(arm, base, rate, RATE_SEED, sizes.rate_lines))
      for rate in sorted(wanted - known.keys())
    ]
  return runs


def frozen_run(stage: str) -> Planned:
  """Returns the run that evaluates the base model itself: a loss above its is a failed run's."""
  return Planned(stage, FROZEN, {"method": FROZEN})


def _trained(arm: str, base: str, rate: float, seed: int, lines: int) -> Changes:
  settings = {RATE: rate, "seed": seed, "data.num_train_records": lines}
  return changes_of(arm, base, settings)


# ---- runs that are reported --------------------------------------------------------------


def reported_runs(
  stage: str, sizes: Sizes, rates: Mapping[str, float], chosen: Sequence[str] = ()
) -> list[Planned]:
  """Returns the runs of seeds or smollm2: the first seed of every arm comes first.

  Args:
    stage: seeds or smollm2.
    sizes: of the comparison.
    rates: the best learning rate of each arm; an arm without one is left out.
    chosen: arms; empty is all.
  """
  base, runs = STAGES[stage], []
  for i, seed in enumerate(sizes.seeds):
    for arm in arms_of(stage, chosen):
      if arm in rates and i < num_seeds(stage, arm, sizes):
        changes = _trained(arm, base, rates[arm], seed, sizes.lines)
        inputs = {"decoding.num_inputs": sizes.decoded_inputs} if _decodes(stage, arm) else {}
        runs.append(Planned(stage, arm, changes | inputs))
  return runs


def num_seeds(stage: str, arm: str, sizes: Sizes) -> int:
  """Returns an arm's number of reported runs."""
  return len(sizes.seeds) if stage == "seeds" or _decodes(stage, arm) else 1


def _decodes(stage: str, arm: str) -> bool:
  return stage == "smollm2" and arm in WITH_BLEU


class Draw(NamedTuple):
  """A random draw of hyperparameters, in the units that all arms share."""

  rate: float  # times the default of the arm's method
  scaling: float  # alpha / rank
  weight_decay: float
  warmup_share: float


def draws(count: int) -> Iterator[Draw]:
  """Yields the random draws, the same ones for every arm."""
  for values in np.random.default_rng(0).uniform(size=(count, 4)):
    rate, scaling = 10 ** (2 * values[0] - 1), SCALING * 2 ** (6 * values[1] - 3)
    decay, warmup = 10 ** (2 * values[2] - 3), 0.02 + 0.28 * values[3]
    yield Draw(*(float(f"{value:.3g}") for value in (rate, scaling, decay, warmup)))


def draw_runs(sizes: Sizes, chosen: Sequence[str] = ()) -> list[Planned]:
  """Returns the runs of the stage effort: one draw of every arm after another."""
  runs = []
  for draw in draws(sizes.draws):
    for arm in arms_of("effort", chosen):
      fields: Changes = {
        RATE: float(f"{draw.rate * default_rate(arm, 'embedded'):.3g}"),
        "seed": DRAW_SEED,
        "data.num_train_records": sizes.draw_lines,
        "optimizer.weight_decay": draw.weight_decay,
        "optimizer.warmup_share": draw.warmup_share,
      }
      changes = changes_of(arm, "embedded", fields, draw.scaling)
      runs.append(Planned("effort", arm, changes))
  return runs


# ---- the table -----------------------------------------------------------------------------


class Row(NamedTuple):
  """A row of the plan: the runs of a stage that are alike."""

  stage: str
  runs: float
  lines: int
  seconds: float  # CPU time of one run


def planned_rows(sizes: Sizes, chosen: Sequence[str] = ()) -> list[Row]:
  """Returns the rows of the plan."""
  rows = []
  for stage, base in STAGES.items():
    if base == "smollm2" and not sizes.smollm2:
      continue
    names = list(ARMS if base == "embedded" else BEST_KNOWN)
    arms = len([arm for arm in names if not chosen or arm in (CONTROL, *chosen)])
    if stage in ("rates", "smollm2_rates"):
      count = arms * (sizes.rate_points[base] + ADDED)
      rows.append(Row(stage, count, sizes.rate_lines, _seconds(base, sizes, sizes.rate_lines)))
    elif stage == "effort":
      seconds = _seconds(base, sizes, sizes.draw_lines)
      rows.append(Row(stage, arms * sizes.draws, sizes.draw_lines, seconds))
    else:
      seconds = _seconds(base, sizes, sizes.lines) + MEASURING[base]
      decoded = len([a for a in WITH_BLEU if not chosen or a in (CONTROL, *chosen)])
      decoded = decoded if stage == "smollm2" else arms
      with_seeds = decoded * len(sizes.seeds)
      decoding = PER_INPUT[base] * sizes.decoded_inputs if stage == "smollm2" else 0.0
      rows.append(Row(stage, with_seeds, sizes.lines, seconds + decoding))
      if arms > decoded:
        rows.append(Row(stage, arms - decoded, sizes.lines, seconds))
  return rows


def _seconds(base: str, sizes: Sizes, lines: int) -> float:
  valid = PER_VALID_LINE[base] * sizes.valid_lines
  return SLOWER * (FIXED[base] + PER_LINE[base] * lines) + valid


def hours(rows: Iterable[Row]) -> float:
  """Returns the hours of all rows, on all cores."""
  return sum(row.runs * row.seconds for row in rows) / CORES / 3600


def plan(sizes: Sizes, chosen: Sequence[str] = ()) -> str:
  """Returns the table of planned runs with their hours, and the arms' sizes, in Markdown."""
  parts = [stage_table(sizes, chosen)]
  for base in dict.fromkeys(STAGES[row.stage] for row in planned_rows(sizes, chosen)):
    parts += [f"Sizes on {base}:", size_table(base, chosen)]
  return "\n\n".join(parts)


def stage_table(sizes: Sizes, chosen: Sequence[str] = ()) -> str:
  """Returns the table of planned runs with their hours."""
  rows = planned_rows(sizes, chosen)
  table = [["stage", "base model", "runs", "examples", "CPU minutes each", "hours"]]
  for row in rows:
    cells = [f"{row.runs:.0f}", f"{row.lines:,}", f"{row.seconds / 60:.1f}"]
    table.append([row.stage, STAGES[row.stage], *cells, f"{hours([row]):.1f}"])
  total = sum(row.runs for row in rows)
  table.append(["all", "", f"{total:.0f}", "", "", f"{hours(rows):.1f}"])
  return aligned(table)


def size_table(base: str, chosen: Sequence[str] = ()) -> str:
  """Returns a table of the arms' ranks and numbers of trained parameters."""
  stage = next(stage for stage, other in STAGES.items() if other == base)
  control = size_of(CONTROL, base).parameters
  table = [["arm", "rank", "trained parameters", "of LoRA's", "ranked"]]
  for arm in arms_of(stage, chosen):
    size = size_of(arm, base)
    rank = "" if size.rank is None else str(size.rank)
    share = f"{100 * size.parameters / control:.1f} %"
    ranked = "yes" if size.is_matched else f"no: {size.reason}"
    table.append([label(arm), rank, f"{size.parameters:,}", share, ranked])
  return aligned(table)


def label(arm: str) -> str:
  """Returns an arm's name in tables and plots."""
  if arm == FROZEN:
    return find_method(FROZEN).label
  return ARMS[arm].label or find_method(ARMS[arm].method).label
