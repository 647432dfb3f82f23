"""Puts the measurements of all arms into one table."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.analysis.capacity import bits_of, capacity_arms, curve, is_saturated
from experiments.analysis.records import Record
from experiments.analysis.sharpness import plan_sharpness
from experiments.comparison.plan import best_rate, bracketed, label
from experiments.comparison.runs import rate_losses
from experiments.configs.mechanism import MAIN_THRESHOLD, NUM_VECTORS, Sizes
from experiments.configs.variants import ARMS
from experiments.harness.methods import find_method
from experiments.harness.table import aligned
from lora_jax.metrics.glue import spearman

MAIN = str(MAIN_THRESHOLD)


class Row(NamedTuple):
  """What is known of an arm; None or empty where it is not measured.

  Attributes:
    arm: its name.
    rate: the best learning rate that the comparison has found, if it is bracketed.
    sharpness: the record; its training may have failed.
    intruders: records of the runs, one for each seed.
    capacity: the records with the most bits, by the number of pairs.
  """

  arm: str
  rate: float | None
  sharpness: Record | None
  intruders: list[Record]
  capacity: dict[int, Record]

  @property
  def label(self) -> str:
    return label(self.arm)

  @property
  def has_sharpness(self) -> bool:
    return self.sharpness is not None and self.sharpness["status"] == "finished"

  def at(self, moment: str) -> dict[str, Any]:
    """Returns the sharpness at `start` or `later`; only if `has_sharpness`."""
    assert self.sharpness is not None
    return self.sharpness[moment]

  def mean(self, *keys: str) -> float | None:
    """Returns a field of the records of intruders, averaged over the seeds."""
    values = [record[keys[0]] for record in self.intruders]
    values = [value[keys[1]] if keys[1:] else value for value in values]
    return float(np.mean(values)) if values else None

  @property
  def bits(self) -> float | None:
    return max(map(bits_of, self.capacity.values())) if self.capacity else None

  @property
  def bits_per_parameter(self) -> float | None:
    if not self.capacity:
      return None
    return max(record["bits_per_parameter"] for record in self.capacity.values())


def best_rates(sizes: Sizes, records: Sequence[Record]) -> dict[str, float]:
  """Returns the comparison's best learning rate of each arm for which it is bracketed."""
  losses = rate_losses(records, "rates")
  settled = bracketed("rates", sizes.comparison, losses)
  return {arm: rate for arm in settled if (rate := best_rate(losses[arm])) is not None}


def summarize(
  sizes: Sizes, arms: Sequence[str], records: Sequence[Record], compared: Sequence[Record]
) -> list[Row]:
  """Returns a row for each arm.

  Args:
    sizes: of the measurements; records of other sizes are left out.
    arms: of the comparison.
    records: of the measurements.
    compared: the comparison's records.
  """
  rates = best_rates(sizes, compared)
  sharpness = {planned.arm: planned.find(records) for planned in plan_sharpness(sizes, arms)}
  finished = [record for record in records if record["status"] == "finished"]
  measured = set(capacity_arms(arms))
  return [
    Row(
      arm,
      rates.get(arm),
      sharpness.get(arm),
      _latest(r for r in finished if (r["measure"], r["arm"]) == ("intruders", arm)),
      curve(sizes, arm, records) if arm in measured else {},
    )
    for arm in arms
  ]


def _latest(intruders: Iterable[Record]) -> list[Record]:
  """Returns the last record of each run: a run that was made again replaces that in its folder."""
  return list({record["settings"]["run"]: record for record in intruders}.values())


def markdown(sizes: Sizes, rows: Sequence[Row], records: Sequence[Record]) -> str:
  """Returns the table, what follows from it, and what is missing, in Markdown."""
  full = next((row for row in rows if find_method(ARMS[row.arm].method).owns_base), None)
  parts = [_table(sizes, rows, full), *_statements(rows), "\n".join(_missing(sizes, rows))]
  parts.append(_provenance(records))
  return "\n\n".join(part for part in parts if part)


def _table(sizes: Sizes, rows: Sequence[Row], full: Row | None) -> str:
  head = ["arm", "sharpness at the start", f"after {sizes.num_steps} steps", "mostly along"]
  head += [
    "best learning rate",
    "intruders",
    "minus full fine-tuning's",
    "effective rank",
    "change",
  ]
  head += ["bits", "bits/parameter"]
  return aligned([head, *(_cells(sizes, row, full) for row in rows)])


def _cells(sizes: Sizes, row: Row, full: Row | None) -> list[str]:
  cells = [row.label]
  if row.has_sharpness:
    shares = row.at("start")["shares"]
    name = max(shares, key=lambda name: shares[name])
    cells += [_eigenvalue(row.at("start")), _eigenvalue(row.at("later"))]
    cells.append(f"{name} {100 * shares[name]:.0f} %")
  else:
    cells += ["failed" if row.sharpness else "", "", ""]
  intruders, whole = row.mean("intruders", MAIN), full.mean("intruders", MAIN) if full else None
  cells += [
    _number(row.rate, "g"),
    ""
    if intruders is None
    else f"{intruders:.1f} of {NUM_VECTORS * (row.mean('weights') or 0):.0f}",
    "" if intruders is None or whole is None else f"{intruders - whole:+.1f}",
    _number(row.mean("effective_rank"), ".1f"),
    _number(row.mean("relative_change"), ".3f"),
  ]
  bits = [record["bits"] for record in row.capacity.values()]
  cells.append(_number(row.bits, ",.0f") + ("" if not bits or is_saturated(sizes, bits) else "+"))
  return [*cells, _number(row.bits_per_parameter, ".2f")]


def _eigenvalue(result: dict[str, Any]) -> str:
  return f"{result['sharpness']:.3g} ± {result['residual']:.1g}"


def _number(value: float | None, form: str) -> str:
  return "" if value is None else f"{value:{form}}"


def _statements(rows: Sequence[Row]) -> Iterator[str]:
  both = [row for row in rows if row.has_sharpness and row.rate is not None]
  if len(both) > 2:
    values, rates = [row.at("start")["sharpness"] for row in both], [row.rate for row in both]
    yield (
      f"Spearman's correlation of the sharpness at the start and the best learning rate, over "
      f"{len(both)} arms: {spearman(np.array(values), np.array(rates)):+.2f}."
    )
  if any(row.capacity for row in rows):
    yield "+ marks bits that were still growing with the pairs."


def _missing(sizes: Sizes, rows: Sequence[Row]) -> Iterator[str]:
  """Yields a line for each kind of value that some arms lack, with the command that makes it."""
  arms = [row.arm for row in rows]
  command = "python -m experiments.mechanism --measure="
  stage = "python -m experiments.variants --stage="
  wanted = {planned.arm for planned in plan_sharpness(sizes, arms)}
  measured = set(capacity_arms(arms))
  lists = {
    f"Sharpness not measured yet ({command}sharpness)": [
      row for row in rows if row.arm in wanted and row.sharpness is None
    ],
    f"No bracketed learning rate yet ({stage}rates)": [row for row in rows if row.rate is None],
    f"No runs with intruders measured yet ({stage}seeds, then {command}intruders)": [
      row for row in rows if not row.intruders
    ],
    f"Capacity not measured yet ({command}capacity)": [
      row for row in rows if row.arm in measured and not row.capacity
    ],
    "No sharpness of their own: their first cycle starts as LoRA does": [
      row for row in rows if row.arm not in wanted
    ],
    "Left out of capacity (docs/mechanism.md)": [row for row in rows if row.arm not in measured],
  }
  for title, missing_rows in lists.items():
    if missing_rows:
      yield f"- {title}: {', '.join(row.label for row in missing_rows)}."


def _provenance(records: Sequence[Record]) -> str:
  if not records:
    return ""
  parts = [
    f"{name} {', '.join(sorted({record[key] for record in records}))}"
    for name, key in (("devices:", "device"), ("JAX", "jax"), ("commits", "commit"))
  ]
  hours = math.fsum(record["seconds"] for record in records) / 3600
  return f"{len(records)} measurements, {hours:.2f} hours; {'; '.join(parts)}."
