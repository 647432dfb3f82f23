"""Reads adapters that PEFT has saved."""

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
from lora_jax.adapters.delta import LoraWeight, Table
from lora_jax.adapters.layers import adapted_layers
from lora_jax.axes import LoraAxes
from lora_jax.files import local_path, read_json
from lora_jax.interop.peft.config import PeftConfig, parse
from lora_jax.interop.peft.modules import (
  CONFIG,
  PREFIX,
  WEIGHTS,
  Arrays,
  Module,
  check_called,
  check_tied,
  factor_names,
  find_modules,
  has_values,
  magnitude_name,
  values_of,
  whole_name,
)
from lora_jax.interop.peft.read import is_fully_trained, read_arrays, which_base
from lora_jax.interop.peft.recognize import describe_folder
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.trees import nest, weights_with_path
from lora_jax.variants.dora import DORA, column_norm_squared
from lora_jax.variants.lora import LORA

# Of DoRA without |W|^2, which is computed from the base model.
IN_FILE = Table(DORA.name, tuple(spec for spec in DORA.table if not spec.frozen))


def load_peft(
  folder: str | Path, tensors: Sequence[StoredTensor], params: PyTree
) -> tuple[LoraConfig, PyTree]:
  """Reads an adapter that PEFT has saved.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    tensors: of the model in `transformers`, as `stored_tensors(config)` returns them.
    params: of the base model. Shapes are enough, unless the adapter is DoRA, which needs |W|^2, or
      has biases of B, which are added to the base model's.

  Returns:
    The config, with its variant, and the trainable tree of `lora_jax.lora`.
  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if the adapter is of another method or another model, or a tensor is missing,
      unexpected, misshapen, truncated or not finite; each is named. For DoRA, if params are shapes.
  """
  folder = local_path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(
      f"{folder} is not a folder; expected one with {CONFIG} and {WEIGHTS}. Download an adapter "
      "from the hub by huggingface_hub.snapshot_download"
    )
  if not (folder / CONFIG).exists() and (text := describe_folder(folder)):
    raise FileNotFoundError(f"{folder / CONFIG} does not exist; {text}")
  config = parse(read_json(folder / CONFIG), folder / CONFIG)
  leaves = dict(weights_with_path(params))
  known = find_modules(tensors, leaves)
  modules = _targeted(folder, config, known)
  trained = [module for module in known if module in modules or config.saves(module.name)]
  check_called(folder, modules)
  check_tied(folder, [module for module in trained if module.stored.is_embedding], tensors)
  if config.use_dora:
    _check_values(folder, modules, leaves)
  arrays = read_arrays(folder, config, modules, tensors, leaves)
  factors = {}
  for module in modules:
    a, b = module.from_file(*(arrays[key] for key in factor_names(module, modules)))
    magnitude = arrays[magnitude_name(module)].reshape(-1) if config.use_dora else None
    factors[module] = Factors(a, b, config.scaling_of(module.name), magnitude)
  weights, settings = split_modules(folder, factors, leaves)
  if config.use_dora:
    weights = {path: _with_norm(weight, leaves[path]) for path, weight in weights.items()}
  extra = _extra(config, modules, arrays, tensors, leaves)
  lora_config, trainable = as_tree(weights, settings, extra)
  if config.use_dora:
    lora_config = dataclasses.replace(lora_config, variant=DORA)
  return lora_config, trainable


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


Settings = dict[str, tuple[int, float]]
"""Rank and alpha by path."""


def split_modules(
  where: Path, factors: Mapping[Module, Factors], leaves: Mapping[str, Any]
) -> tuple[dict[str, LoraWeight], Settings]:
  """Returns the nodes of our leaves, with stacked layers and experts, and their settings.

  A node of DoRA still lacks the norms of the base model's weight.

  Args:
    where: the file or folder, for messages.
    factors: of the adapted modules.
    leaves: of the base model, or their shapes, by path.
  Raises:
    ValueError: if the layers of a stack have different ranks or alphas.
  """
  targets: dict[str, dict[tuple[int, ...], LoraWeight]] = {}
  settings: Settings = {}
  for module, (a, b, scaling, magnitude) in factors.items():
    by_output = {"lora_b": b} if magnitude is None else {"lora_b": b, "magnitude": magnitude}
    table, axes = LORA.table if magnitude is None else IN_FILE, _axes(a.ndim, module.is_conv)
    offsets = np.cumsum([0, *module.outputs])
    for path, start, stop in zip(module.stored.paths, offsets, offsets[1:], strict=False):
      part = {name: array[..., start:stop] for name, array in by_output.items()}
      weight = LoraWeight.from_arrays({"lora_a": a, **part}, table, axes, None)
      targets.setdefault(path, {})[module.stored.place] = weight
      setting = weight.rank, scaling * weight.rank
      if settings.setdefault(path, setting) != setting:
        raise ValueError(
          f"{where}: the layers stacked in {path} have different ranks or alphas; load the model "
          "with scan_layers=False"
        )
  stacked = {path: _stacked(parts, tuple(leaves[path].shape)) for path, parts in targets.items()}
  return stacked, settings


def as_tree(
  weights: Mapping[str, LoraWeight], settings: Settings, extra: Mapping[str, Any]
) -> tuple[LoraConfig, PyTree]:
  """Returns the config and the trainable tree of nodes and fully trained leaves by path."""
  items = [(tuple(path.split("/")), leaf) for path, leaf in {**weights, **extra}.items()]
  return _lora_config(settings, weights, extra), jax.tree.map(jnp.asarray, nest(items))


def _targeted(folder: Path, config: PeftConfig, known: Sequence[Module]) -> list[Module]:
  """Returns the modules and parameters that are adapted.

  Raises:
    ValueError: if there are none, or the model has no such layer or target parameter.
  """
  _check_layers(folder, config, known)
  parameters = [module for module in known if module.stored.is_parameter]
  for name in config.target_parameters:
    if not any(module.name == name or module.name.endswith(f".{name}") for module in parameters):
      raise ValueError(
        f"{folder}: target_parameters {config.target_parameters}: this model has no {name}, but "
        f"{', '.join(sorted({_short(module) for module in parameters})) or 'none'}"
      )
  modules = [
    module
    for module in known
    if config.targets_parameter(module.name)
    or (not module.stored.is_parameter and config.targets(module.name, module.is_body))
  ]
  if not modules:
    raise ValueError(
      f"{folder}: target_modules {config.target_modules!r} match none of this model's: "
      f"{', '.join(sorted({_short(module) for module in known if module not in parameters}))}"
      f"{_excluded(config)}. {which_base(config)}"
    )
  return modules


def _check_layers(folder: Path, config: PeftConfig, known: Sequence[Module]) -> None:
  """Raises ValueError if the model lacks one of layers_to_transform."""
  layers = [config.layer_of(module.name) for module in known]
  numbers = {layer for layer in layers if layer is not None}
  lacking = sorted(set(config.layers_to_transform or ()) - numbers)
  if not lacking:
    return
  if not numbers:
    raise ValueError(
      f"{folder}: layers_pattern {config.layers_pattern} matches no list of layers of this model. "
      f"{which_base(config)}"
    )
  raise ValueError(
    f"{folder}: layers_to_transform has {', '.join(map(str, lacking[:8]))}, but the layers of this "
    f"model are 0 to {max(numbers)}. {which_base(config)}"
  )


def _excluded(config: PeftConfig) -> str:
  """Returns the fields that restrict target_modules, for a message."""
  names = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
  fields = [f"{name} {getattr(config, name)!r}" for name in names if getattr(config, name)]
  return f" (also set: {', '.join(fields)})" if fields else ""


def _check_values(folder: Path, modules: Sequence[Module], leaves: Mapping[str, Any]) -> None:
  """Raises ValueError if params are only shapes of the adapted weights."""
  paths = [path for module in modules for path in module.stored.paths]
  shapes = [path for path in paths if not has_values(leaves[path])]
  if shapes:
    raise ValueError(
      f"{folder}: use_dora: DoRA needs the norms of the base model's weights, and params have only "
      f"the shape of {shapes[0]}. Give real arrays"
    )


def _short(module: Module) -> str:
  """Returns the end of a module's name; of a parameter, with its module's."""
  return ".".join(module.name.split(".")[-2 if module.stored.is_parameter else -1 :])


def _axes(ndim: int, is_conv: bool = False) -> LoraAxes:
  """Returns the axes of a weight's factors; except in convolutions, all but two are stacks."""
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
  return LoraWeight.from_arrays(arrays, table, _axes(arrays["lora_a"].ndim), layers)


def _with_norm(weight: LoraWeight, leaf: jax.Array) -> LoraWeight:
  """Returns a node of DoRA, with |W|^2 of the base model's weight."""
  axes, layers = weight.axes, weight.layers
  norm_squared = column_norm_squared(adapted_layers(values_of(leaf), axes, layers), axes)
  arrays = weight.arrays | {"norm_squared": norm_squared}
  return LoraWeight.from_arrays(arrays, DORA.table, axes, layers)


def _extra(
  config: PeftConfig,
  modules: Sequence[Module],
  arrays: Arrays,
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """Returns the fully trained leaves: saved modules, and biases with those of B added."""
  adapted = {module.module for module in modules}
  loaded: dict[str, np.ndarray] = {}

  def parts(stored: StoredTensor, array: np.ndarray) -> None:
    array = stored.to_ours(array)
    sizes = [leaves[path].shape[-1] for path in stored.paths]
    pieces = np.split(array, np.cumsum(sizes)[:-1], axis=-1)
    for path, piece in zip(stored.paths, pieces, strict=True):
      if not stored.place:
        loaded[path] = piece
      else:  # other layers are unchanged
        loaded.setdefault(path, np.array(values_of(leaves[path]), np.float32))[stored.place] = piece

  for stored in tensors:
    if is_fully_trained(config, stored, adapted):
      parts(stored, arrays[whole_name(stored, adapted)])
  if config.lora_bias:
    biases = {stored.module: stored for stored in tensors if stored.is_bias}
    for module in modules:
      if module.name not in biases:
        raise ValueError(
          f"lora_bias: {module.name} has no bias here to which that of B could be added. Merge the "
          "adapter in PEFT and load the merged folder"
        )
      stored = biases[module.name]
      known = [loaded.get(p, np.asarray(leaves[p], np.float32))[stored.place] for p in stored.paths]
      of_b = config.scaling_of(module.name) * arrays[f"{PREFIX}{module.name}.lora_B.bias"]
      parts(stored, np.concatenate(known, axis=-1) + of_b)
  return loaded


def _lora_config(
  settings: Settings,
  weights: Mapping[str, LoraWeight],
  extra: Mapping[str, Any],
) -> LoraConfig:
  rules = {
    path: LoraRule(
      re.escape(path),
      rank=settings[path][0],
      alpha=settings[path][1],
      stacked_layers=weight.layers,
    )
    for path, weight in weights.items()
  }
  return exact_config(rules, extra)
