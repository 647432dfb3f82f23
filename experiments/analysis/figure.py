"""Draws the measurements: sharpness, learning rates, intruders by threshold, bits by pairs."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.analysis.capacity import BITS
from experiments.analysis.summary import Row
from experiments.configs.mechanism import THRESHOLDS, Sizes

SHARPNESS = "largest Hessian eigenvalue"
MARKERS = "os^Dv<>Ph"


def draw(path: Path, sizes: Sizes, rows: Sequence[Row]) -> None:
  """Writes a PNG file with a panel for each measurement that some arm has.

  Raises:
    ValueError: if no arm has any.
  """
  with_rates = [row for row in rows if row.has_sharpness and row.rate is not None]
  kinds: list[tuple[Sequence[Row], Callable[[Sequence[Row], Axes], None]]] = [
    ([row for row in rows if row.has_sharpness], partial(_sharpness, sizes)),
    (with_rates, _rates),
    ([row for row in rows if row.intruders], _intruders),
    ([row for row in rows if row.capacity], _capacity),
  ]
  kinds = [(members, fill) for members, fill in kinds if members]
  if not kinds:
    raise ValueError("there is nothing to draw: no measurement is finished yet")
  figure = Figure(figsize=(7 * len(kinds), 6), dpi=100, layout="constrained")
  panels = figure.subplots(1, len(kinds), squeeze=False)[0]
  for (members, fill), axes in zip(kinds, panels, strict=True):
    axes.grid(alpha=0.3)
    fill(members, axes)
  figure.savefig(path)


def _sharpness(sizes: Sizes, rows: Sequence[Row], axes: Axes) -> None:
  moments = {"start": ("o", "at the start"), "later": ("x", f"after {sizes.num_steps} steps")}
  for moment, (marker, name) in moments.items():
    values = [row.at(moment)["sharpness"] for row in rows]
    axes.plot(values, range(len(rows)), marker, label=name)
  axes.set_xscale("symlog", linthresh=1e-3)
  axes.set_yticks(range(len(rows)), [row.label for row in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel(SHARPNESS)
  axes.legend()


def _rates(rows: Sequence[Row], axes: Axes) -> None:
  for row in rows:
    value, rate = row.at("start")["sharpness"], row.rate
    assert rate is not None
    axes.plot([value], [rate], "o", color="tab:blue")
    axes.annotate(row.label, (value, rate), textcoords="offset points", xytext=(4, 4), fontsize=8)
  axes.set_xscale("symlog", linthresh=1e-3)
  axes.set_yscale("log")
  axes.set_xlabel(f"{SHARPNESS} at the start")
  axes.set_ylabel("best learning rate")


def _intruders(rows: Sequence[Row], axes: Axes) -> None:
  for number, row in enumerate(rows):
    counts = np.array([row.mean("intruders", str(threshold)) for threshold in THRESHOLDS], float)
    axes.plot(THRESHOLDS, counts, **_style(number, row))
  axes.set_xlabel("threshold of the |cosine|")
  axes.set_ylabel("intruder dimensions, all linear weights")
  axes.legend(fontsize=7, ncols=2)


def _capacity(rows: Sequence[Row], axes: Axes) -> None:
  for number, row in enumerate(rows):
    parameters = next(iter(row.capacity.values()))["parameters"]
    given = [pairs * BITS / parameters for pairs in row.capacity]
    axes.plot(
      given, [r["bits_per_parameter"] for r in row.capacity.values()], **_style(number, row)
    )
  limit = min(axes.get_xlim()[1], axes.get_ylim()[1])
  axes.plot([0, limit], [0, limit], ":", color="gray", label="all remembered")
  axes.set_xlabel("bits of the codes, per trained parameter")
  axes.set_ylabel("bits remembered, per trained parameter")
  axes.legend(fontsize=7, ncols=2)


def _style(number: int, row: Row) -> dict[str, Any]:
  marker = MARKERS[number % len(MARKERS)]
  return {"color": colormaps["tab20"](number % 20), "marker": marker, "label": row.label}
