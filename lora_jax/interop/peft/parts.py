"""A trained tree that has been checked, and its parts for the modules of another package."""

import dataclasses
from collections.abc import Collection, Sequence
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
from lora_jax.interop.peft.fused import Fused, check_order, fused_arrays
from lora_jax.interop.peft.leaves import Part
from lora_jax.interop.peft.modules import Module, find_modules
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.trees import weights_with_path
from lora_jax.variants.dora import DORA
from lora_jax.variants.lora import LORA


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
  def embeddings(self) -> list[Module]:
    """The embeddings that are adapted or fully trained."""
    paths, embeddings = {*self.weights, *self.extra}, (m for m in self.modules if not m.is_linear)
    return [module for module in embeddings if paths & set(module.stored.paths)]

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
    by_module: dict[Module, list[Part | None]] = {}
    for module in self.adapted:
      parts = [self._part(path, module) for path in module.stored.paths]
      if any(part is not None for part in parts):
        by_module[module] = parts
    self._check_placed(by_module)
    return by_module

  def _part(self, path: str, module: Module) -> Part | None:
    weight, place = self.weights.get(path), module.stored.place
    if weight is None:
      return None
    check_order(weight)
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
