"""The tables of a study of subspaces, in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.analysis.subspaces.figures import FIGURES, middle, shared_kinds, short
from experiments.analysis.subspaces.runs import KINDS, TRAINED, Study, Trained
from experiments.configs.subspaces import ROUNDING
from experiments.harness.table import aligned
from lora_jax.analysis import (
  Amplification,
  amplification,
  projected_norm,
  random_projected_norm,
  random_similarity,
  random_similarity_deviation,
  similarity,
)

SPACES = {"a": "A", "b": "B", "inputs": "delta, inputs", "outputs": "delta, outputs"}
PAPER_7 = (  # Hu et al. 2021 (arXiv 2106.09685v2), Table 7: W_q of layer 48 of GPT-3, norm 61.95
  ["rank", "ΔW", "along ΔW", "along W", "along random", "amplification, ΔW / along ΔW"],
  ["4", "6.91", "0.32", "21.67", "0.02", "21.6"],
  ["64", "3.57", "1.90", "37.71", "0.33", "1.9"],
)


class Comparison(NamedTuple):
  """Two runs whose subspaces are compared, and what the comparison is called."""

  name: str
  first: Trained
  second: Trained


def markdown(study: Study, figures: Mapping[str, Path], status: str) -> str:
  """Returns the page: runs, similarities, Table 7, noise floor, and what is missing."""
  parts = [f"Status of all values and figures of these runs: {status}."]
  parts += [_runs(study), *_similarities(study), *_amplifications(study), *_noise(study)]
  parts += [f"![Figure {name}]({path.name})" for name, path in figures.items()]
  parts.append("\n".join(_missing(study, figures)))
  parts += [
    "The paper's Table 7, for GPT-3 175B: another model, data and scale, whose norms cannot be "
    "compared with those above.",
    aligned(PAPER_7),
  ]
  return "\n\n".join(part for part in parts if part)


def status_of(study: Study) -> str:
  """Returns the status of all values: another base model than the paper's, and which."""
  model = Path(study.high.config.model.folder or "embedded GPT-2").name
  size = study.high.result["base_parameters"]
  return f"another base, {model} ({size / 1e6:.1f} M parameters)"


def _runs(study: Study) -> str:
  table = [["run", "training", "rank", "seed", "learning rate", "examples", "nats/token"]]
  runs = [*study.rows, *([study.second] if study.second else [])]
  for run in runs:
    config = run.config
    cells = [run.kind, f"{run.rank}", f"{config.seed}", f"{config.optimizer.learning_rate:g}"]
    cells += [f"{run.result['num_train_records']:,}", f"{run.result['valid_loss']:.4f}"]
    table.append([run.folder.name, *cells])
  origin = {
    name: {run.result.get(name, "") for run in runs} for name in ("device", "jax", "commit")
  }
  lines = [f"{name} {', '.join(sorted(values))}" for name, values in origin.items()]
  return f"{aligned(table)}\n\n{'; '.join(lines)}."


def _similarities(study: Study) -> Iterator[str]:
  comparisons = [
    Comparison(f"r = {other.rank} and r = {study.high.rank}, one seed", other, study.high)
    for other in (study.low,)
    if other is not None
  ]
  if study.second is not None:
    name = f"two seeds, r = {study.high.rank}"
    comparisons.append(Comparison(name, study.high, study.second))
  table = [
    ["compared", "weight", "of", "φ(1, 1)", "random", "φ(1, r)", "random", "φ(r', r)", "random"]
  ]
  for comparison in comparisons:
    for kind in shared_kinds(comparison.first, comparison.second, KINDS):
      for space, name in SPACES.items():
        table.append([comparison.name, kind, name, *_phi_cells(comparison, kind, space)])
  if len(table) > 1:
    yield (
      "Similarity of subspaces (Figures 3, 4, 6 and 7): mean over the layers (smallest to "
      "largest), beside the mean of random subspaces ± the standard deviation of one layer. r' and "
      "r are the smaller and the larger rank."
    )
    yield aligned(table)
    yield "\n".join(_claims(comparisons))


def _phi_cells(comparison: Comparison, kind: str, space: str) -> list[str]:
  first, second = (
    getattr(run.subspaces[kind], space) for run in (comparison.first, comparison.second)
  )
  phi = similarity(first, second)
  size = (first.shape[-2], *phi.shape[-2:])
  mean, deviation = random_similarity(*size), random_similarity_deviation(*size)
  cells = []
  for i, j in ((0, 0), (0, -1), (-1, -1)):
    cells += [_spread(phi[:, i, j], ".3f"), f"{mean[i, j]:.3f} ± {deviation[i, j]:.3f}"]
  return cells


def _claims(comparisons: Sequence[Comparison]) -> Iterator[str]:
  """Yields for how many layers the first directions are shared, as the paper says of GPT-3."""
  for comparison in comparisons:
    for kind in shared_kinds(comparison.first, comparison.second):
      first, second = (run.subspaces[kind].a for run in (comparison.first, comparison.second))
      phi = similarity(first, second)[:, 0, 0]
      dim = first.shape[-2]
      limit = random_similarity(dim, 1, 1) + 3 * random_similarity_deviation(dim, 1, 1)
      yield (
        f"- {comparison.name}, A of {kind}: φ(1, 1) is above 0.5 in {(phi > 0.5).sum()} of "
        f"{len(phi)} layers, and above random by more than 3 standard deviations in "
        f"{(phi > limit.item()).sum()}."
      )


def _amplifications(study: Study) -> Iterator[str]:
  head = ["weight", "training", "rank", "W", "ΔW", "along ΔW", "along W", "along random"]
  table = [[*head, "amplification", "by random directions", "amplification, all layers"]]
  factors: dict[tuple[str, int, str], Float[np.ndarray, " layers"]] = {}
  for kind in KINDS:
    for run in study.rows:
      if kind in run.subspaces:
        row = amplification(run.weights(kind), run.subspaces[kind])
        factors[kind, run.rank, run.kind] = row.factor
        table.append([kind, run.kind, f"{run.rank}", *_amplification_cells(row)])
  spaces = next(iter(study.high.subspaces.values()))
  layer = short(spaces, middle(len(spaces.names)))
  yield (
    f"Table 7 for layer {layer}: Frobenius norms, and the amplification factor ‖ΔW‖ / ‖UᵀWV‖, "
    "also of all layers as median (smallest to largest). *Along* is the norm of the weight in the "
    "first r directions of inputs and outputs of ΔW, of W itself, or random ones (root mean "
    "square). *By random directions* is the factor that a ΔW of the same norm has in random ones."
  )
  yield aligned(table)
  if len(compared := _null_table(factors)) > 1:
    yield "Layers in which training amplifies more than a null does:"
    yield aligned(compared)


def _amplification_cells(row: Amplification) -> list[str]:
  layer, factor = middle(len(row.weight)), row.factor
  norms = [f"{values[layer]:.3g}" for values in row]
  factors = [f"{x[layer]:.3g}" for x in (factor, row.delta / row.along_random)]
  return [*norms, *factors, _spread(factor, ".3g", np.median)]


def _null_table(
  factors: Mapping[tuple[str, int, str], Float[np.ndarray, " layers"]],
) -> list[list[str]]:
  """Returns the rows of a table: for how many layers training amplifies more than each null."""
  table = [["weight", "rank", "null", "layers"]]
  for (kind, rank, training), null in factors.items():
    real = factors.get((kind, rank, TRAINED))
    if training != TRAINED and real is not None:
      count = f"{(real > null).sum()} of {len(real)}"
      table.append([kind, f"{rank}", training, count])
  return table


def _noise(study: Study) -> Iterator[str]:
  run = study.high
  head = ["weight", "error / W", "ΔW / W", "error along ΔW", "random", "ΔW / error along ΔW"]
  table = [head]
  for kind in KINDS:
    if kind not in run.subspaces:
      continue
    spaces, weights, errors = run.subspaces[kind], run.weights(kind), run.rounding_errors(kind)
    if not errors.any():
      yield f"No noise floor: the weights of {kind} are values of {ROUNDING} already."
      continue
    norm, error = (np.linalg.norm(x, axis=(-2, -1)) for x in (weights, errors))
    along = projected_norm(errors, spaces.inputs, spaces.outputs)
    cells = [_spread(x, ".3g") for x in (error / norm, spaces.norm / norm, along)]
    cells += [_spread(random_projected_norm(errors, run.rank), ".3g")]
    table.append([kind, *cells, _spread(spaces.norm / along, ".3g")])
  if len(table) > 1:
    yield (
      f"Noise floor: the error of rounding the base model's weights to {ROUNDING}, its norm in the "
      f"directions of ΔW (r = {run.rank}) and in random ones; mean over the layers (smallest to "
      "largest)."
    )
    yield aligned(table)


def _spread(values: Float[np.ndarray, " layers"], form: str, centre=np.mean) -> str:
  return f"{centre(values):{form}} ({values.min():{form}} to {values.max():{form}})"


def _missing(study: Study, figures: Mapping[str, Path]) -> Iterator[str]:
  """Yields a line for each part that lacks a run."""
  absent = [f"Figure {name}" for name in FIGURES if name not in figures]
  if study.low is None:
    yield "- No run of a smaller rank and the same seed."
  if study.second is None:
    yield f"- No run of rank {study.high.rank} and another seed."
  kinds = {run.kind for run in study.nulls}
  if len(kinds) < 2:
    yield f"- Nulls: {', '.join(sorted(kinds)) or 'none'}, of two kinds."
  if study.unused:
    yield f"- Not compared: {', '.join(str(run.folder) for run in study.unused)}."
  if absent:
    yield f"- Not drawn: {', '.join(absent)}."
