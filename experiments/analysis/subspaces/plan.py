"""The planned runs of a study of subspaces, with their hours."""

from typing import NamedTuple

from experiments.comparison.plan import CPU_SECONDS, FIXED, PER_LINE, PER_VALID_LINE
from experiments.configs import Config
from experiments.configs.subspaces import SCALING, SEEDS, Sizes, get_config, learning_rate
from experiments.configs.variants import Changes
from experiments.harness.launch import RATE, apply
from experiments.harness.table import aligned

SLOWER = 1.2  # than LoRA of rank 4, for which seconds were measured: an allowance for rank 64
SHUFFLED: Changes = {"data.shuffled_completions": True}
RANDOM: Changes = {"model.start": "random"}


class Planned(NamedTuple):
  """One run: the name of its folder, and the fields that differ from its base's config."""

  name: str
  changes: Changes


def planned_runs(base: str, sizes: Sizes) -> list[Planned]:
  """Returns the runs: both ranks, a second seed of the larger one, and the nulls of both ranks."""
  (_, high), (first, second) = sizes.ranks, SEEDS
  runs = [_planned(base, sizes, rank, first) for rank in sizes.ranks]
  runs.append(_planned(base, sizes, high, second))
  for kind, changes in (("shuffled", SHUFFLED), ("random", RANDOM)):
    runs += [_planned(base, sizes, rank, first, kind, changes) for rank in sizes.ranks]
  return runs


def _planned(
  base: str,
  sizes: Sizes,
  rank: int,
  seed: int,
  kind: str = "trained",
  changes: Changes | None = None,
) -> Planned:
  fields: Changes = {
    "lora.rank": rank,
    "lora.alpha": SCALING * rank,
    RATE: learning_rate(base, rank, is_random=kind == "random"),
    "data.num_train_records": sizes.lines,
    "data.num_valid_records": sizes.valid_lines,
    "seed": seed,
  }
  return Planned(f"{kind},rank={rank},seed={seed}", fields | (changes or {}))


def config_of(planned: Planned, base: str, workdir: str) -> Config:
  """Returns the config of a planned run."""
  return apply(get_config(base), {**planned.changes, "workdir": workdir})


def run_hours(base: str, sizes: Sizes) -> float:
  """Returns the hours of one run on 2 CPU cores with no other work; an estimate."""
  training = SLOWER * (FIXED[base] + PER_LINE[base] * sizes.lines)
  return (training + PER_VALID_LINE[base] * sizes.valid_lines) / CPU_SECONDS / 3600


def plan(base: str, sizes: Sizes) -> str:
  """Returns the table of planned runs with their hours, in Markdown."""
  runs, hours = planned_runs(base, sizes), run_hours(base, sizes)
  table = [["run", "learning rate", "examples", "hours"]]
  cells = (f"{sizes.lines:,}", f"{hours:.2f}")
  table += [[run.name, f"{run.changes[RATE]:g}", *cells] for run in runs]
  table.append([f"all {len(runs)}", "", "", f"{len(runs) * hours:.2f}"])
  return f"{aligned(table)}\n\nOn the base model {base}, with 2 CPU cores and no other work."
