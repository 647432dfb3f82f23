"""The table of planned measurements with their hours."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.analysis.capacity import capacity_arms, seen_pairs
from experiments.analysis.sharpness import plan_sharpness
from experiments.comparison.plan import ARMS
from experiments.configs.mechanism import Sizes
from experiments.harness.table import aligned

# Seconds on 2 CPU cores with nothing else running, from the CPU seconds of single measurements of
# LoRA on a busy machine; two cores do about 1.6 CPU seconds a second.
LOADING = 8.0  # and compiling, of a training on codes
COMPILING = 25.0  # and loading, of a sharpness
PER_PRODUCT = 1.6  # and batch of 8 x 192 tokens
PRODUCTS = 15  # of 30: an allowance
PER_RUN = 3.0  # of the comparison, for its intruders
PER_PAIR = 0.0018  # seen in training
SLOWER = 1.2  # than LoRA: an allowance for the mean arm, not measured
MAX_HOURS = 4.5


class Row(NamedTuple):
  """The measurements of one kind."""

  measure: str
  number: float
  seconds: float  # of one


def planned_rows(sizes: Sizes, arms: Sequence[str]) -> list[Row]:
  """Returns the measurements of some arms; capacity as if no arm stopped early."""
  products = 2 * PRODUCTS * sizes.num_batches * PER_PRODUCT
  codes = capacity_arms(arms)
  runs = len(codes) * (2 + len(sizes.pairs))
  seconds = LOADING + PER_PAIR * seen_pairs(sizes, arms) / max(runs, 1)
  return [
    Row("sharpness", len(plan_sharpness(sizes, arms)), SLOWER * (COMPILING + products)),
    Row("intruders", len(arms) * len(sizes.comparison.seeds), PER_RUN),
    Row("capacity", runs, SLOWER * seconds),
  ]


def hours(rows: Sequence[Row]) -> float:
  """Returns the hours of all rows on 2 CPU cores."""
  return sum(row.number * row.seconds for row in rows) / 3600


def plan(sizes: Sizes, arms: Sequence[str]) -> str:
  """Returns the table of planned measurements with their hours, in Markdown."""
  rows = planned_rows(sizes, arms)
  table = [["measure", "measurements", "seconds each", "hours"]]
  for row in rows:
    time = f"{row.number * row.seconds / 3600:.1f}"
    table.append([row.measure, f"{row.number:.0f}", f"{row.seconds:.0f}", time])
  table.append(["all", f"{sum(row.number for row in rows):.0f}", "", f"{hours(rows):.1f}"])
  return f"{aligned(table)}\n\n{len(arms)} of {len(ARMS)} arms, on the embedded base model."
