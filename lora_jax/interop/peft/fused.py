"""Builds the arrays of another package's modules from those of our leaves that are their parts."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.biases import Bias, find_biases
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import (
  LoraWeight,
  Variant,
  adapter_extra,
  shared_arrays,
  whole_weights,
)
from lora_jax.adapters.targets import Target, find_leaves, shapes
from lora_jax.arithmetic.conversion import same_lora
from lora_jax.axes import LoraAxes
from lora_jax.interop.peft.leaves import Part
from lora_jax.interop.peft.modules import Module, find_modules, has_values, values_of
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.trees import weights_with_path
from lora_jax.variants.dora import DORA, column_norm_squared
from lora_jax.variants.lora import LORA


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


class AdapterParts(NamedTuple):
  """A trained tree that has been checked, and the modules that another package has for it.

  Attributes:
    weights: the adapted weights, by path.
    extra: the fully trained leaves, by path.
    targets: the settings of the adapted weights, by path.
    leaves: of the base model, or their shapes, by path.
    modules: all of the model's, adapted or not.
    tensors: all of the model's.
    shared: the nodes of arrays that all weights share, by path.
    biases: those that are scaled with their weight, by its path.
  """

  weights: dict[str, LoraWeight]
  extra: dict[str, Any]
  targets: dict[str, Target]
  leaves: dict[str, Any]
  modules: list[Module]
  tensors: Sequence[StoredTensor]
  shared: dict[str, LoraWeight]
  biases: dict[str, Bias]

  @property
  def module_names(self) -> list[str]:
    """The names of modules and of their parents, all of which an ending may match."""
    names = [module.name for module in self.modules if not module.stored.is_parameter]
    return list(dict.fromkeys([*names, *(name.rpartition(".")[0] for name in names)]))

  @property
  def adapted(self) -> list[Module]:
    """The modules with an adapted leaf."""
    return [module for module in self.modules if set(module.stored.paths) & set(self.weights)]

  @property
  def trained(self) -> list[Module]:
    """The modules with an adapted or fully trained leaf."""
    paths = {*self.weights, *self.extra}
    return [module for module in self.modules if paths & set(module.stored.paths)]

  def variant_of(self, path: str) -> Variant:
    return self.targets[path].variant or LORA

  def without(self, paths: Collection[str]) -> "AdapterParts":
    """Returns the parts without some adapted weights."""
    return self._replace(
      weights={path: weight for path, weight in self.weights.items() if path not in paths},
      targets={path: target for path, target in self.targets.items() if path not in paths},
    )

  def as_lora(self) -> "AdapterParts":
    """Returns the parts with variants that are plain LoRA, such as PiSSA, as that."""
    weights, targets = dict(self.weights), dict(self.targets)
    for path, target in self.targets.items():
      plain = None if target.variant in (None, LORA, DORA) else same_lora(target, weights[path])
      if plain is not None:
        alpha = target.scaling * plain.rank
        weights[path] = plain
        targets[path] = dataclasses.replace(target, variant=LORA, rank=plain.rank, alpha=alpha)
    return self._replace(weights=weights, targets=targets)

  def of_modules(self) -> dict[Module, list[Part | None]]:
    """Returns the parts of each adapted module; None for weights that are not adapted there.

    Raises:
      ValueError: if an adapted weight is in no module, or has axes that other packages have not.
    """
    found: dict[Module, list[Part | None]] = {}
    for module in self.adapted:
      parts = [self._part(path, module) for path in module.stored.paths]
      if any(part is not None for part in parts):
        found[module] = parts
    self._check_placed(found)
    return found

  def _part(self, path: str, module: Module) -> Part | None:
    weight, place = self.weights.get(path), module.stored.place
    if weight is None:
      return None
    _check_order(weight)
    if weight.layers is not None:
      if place[0] not in weight.layers:
        return None
      place = (weight.layers.index(place[0]), *place[1:])
    arrays = {}
    for spec in weight.table:
      array = np.asarray(weight.arrays[spec.name], np.float32)
      arrays[spec.name] = array[place] if "batch" in spec.words.split() else array
    target = self.targets[path]
    return Part(self.variant_of(path), arrays, target.rank, target.scaling)

  def _check_placed(self, modules: Collection[Module]) -> None:
    placed = {path for module in modules for path in module.stored.paths}
    if missing := sorted(set(self.weights) - placed):
      raise ValueError(f"the model has no module for the adapted {', '.join(missing)}")

  def uses_dora(self, package: str) -> bool:
    """Returns whether all weights are adapted by DoRA, and not by LoRA.

    Args:
      package: whose format has one setting for all modules, for messages.
    Raises:
      ValueError: if some are adapted by DoRA and others by LoRA, or one by another variant.
    """
    variants = {path: self.variant_of(path) for path in self.weights}
    for path, variant in variants.items():
      if variant not in (LORA, DORA):
        raise ValueError(
          f"{package}'s format is for LoRA and DoRA, and {path} is adapted by {variant.name}. "
          "lora_jax.convert gives the nearest LoRA"
        )
    plain = [path for path, variant in variants.items() if variant == LORA]
    if plain and len(plain) < len(self.weights):
      raise ValueError(
        f"{package} has one variant for all modules, and {', '.join(plain)} are adapted by LoRA, "
        f"the others by DoRA: {package} would rescale them, unless their magnitude followed "
        "|W + scaling * A B|. Adapt all by one, or take the nearest LoRA of lora_jax.convert"
      )
    return not plain

  def fuse(self, use_dora: bool = False) -> dict[Module, Fused]:
    """Returns the arrays of the adapted modules, in the order of `modules`.

    Raises:
      ValueError: if an adapted weight is in no module; or as `fused_arrays`.
    """
    scalings = {path: target.scaling for path, target in self.targets.items()}
    fused = {}
    for module in self.adapted:
      joined = fused_arrays(module, self.weights, scalings, self.leaves, use_dora)
      if joined is not None:
        fused[module] = joined
    self._check_placed(fused)
    return fused


def check_parts(
  config: LoraConfig, trainable: PyTree, tensors: Sequence[StoredTensor], params: PyTree
) -> AdapterParts:
  """Checks a trained tree, and finds the modules that another package has for it.

  Args:
    config: of the adapter.
    trainable: the trained tree.
    tensors: of the model, by that package's names.
    params: of the base model, or their shapes.
  Raises:
    ValueError: if the tree is not for the config and the base model.
  """
  leaves = dict(weights_with_path(params))
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  return AdapterParts(
    whole_weights(trainable, shapes(targets)),
    adapter_extra(trainable),
    targets,
    leaves,
    find_modules(tensors, leaves),
    tensors,
    shared_arrays(trainable),
    find_biases(targets, extra, params),
  )


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


def _check_order(weight: LoraWeight) -> None:
  if weight.axes.inputs > weight.axes.outputs:
    raise ValueError(f"other packages have no format for factors with axes {weight.axes}")


def _of_place(weight: LoraWeight | None, module: Module) -> _Part | None:
  """Returns a weight's arrays of the module's layer or expert; None if it is not adapted."""
  if weight is None:
    return None
  _check_order(weight)
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
