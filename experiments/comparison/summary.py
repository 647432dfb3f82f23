"""Makes the tables of the comparison from the records of its runs."""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.comparison.lines import COSTS, Record
from experiments.comparison.plan import FROZEN, STAGES, arms_of, bracketed, label, num_seeds
from experiments.comparison.runs import rate_losses
from experiments.comparison.statistics import (
  Difference,
  compare_losses,
  compare_sums,
  expected_best,
)
from experiments.configs.variants import ARMS, CONTROL, FULL, MARGIN, TOLERANCE, Sizes
from experiments.harness.launch import RATE
from lora_jax.metrics.ngrams import bleu_formula

REPORTED = {"embedded": "seeds", "smollm2": "smollm2"}
RATES = {"embedded": "rates", "smollm2": "smollm2_rates"}


@dataclasses.dataclass
class Row:
  """An arm on one base model; None where nothing was measured.

  Attributes:
    label: of the arm.
    verdict: against the control; or why there is none.
    loss: validation loss, nats per token, mean over the seeds.
    loss_deviation: its sample standard deviation over the seeds.
    seeds: number of seeds.
    difference, low, high: the loss minus the control's, with its simultaneous interval.
    bleu: mean over the seeds.
    bleu_difference, bleu_low, bleu_high: as above.
    wikipedia_loss: nats per token, mean over the seeds.
    forgetting: that minus the base model's.
    parameters: trained at once: of a method with restarts, those of one cycle.
    adapter_bytes: on disk.
    step_seconds, step_ratio, gflop, step_megabytes: of a train step; see costs.py.
    rate: the best learning rate.
    tried: the number of learning rates that were tried.
    runs, failed: of all runs of the arm on this base model.
    failed_share: failed / runs.
    best_of_draws: the smallest loss of all random draws.
  """

  label: str
  verdict: str = ""
  loss: float | None = None
  loss_deviation: float | None = None
  seeds: int = 0
  difference: float | None = None
  low: float | None = None
  high: float | None = None
  bleu: float | None = None
  bleu_difference: float | None = None
  bleu_low: float | None = None
  bleu_high: float | None = None
  wikipedia_loss: float | None = None
  forgetting: float | None = None
  parameters: int | None = None
  adapter_bytes: int | None = None
  step_seconds: float | None = None
  step_ratio: float | None = None
  gflop: float | None = None
  step_megabytes: float | None = None
  rate: float | None = None
  tried: int | None = None
  runs: int = 0
  failed: int = 0
  failed_share: float | None = None
  best_of_draws: float | None = None


@dataclasses.dataclass
class Table:
  """The comparison on one base model.

  Attributes:
    base: embedded or smollm2.
    base_loss, base_wikipedia_loss: of the base model itself, nats per token.
    rows: the control first, then the others by loss.
    detectable, bleu_detectable: the median over the arms of the smallest difference that would be
      detected in 80 % of such experiments.
    rates: validation loss by arm and learning rate; infinite for a failed run.
    effort: by arm, the expected smallest loss of 1, 2, ... random draws.
    missing: by stage, its planned runs that are not done, in words.
  """

  base: str
  base_loss: float | None
  base_wikipedia_loss: float | None
  rows: list[Row]
  detectable: float | None
  bleu_detectable: float | None
  rates: dict[str, dict[float, float]]
  effort: dict[str, list[float]]
  missing: dict[str, str]


@dataclasses.dataclass
class Summary:
  """The tables of all base models with runs, and where the runs were made."""

  tables: list[Table]
  devices: list[str]
  commits: list[str]
  hours: float


def summarize(records: Sequence[Record], sizes: Sizes = FULL) -> Summary:
  """Returns the tables of the records of `runs.collect`.

  Args:
    records: of any part of the runs.
    sizes: of the comparison, for the runs that are missing.
  Raises:
    ValueError: if runs on one base model were evaluated on other inputs, or an arm has several
      reported runs of one seed.
  """
  bases = dict.fromkeys(STAGES[r["stage"]] for r in records if r["stage"] != COSTS)
  tables = [_table(base, [r for r in records if r["base"] == base], sizes) for base in bases]
  seconds = sum(record.get("train_seconds", 0.0) for record in records)

  def distinct(name: str) -> list[str]:
    return sorted({record[name] for record in records if record.get(name)})

  return Summary(tables, distinct("device"), distinct("commit"), seconds / 3600)


def _table(base: str, records: Sequence[Record], sizes: Sizes) -> Table:
  frozen = next((r for r in records if r["arm"] == FROZEN), {})
  by_arm: dict[str, list[Record]] = defaultdict(list)
  for record in records:
    if record["arm"] in ARMS:
      by_arm[record["arm"]].append(record)
  rows = {arm: _row(arm, by_arm[arm], frozen) for arm in ARMS if arm in by_arm}
  reported = {arm: _reported(base, by_arm[arm]) for arm in rows}
  differences, reasons = _compared(rows, reported)
  bleu = _compared_bleu({arm: reported[arm] for arm in (CONTROL, *differences) if arm in reported})
  for arm, row in rows.items():
    row.verdict = reasons.get(arm, "")
    if arm in differences:
      by_loss = differences[arm]
      row.verdict = by_loss.verdict(MARGIN)
      row.difference, row.low, row.high = by_loss.difference, by_loss.low, by_loss.high
    if arm in bleu:
      by_bleu = bleu[arm]
      row.bleu_difference, row.bleu_low, row.bleu_high = (
        by_bleu.difference,
        by_bleu.low,
        by_bleu.high,
      )
  order = sorted(rows, key=lambda arm: (arm != CONTROL, _or_infinite(rows[arm].loss)))
  return Table(
    base,
    frozen.get("valid_loss"),
    frozen.get("wikipedia_loss"),
    [rows[arm] for arm in order],
    _detectable(differences),
    _detectable(bleu),
    {label(arm): losses for arm, losses in rate_losses(records, RATES[base]).items()},
    {label(arm): curve for arm in rows if (curve := _effort(by_arm[arm], frozen))},
    _missing(base, records, sizes),
  )


def _row(arm: str, records: Sequence[Record], frozen: Record) -> Row:
  """Returns an arm's row, without the comparisons."""
  row = Row(label(arm))
  runs = [record for record in records if record["stage"] != COSTS]
  reported = [r for r in runs if r["stage"] in REPORTED.values() and r["status"] == "finished"]
  row.runs, row.failed = len(runs), sum(record["status"] == "failed" for record in runs)
  row.failed_share = row.failed / row.runs if runs else None
  row.tried = len({r["settings"][RATE] for r in runs if r["stage"] in RATES.values()}) or None
  row.parameters = next((n for r in runs if (n := r.get("parameters"))), None)
  row.seeds = len(reported)
  if reported:
    losses = [record["valid_loss"] for record in reported]
    row.loss = float(np.mean(losses))
    row.loss_deviation = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
    row.rate = reported[0]["settings"][RATE]
    row.adapter_bytes = reported[0]["adapter_bytes"]
    row.wikipedia_loss = _mean(record.get("wikipedia_loss") for record in reported)
    row.bleu = _mean(record.get("bleu") for record in reported)
    if row.wikipedia_loss is not None and "wikipedia_loss" in frozen:
      row.forgetting = row.wikipedia_loss - frozen["wikipedia_loss"]
  for costs in (record for record in records if record["stage"] == COSTS):
    row.step_seconds, row.step_ratio = costs["step_seconds"], costs["step_ratio"]
    row.gflop, row.step_megabytes = costs["gflop"], costs["step_megabytes"]
  draws = [r["valid_loss"] for r in runs if r["stage"] == "effort" and r["status"] == "finished"]
  row.best_of_draws = min(draws, default=None)
  return row


def _reported(base: str, records: Iterable[Record]) -> list[Record]:
  return [record for record in records if record["stage"] == REPORTED[base]]


def _compared(
  rows: dict[str, Row], reported: dict[str, list[Record]]
) -> tuple[dict[str, Difference], dict[str, str]]:
  """Returns the differences to the control of the arms that are ranked; of the others, why not."""
  if CONTROL not in rows or not reported[CONTROL]:
    return {}, dict.fromkeys(rows, "not run yet")
  for arm, records in reported.items():
    _check_seeds(arm, records)
  if any(record["status"] == "failed" for record in reported[CONTROL]):
    return {}, dict.fromkeys(rows, "the control failed")
  reasons = {CONTROL: "the control"}
  for arm, row in rows.items():
    failed = sum(record["status"] == "failed" for record in reported[arm])
    wanted, size = rows[CONTROL].parameters, row.parameters
    if not reported[arm]:
      reasons[arm] = "not run yet"
    elif failed:
      reasons[arm] = f"failed with {failed} of {len(reported[arm])} seeds"
    elif not ARMS[arm].is_matched:
      reasons[arm] = "not ranked: its own size"
    elif not wanted or not size or abs(size / wanted - 1) > TOLERANCE:
      share = f" ({size / wanted - 1:+.1%} parameters)" if wanted and size else ""
      reasons[arm] = f"not ranked: no rank fits{share}"
  losses = {
    arm: np.array([record["input_losses"] for record in reported[arm]])
    for arm in rows
    if arm == CONTROL or arm not in reasons
  }
  tokens = {tuple(record["input_tokens"]) for arm in losses for record in reported[arm]}
  if len(tokens) != 1:
    raise ValueError("the runs were evaluated on different inputs: they cannot be compared")
  if len(losses) < 2 or all(len(values) < 2 for values in losses.values()):
    return {}, {**reasons, **{arm: "no second seed" for arm in losses if arm != CONTROL}}
  return compare_losses(losses, np.array(tokens.pop(), float), CONTROL), reasons


def _check_seeds(arm: str, records: Sequence[Record]) -> None:
  """Raises ValueError if an arm was reported twice with one seed, or with two learning rates."""
  seeds = [record["seed"] for record in records]
  rates = sorted({record["settings"][RATE] for record in records})
  if len(set(seeds)) < len(seeds) or len(rates) > 1:
    listed = ", ".join(f"{rate:g}" for rate in rates)
    raise ValueError(
      f"{arm} has reported runs of the seeds {sorted(seeds)} and the learning rates {listed}: "
      "expected one of each seed, all of one learning rate. Remove those of an earlier plan"
    )


def _missing(base: str, records: Sequence[Record], sizes: Sizes) -> dict[str, str]:
  """Returns the planned runs that are not done, in words, by stage."""
  missing = {}
  rates, reported = RATES[base], REPORTED[base]
  settled = bracketed(rates, sizes, rate_losses(records, rates))
  open_arms = [label(arm) for arm in arms_of(rates) if arm not in settled]
  if open_arms:
    missing[rates] = f"the best is not bracketed for {', '.join(open_arms)}"
  wanted = {reported: {arm: num_seeds(reported, arm, sizes) for arm in arms_of(reported)}}
  if base == STAGES["effort"]:
    wanted["effort"] = dict.fromkeys(arms_of("effort"), sizes.draws)
  for stage, runs in wanted.items():
    done = Counter(record["arm"] for record in records if record["stage"] == stage)
    by_count: dict[str, list[str]] = defaultdict(list)
    for arm, count in runs.items():
      if done[arm] < count:
        by_count[f"{done[arm]} of {count} runs"].append(label(arm))
    words = "; ".join(f"{count} of {', '.join(arms)}" for count, arms in by_count.items())
    if words:
      missing[stage] = words
  return missing


def _compared_bleu(reported: dict[str, list[Record]]) -> dict[str, Difference]:
  """Returns the differences of BLEU to the control's, of arms whose losses are compared."""
  rows = {
    arm: np.array([record["bleu_rows"] for record in records if "bleu_rows" in record], float)
    for arm, records in reported.items()
  }
  rows = {arm: values for arm, values in rows.items() if len(values)}
  if CONTROL not in rows or len(rows) < 2 or all(len(values) < 2 for values in rows.values()):
    return {}
  return compare_sums(rows, bleu_formula, CONTROL)


def _effort(records: Iterable[Record], frozen: Record) -> list[float]:
  """Returns the expected smallest loss of 1, 2, ... draws; a failed draw leaves the base model."""
  limit = frozen.get("valid_loss", math.inf)
  losses = [
    record["valid_loss"] if record["status"] == "finished" else limit
    for record in records
    if record["stage"] == "effort"
  ]
  return [expected_best(losses, count) for count in range(1, len(losses) + 1)]


def _detectable(differences: dict[str, Difference]) -> float | None:
  values = [difference.detectable for difference in differences.values()]
  return float(np.median(values)) if values else None


def _mean(values: Iterable[Any]) -> float | None:
  present = [value for value in values if value is not None]
  return float(np.mean(present)) if present else None


def _or_infinite(value: float | None) -> float:
  return math.inf if value is None else value
