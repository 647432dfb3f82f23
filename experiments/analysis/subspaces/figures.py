"""Figures 3, 4, 6, 7 and 8: similarities of subspaces, each beside its excess over random ones.

i counts the first directions of the one named first, downwards; j those of the other.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from experiments.analysis.subspaces.runs import KINDS, SHUFFLED, Study, Trained
from experiments.configs.subspaces import NUM_LAYERS, ROUNDING, WEIGHT_SHARE
from lora_jax.analysis import Subspaces, directions, random_similarity, similarity

SHOWN = KINDS[:2]
Phi = Float[np.ndarray, "rank1 rank2"]


class Panel(NamedTuple):
  """One similarity: a heat map of phi, and one of its excess over random directions."""

  title: str
  phi: Phi
  dim: int

  @property
  def excess(self) -> Phi:
    return self.phi - random_similarity(self.dim, *self.phi.shape)


def draw_figures(study: Study, folder: Path, status: str) -> dict[str, Path]:
  """Writes the figures that the runs allow, as PNG files; returns their paths by name.

  Args:
    study: the runs.
    folder: of the files.
    status: of their values, for the titles.
  """
  written = {}
  for name, (title, make) in FIGURES.items():
    if rows := make(study):
      path = folder / f"figure_{name}.png"
      _draw(path, f"Figure {name}: {title}\n{status}", rows)
      written[name] = path
  return written


def middle(count: int) -> int:
  """Returns the index of the layer that single-layer figures show: 48 of 96, as the paper."""
  return count // 2


def spread(count: int) -> list[int]:
  """Returns the indices of some layers from the first to the last one, evenly spaced.

  >>> spread(6), spread(2)
  ([0, 2, 3, 5], [0, 1])
  """
  return sorted({round(x) for x in np.linspace(0, count - 1, NUM_LAYERS)})


def short(spaces: Subspaces, layer: int) -> str:
  """Returns the name of a layer without what all of them have: `h_3` or `h[3]`."""
  path, _, index = spaces.names[layer].partition("[")
  return path.split("/attn/")[0] + (f"[{index}" if index else "")


def shared_kinds(first: Trained, second: Trained, kinds: Sequence[str] = SHOWN) -> list[str]:
  """Returns the kinds of weights that two runs adapt."""
  return [kind for kind in kinds if kind in first.subspaces and kind in second.subspaces]


def _by_layer(first: Trained | None, second: Trained | None) -> list[list[Panel]]:
  """Returns the similarities of two runs' A, of each kind of weight, by layer."""
  if first is None or second is None:
    return []
  kinds = []
  for kind in shared_kinds(first, second):
    left, right = first.subspaces[kind], second.subspaces[kind]
    phi, dim = similarity(left.a, right.a), left.a.shape[-2]
    kinds.append([Panel(f"{kind}, {short(left, i)}", phi[i], dim) for i in range(len(phi))])
  return kinds


def _ranks(study: Study) -> list[list[Panel]]:
  panels = [layers[middle(len(layers))] for layers in _by_layer(study.low, study.high)]
  zooms = [Panel(f"{p.title}, j ≤ {len(p.phi)}", p.phi[:, : len(p.phi)], p.dim) for p in panels]
  return [[*panels, *zooms]] if panels else []


def _seeds(study: Study) -> list[list[Panel]]:
  panels = [layers[middle(len(layers))] for layers in _by_layer(study.high, study.second)]
  if not panels:
    return []
  rank, dim = panels[0].phi.shape[0], panels[0].dim
  gaussian = directions(np.random.default_rng(0).normal(size=(2, dim, rank)))
  return [[*panels, Panel("two Gaussian matrices", similarity(*gaussian), dim)]]


def _ranks_by_layer(study: Study) -> list[list[Panel]]:
  return _some_layers(_by_layer(study.low, study.high))


def _seeds_by_layer(study: Study) -> list[list[Panel]]:
  return _some_layers(_by_layer(study.high, study.second))


def _some_layers(kinds: list[list[Panel]]) -> list[list[Panel]]:
  return [[layers[i] for i in spread(len(layers))] for layers in kinds]


def _with_weight(study: Study) -> list[list[Panel]]:
  """Returns the similarities of the query weight's first directions with those of deltas."""
  kind = KINDS[0]
  if kind not in study.high.subspaces:
    return []
  count = len(study.high.subspaces[kind].names)
  layer, weights = middle(count), study.high.weights(kind)
  first = directions(weights[layer])[:, : ceil(WEIGHT_SHARE * weights.shape[1])]
  rank, dim = study.high.subspaces[kind].inputs.shape[-1], first.shape[0]
  others = {f"delta, r = {run.rank}": run for run in (study.low, study.high) if run is not None}
  others |= {f"{SHUFFLED}, r = {r.rank}": r for r in study.nulls if r.kind == SHUFFLED}
  named = {
    name: run.subspaces[kind].inputs[layer] for name, run in others.items() if kind in run.subspaces
  }
  named["random directions"] = directions(np.random.default_rng(0).normal(size=(dim, rank)))
  errors = study.high.rounding_errors(kind)[layer]
  if errors.any():
    named[f"rounding error of {ROUNDING}"] = directions(errors)[:, :rank]
  return [[Panel(name, similarity(first, u), dim) for name, u in named.items()]]


FIGURES: dict[str, tuple[str, Callable[[Study], list[list[Panel]]]]] = {
  "3": ("A of the smaller rank (i) and of the larger one (j), same seed", _ranks),
  "4": ("A of two seeds of the larger rank (i and j)", _seeds),
  "6": ("Figure 3 for more layers", _ranks_by_layer),
  "7": ("Figure 4 for more layers", _seeds_by_layer),
  "8": ("first directions of the query weight (i) and of the delta's inputs (j)", _with_weight),
}


def _draw(path: Path, title: str, rows: Sequence[Sequence[Panel]]) -> None:
  """Writes a PNG file: for each row of panels, one row of phi and one of its excess."""
  columns = max(map(len, rows))
  figure = Figure(figsize=(3.2 * columns + 0.8, 4.8 * len(rows) + 0.7), layout="constrained")
  figure.suptitle(title, fontsize="medium")
  grid = figure.subplots(2 * len(rows), columns, squeeze=False)
  limit = max(np.abs(panel.excess).max() for row in rows for panel in row)
  styles = (
    {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0},
    {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit},
  )
  labels = ("φ(i, j)", "φ(i, j) - max(i, j) / d")
  for number, row in enumerate(rows):
    for which, (style, label) in enumerate(zip(styles, labels, strict=True)):
      line = grid[2 * number + which]
      image = None
      for axes, panel in zip(line, row, strict=False):
        image = _heat_map(axes, panel.excess if which else panel.phi, style)
        axes.set_title(panel.title, fontsize="small")
      for axes in line[len(row) :]:
        axes.set_axis_off()
      line[0].set_ylabel("i")
      assert image is not None, "a row has panels"
      figure.colorbar(image, ax=list(line), label=label, pad=0.01)
  figure.savefig(path, dpi=100)


def _heat_map(axes: Axes, values: Phi, style: Mapping[str, Any]) -> AxesImage:
  rows, columns = values.shape
  edges = (0.5, columns + 0.5, rows + 0.5, 0.5)
  image = axes.imshow(values, extent=edges, aspect="auto", interpolation="nearest", **style)
  for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
    step = ceil(count / 5)
    axis.set_ticks(sorted({1, *range(step, count + 1, step)}))
  axes.set_xlabel("j")
  return image
