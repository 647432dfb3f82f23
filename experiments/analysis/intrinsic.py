"""Intrinsic dimension by the base model's pretraining (Aghajanyan et al. 2020, arXiv 2012.13255).

d90 is the smallest random subspace in which training reaches 90 % of full fine-tuning's gain. The
gain is that of the validation loss here, since it has no floor as accuracy has:

    share(dim) = (loss of the base model - loss at dim) / (loss of the base model - loss of all)
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.comparison.plan import CPU_SECONDS, FIXED, PER_LINE, PER_VALID_LINE
from experiments.comparison.runs import check_config
from experiments.configs import Config
from experiments.configs.e2e_budgets import Changes
from experiments.configs.intrinsic_dimension import (
  BASES,
  FULL_RATES,
  SEED,
  SHARE,
  Sizes,
  get_config,
)
from experiments.harness.attempt import has_failed
from experiments.harness.launch import RATE, apply
from experiments.harness.table import aligned
from experiments.harness.workdir import read_result

SLOWER = 1.5  # than LoRA, for drawing the projection in both passes: an allowance, not measured
FROZEN, WHOLE = "frozen_base", "full_finetuning"


def planned_runs(sizes: Sizes, bases: Sequence[str], root: Path) -> dict[str, list[Config]]:
  """Returns the configs of the runs on each base model: its own loss, all weights, subspaces."""
  return {
    base: [
      _config(base, name, changes, sizes, root) for name, changes in _runs(base, sizes).items()
    ]
    for base in bases
  }


def _runs(base: str, sizes: Sizes) -> dict[str, Changes]:
  runs: dict[str, Changes] = {
    FROZEN: {"method": FROZEN},
    WHOLE: {"method": WHOLE, RATE: FULL_RATES[base]},
  }
  for dim in sizes.dims:
    for rate in sizes.rates:
      fields = {"method": "random_subspace", "random_subspace.dim": dim, RATE: rate}
      runs[_name(dim, rate)] = fields
  return runs


def _name(dim: int, rate: float) -> str:
  return f"dim={dim},rate={rate:g}"


def _config(base: str, name: str, changes: Changes, sizes: Sizes, root: Path) -> Config:
  fields = {
    "data.num_train_records": sizes.lines,
    "data.num_valid_records": sizes.valid_lines,
    "seed": SEED,
    "workdir": str(root / base / name),
  }
  return apply(get_config(), {**BASES[base], **changes, **fields})


def run_hours(sizes: Sizes) -> float:
  """Returns the hours of one run on 2 CPU cores with no other work; an estimate."""
  training = FIXED["embedded"] + PER_LINE["embedded"] * sizes.lines
  seconds = SLOWER * training + PER_VALID_LINE["embedded"] * sizes.valid_lines
  return seconds / CPU_SECONDS / 3600


def plan(sizes: Sizes, bases: Sequence[str]) -> str:
  """Returns the table of planned runs with their hours, in Markdown."""
  counts, hours = {base: len(_runs(base, sizes)) for base in bases}, run_hours(sizes)
  table = [["base model", "runs", "examples", "hours"]]
  for base, count in counts.items():
    table.append([base, f"{count}", f"{sizes.lines:,}", f"{count * hours:.1f}"])
  total = sum(counts.values())
  table.append(["all", f"{total}", "", f"{total * hours:.1f}"])
  return f"{aligned(table)}\n\nWith 2 CPU cores and no other work."


class Curve(NamedTuple):
  """The losses on one base model, in nats per token.

  Attributes:
    base: its name.
    frozen, whole: of the base model itself, and after full fine-tuning.
    losses: by the dimension of the subspace and the learning rate.
  """

  base: str
  frozen: float
  whole: float
  losses: dict[int, dict[float, float]]

  @property
  def shares(self) -> dict[int, float]:
    """The shares of full fine-tuning's gain by dimension, at the best learning rate.

    None are defined if it gains nothing.
    """
    gain = self.frozen - self.whole
    if gain <= 0:
      return {}
    return {dim: (self.frozen - min(x.values())) / gain for dim, x in self.losses.items()}

  @property
  def d90(self) -> int | None:
    """The smallest dimension that reaches the share; None if none does."""
    return next((dim for dim, share in sorted(self.shares.items()) if share >= SHARE), None)

  @property
  def unbracketed(self) -> list[int]:
    """The dimensions whose best learning rate is the smallest or largest that was tried."""
    return [
      dim for dim, x in self.losses.items() if min(x, key=lambda rate: x[rate]) in (min(x), max(x))
    ]


def read_curves(sizes: Sizes, bases: Sequence[str], root: Path) -> tuple[list[Curve], list[str]]:
  """Returns the curves of the finished runs, and a line for each base model that lacks some.

  Raises:
    ValueError: if a run had other settings, such as fewer examples.
  """
  curves, missing = [], []
  for base in bases:
    losses = _losses(planned_runs(sizes, [base], root)[base])
    absent = [name for name in _runs(base, sizes) if name not in losses]
    if absent:
      missing.append(f"- {base}: {len(absent)} runs are not finished, such as {absent[0]}.")
    if not {FROZEN, WHOLE} <= losses.keys():
      continue
    by_dim = {
      dim: {rate: losses[n] for rate in sizes.rates if (n := _name(dim, rate)) in losses}
      for dim in sizes.dims
    }
    by_dim = {dim: rates for dim, rates in by_dim.items() if rates}
    curves.append(Curve(base, losses[FROZEN], losses[WHOLE], by_dim))
  return curves, missing


def _losses(configs: Sequence[Config]) -> dict[str, float]:
  """Returns the losses of the runs that are done, by name; infinite if training failed."""
  losses = {}
  for config in configs:
    folder = Path(config.workdir)
    result = read_result(folder)
    if result is not None:
      check_config(folder, config)
      losses[folder.name] = result["valid_loss"]
    elif has_failed(folder):
      losses[folder.name] = math.inf
  return losses


def markdown(curves: Sequence[Curve], missing: Sequence[str]) -> str:
  """Returns the table of shares and d90 by base model."""
  dims = sorted({dim for curve in curves for dim in curve.losses})
  table = [["base model", "frozen", "full fine-tuning", "d90", *(f"share at {d:,}" for d in dims)]]
  for curve in curves:
    cells = [_percent(curve.shares.get(dim)) for dim in dims]
    table.append([curve.base, f"{curve.frozen:.3f}", f"{curve.whole:.3f}", _d90(curve), *cells])
  lines = [
    f"- {curve.base}: no d90 up to {max(curve.losses, default=0):,}: full fine-tuning ends with a "
    f"loss of {curve.whole:.3f}, not below the base model's {curve.frozen:.3f}, and has no gain."
    for curve in curves
    if not curve.whole < curve.frozen
  ]
  lines += [
    f"- {curve.base}: the best learning rate is an end of those tried at "
    f"{', '.join(f'{dim:,}' for dim in curve.unbracketed)}."
    for curve in curves
    if curve.unbracketed
  ]
  status = (
    "Status: *another base*, the embedded GPT-2's shape (6.9 M parameters), on E2E; validation "
    f"loss in nats per token, one seed. d90: the smallest dimension tried with {100 * SHARE:.0f} % "
    "of full fine-tuning's gain."
  )
  return "\n\n".join(
    part for part in (status, aligned(table), "\n".join([*lines, *missing])) if part
  )


def _d90(curve: Curve) -> str:
  if curve.d90 is not None:
    return f"{curve.d90:,}"
  word = "above" if curve.whole < curve.frozen else "none up to"
  return f"{word} {max(curve.losses, default=0):,}"


def _percent(share: float | None) -> str:
  if share is None:
    return ""
  return f"{100 * share:.0f} %" if math.isfinite(share) else "failed"


def draw(path: Path, curves: Sequence[Curve]) -> None:
  """Writes a PNG file of the shares by dimension."""
  figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
  axes = figure.subplots()
  for curve in curves:
    shares = {dim: share for dim, share in curve.shares.items() if math.isfinite(share)}
    if not shares:
      continue
    axes.plot(list(shares), list(shares.values()), "o-", label=curve.base)
  axes.axhline(SHARE, linestyle="--", color="gray", label=f"{100 * SHARE:.0f} %")
  axes.set_xscale("log")
  axes.set_xlabel("dimension of the random subspace")
  axes.set_ylabel("share of full fine-tuning's gain in validation loss")
  axes.set_title("another base: the embedded GPT-2's shape, by pretraining", fontsize="medium")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path)
