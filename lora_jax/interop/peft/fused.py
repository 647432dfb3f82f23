"""Builds the arrays of another package's modules from those of our leaves that are their parts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.adapters.delta import (
  LoraWeight,
)
from lora_jax.axes import LoraAxes
from lora_jax.interop.peft.modules import Module, has_values, values_of
from lora_jax.variants.dora import column_norm_squared


@dataclasses.dataclass(frozen=True)
class Fused:
  """One module's arrays: its delta is `alpha / rank * b @ a`; and DoRA's magnitude.

  Attributes:
    a: (rank, in), of stacked experts (experts, rank, in).
    b: (out, rank), of stacked experts (experts, out, rank).
    alpha: of the module.
    magnitude: (out,); None for LoRA.
  """

  a: np.ndarray
  b: np.ndarray
  alpha: float
  magnitude: np.ndarray | None = None

  @property
  def rank(self) -> int:
    return self.a.shape[-2]

  @property
  def scaling(self) -> float:
    return self.alpha / self.rank

  def with_rank(self, rank: int, alpha: float) -> "Fused":
    """Returns an equivalent padded with zeros to a rank; B is rescaled if alpha asks for it."""
    more, experts = (0, rank - self.rank), [(0, 0)] * (self.a.ndim - 2)
    factor = self.scaling * rank / alpha
    b = self.b if math.isclose(factor, 1) else self.b * np.float32(factor)
    a, b = np.pad(self.a, (*experts, more, (0, 0))), np.pad(b, (*experts, (0, 0), more))
    return dataclasses.replace(self, a=a, b=b, alpha=alpha)


def with_one_rank(fused: Mapping[Module, Fused], alpha: float) -> dict[Module, Fused]:
  """Returns equivalents of one rank and one alpha, padded with zeros.

  Args:
    fused: the arrays of the adapted modules.
    alpha: to which B is rescaled where modules have different scalings.
  """
  rank = max(joined.rank for joined in fused.values())
  scalings = {joined.scaling for joined in fused.values()}
  alpha = scalings.pop() * rank if len(scalings) == 1 else alpha
  return {module: joined.with_rank(rank, alpha) for module, joined in fused.items()}


def fused_arrays(
  module: Module,
  weights: Mapping[str, LoraWeight],
  scalings: Mapping[str, float],
  leaves: Mapping[str, Any],
  use_dora: bool,
) -> Fused | None:
  """Returns the arrays of a module from those of its parts; None if none is adapted.

  Args:
    module: of the other package.
    weights: the adapted weights, by path.
    scalings: by path.
    leaves: of the base model, or their shapes.
    use_dora: whether the weights are adapted by DoRA.
  Raises:
    ValueError: if there is no format for the axes, or it needs |W| of a part that is not adapted
      and its leaf is a shape.
  """
  parts = [_of_place(weights.get(path), module) for path in module.stored.paths]
  if all(part is None for part in parts):
    return None
  used = [scalings[p] for p, part in zip(module.stored.paths, parts, strict=True) if part]
  scaling = used[0] if len(set(used)) == 1 else 1.0
  factors: list[np.ndarray] = []  # the different As
  blocks: list[np.ndarray] = []  # of B, (out, rank of that A)
  offsets = np.cumsum([0, *module.outputs])
  for path, part, start in zip(module.stored.paths, parts, offsets, strict=False):
    if part is None:
      continue
    a, b = part.a, part.b
    b = b if scaling == scalings[path] else b * np.float32(scalings[path])
    same = (i for i, other in enumerate(factors) if np.array_equal(other, a))
    place = next(same, None)
    if place is None:
      place = len(factors)
      factors.append(a)
      zeros = np.zeros((*module.experts, sum(module.outputs), a.shape[-2]), np.float32)
      blocks.append(zeros)
    blocks[place][..., start : start + b.shape[-2], :] = b
  a, b = np.concatenate(factors, axis=-2), np.concatenate(blocks, axis=-1)
  magnitude = _magnitude(module, parts, leaves) if use_dora else None
  return Fused(a, b, scaling * a.shape[-2], magnitude)


class _Part(NamedTuple):
  """The arrays of one part of a module; `magnitude` is None for LoRA."""

  a: np.ndarray  # (..., rank, in)
  b: np.ndarray  # (..., out, rank)
  magnitude: np.ndarray | None  # (out,)


def check_order(weight: LoraWeight) -> None:
  """Raises ValueError if a weight's outputs precede its inputs."""
  if weight.axes.inputs > weight.axes.outputs:
    raise ValueError(f"other packages have no format for factors with axes {weight.axes}")


def _of_place(weight: LoraWeight | None, module: Module) -> _Part | None:
  """Returns a weight's arrays of the module's layer or expert; None if it is not adapted."""
  if weight is None:
    return None
  check_order(weight)
  arrays = {name: np.asarray(array, np.float32) for name, array in weight.arrays.items()}
  a, b, magnitude = arrays["lora_a"], arrays["lora_b"], arrays.get("magnitude")
  if module.is_conv:
    return _Part(module.stored.to_file(a).reshape(a.shape[-1], -1), b.T, magnitude)
  place, layers = module.stored.place, weight.layers
  if layers is not None and not place:  # some experts; the others are zero
    some, (a, b) = (a, b), (np.zeros((*module.experts, *x.shape[1:]), np.float32) for x in (a, b))
    a[list(layers)], b[list(layers)] = some
  elif layers is not None:
    if place[0] not in layers:
      return None
    place = (layers.index(place[0]), *place[1:])
  magnitude = None if magnitude is None else magnitude[place]
  return _Part(a[place].swapaxes(-1, -2), b[place].swapaxes(-1, -2), magnitude)


def _magnitude(module: Module, parts: list[_Part | None], leaves: Mapping[str, Any]) -> np.ndarray:
  """Returns a module's magnitude: |W| for the parts that are not adapted.

  B has zeros in the rows of such a part, so that its weight there is the base model's.
  """
  pieces = []
  for path, part in zip(module.stored.paths, parts, strict=True):
    if part is not None:
      pieces.append(part.magnitude)
      continue
    if not has_values(leaves[path]):
      raise ValueError(
        f"{path} is a part of {module.name} there and is not adapted: DoRA needs the norms of "
        "its weight, and params have only its shape. Give real arrays, or adapt it too"
      )
    w = values_of(leaves[path])[module.stored.place]
    pieces.append(np.sqrt(column_norm_squared(w, LoraAxes((), (0,), (1,)))))
  return np.concatenate(pieces)
