"""Puts the arrays of another package's modules in the places of our leaves: layers are stacked."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig, LoraRule, exact_config
from lora_jax.adapters.delta import LoraWeight, Table, Variant
from lora_jax.axes import LoraAxes
from lora_jax.interop.peft.modules import Module
from lora_jax.interop.peft.names import usual
from lora_jax.trees import nest
from lora_jax.variants.dora import DORA
from lora_jax.variants.lora import LORA

# Of DoRA without |W|^2, which is computed from the base model.
IN_FILE = Table(DORA.name, tuple(spec for spec in DORA.table if not spec.frozen))


class Part(NamedTuple):
  """The arrays of one weight, or of one layer of a stack, and its settings.

  Attributes:
    variant: of LoRA.
    arrays: those of the variant, by name, without the axes of the stack.
    rank: 1 for variants without a rank.
    scaling: of the variant's terms.
  """

  variant: Variant
  arrays: dict[str, np.ndarray]
  rank: int = 1
  scaling: float = 1.0


class Factors(NamedTuple):
  """The arrays of one module of another package, in the axes of our leaves.

  Attributes:
    a: (..., in, rank).
    b: (..., rank, out).
    scaling: of their matmul.
    magnitude: DoRA's, (out,); None for LoRA.
  """

  a: np.ndarray
  b: np.ndarray
  scaling: float
  magnitude: np.ndarray | None = None

  def parts(self, outputs: Sequence[int]) -> list[Part]:
    """Returns a part for each weight that is fused in the module, with its outputs."""
    by_output = {"lora_b": self.b}
    if self.magnitude is not None:
      by_output["magnitude"] = self.magnitude
    variant = LORA if self.magnitude is None else DORA
    split = {name: split_outputs(array, outputs) for name, array in by_output.items()}
    return [
      Part(
        variant,
        {"lora_a": self.a, **{name: pieces[i] for name, pieces in split.items()}},
        self.a.shape[-1],
        self.scaling,
      )
      for i in range(len(outputs))
    ]


def split_outputs(array: np.ndarray, outputs: Sequence[int]) -> list[np.ndarray]:
  """Returns the pieces of the last axis for weights with these numbers of outputs."""
  return np.split(array, np.cumsum(outputs)[:-1], axis=-1)


class Setting(NamedTuple):
  """The settings of a weight: its rank, its alpha and its variant."""

  rank: int
  alpha: float
  variant: Variant = LORA


Settings = dict[str, Setting]
"""By path."""


def split_modules(
  where: Path, factors: Mapping[Module, Factors], leaves: Mapping[str, Any]
) -> tuple[dict[str, LoraWeight], Settings]:
  """Returns the nodes of LoRA or DoRA, as `place_parts` does."""
  parts = {module: found.parts(module.outputs) for module, found in factors.items()}
  return place_parts(where, parts, leaves)


def place_parts(
  where: Path, parts: Mapping[Module, Sequence[Part]], leaves: Mapping[str, Any]
) -> tuple[dict[str, LoraWeight], Settings]:
  """Returns the nodes of our leaves, with stacked layers and experts, and their settings.

  A node of DoRA still lacks the norms of the base model's weight.

  Args:
    where: the file or folder, for messages.
    parts: of the adapted modules, one for each of their leaves.
    leaves: of the base model, or their shapes, by path.
  Raises:
    ValueError: if the layers of a stack have different ranks, alphas or variants.
  """
  targets: dict[str, dict[tuple[int, ...], LoraWeight]] = {}
  settings: Settings = {}
  for module, of_module in parts.items():
    axes = _axes(len(module.shapes[0]), module.is_conv)
    for path, part in zip(module.stored.paths, of_module, strict=True):
      table = IN_FILE if part.variant == DORA else part.variant.table
      weight = LoraWeight.from_arrays(part.arrays, table, axes, None)
      targets.setdefault(path, {})[module.stored.place] = weight
      setting = Setting(part.rank, part.scaling * part.rank, part.variant)
      if settings.setdefault(path, setting) != setting:
        raise ValueError(
          f"{where}: the layers stacked in {path} have different ranks, alphas or variants; load "
          "the model with scan_layers=False"
        )
  nodes = {}
  for path, of_places in targets.items():
    shape = tuple(leaves[path].shape)
    nodes[path] = _stacked(of_places, shape).for_weight(shape)
  return nodes, settings


def as_tree(
  weights: Mapping[str, LoraWeight], settings: Settings, extra: Mapping[str, Any]
) -> tuple[LoraConfig, PyTree]:
  """Returns the config and the trainable tree of nodes and fully trained leaves by path.

  Nodes of arrays that all weights share have a path too, and no settings.
  """
  items = [(tuple(path.split("/")), leaf) for path, leaf in {**weights, **extra}.items()]
  return _lora_config(settings, weights, extra), jax.tree.map(jnp.asarray, nest(items))


def _lora_config(
  settings: Settings, weights: Mapping[str, LoraWeight], extra: Mapping[str, Any]
) -> LoraConfig:
  if not settings:
    return LoraConfig(1, 1.0, target=(), extra=[re.escape(path) for path in extra])
  most: Variant = usual(setting.variant for setting in settings.values())
  rules = {
    path: LoraRule(
      re.escape(path),
      rank=setting.rank,
      alpha=setting.alpha,
      stacked_layers=weights[path].layers,
      variant=None if setting.variant == most else setting.variant,
    )
    for path, setting in settings.items()
  }
  variant = None if most == LORA else most
  return dataclasses.replace(exact_config(rules, extra), variant=variant)


def _axes(ndim: int, is_conv: bool = False) -> LoraAxes:
  """Returns the axes of a weight; except in convolutions, all but two are stacks."""
  if is_conv:
    return LoraAxes((), tuple(range(ndim - 1)), (ndim - 1,))
  return LoraAxes(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,))


def _stacked(of_places: Mapping[tuple[int, ...], LoraWeight], shape: tuple[int, ...]) -> LoraWeight:
  """Returns the arrays of a leaf, with those of its layers and experts stacked.

  Args:
    of_places: by their index into the leaf.
    shape: of the leaf.
  """
  if () in of_places:
    return of_places[()]
  by_first: dict[int, dict[tuple[int, ...], LoraWeight]] = {}
  for (first, *rest), weight in of_places.items():
    by_first.setdefault(first, {})[tuple(rest)] = weight
  layers = tuple(sorted(by_first))
  parts = [_stacked(by_first[i], shape[1:]) for i in layers]
  if any(part.layers not in (None, tuple(range(shape[1]))) for part in parts):
    raise ValueError(
      "the adapter is for some experts of stacked layers; load the model with scan_layers=False"
    )
  table = parts[0].table
  arrays = {spec.name: np.stack([part.arrays[spec.name] for part in parts]) for spec in table}
  return LoraWeight.from_arrays(arrays, table, _axes(len(shape)), layers)
