"""Reads adapters that PEFT has saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight
from lora_jax.adapters.layers import adapted_layers
from lora_jax.files import local_path, read_json
from lora_jax.interop.peft.config import PeftConfig, parse
from lora_jax.interop.peft.fully_trained import put_whole, read_whole, whole_shapes
from lora_jax.interop.peft.leaves import IN_FILE, Factors, Part, as_tree, place_parts
from lora_jax.interop.peft.modules import (
  CONFIG,
  Arrays,
  Module,
  check_called,
  check_tied,
  factor_names,
  find_modules,
  has_values,
  magnitude_name,
  values_of,
)
from lora_jax.interop.peft.read import (
  check_folder,
  check_shapes,
  lora_shapes,
  read_arrays,
  which_base,
)
from lora_jax.interop.peft.tuners.norms import layer_name, norm_shapes, tuned_tensors
from lora_jax.interop.peft.tuners.table import TUNERS
from lora_jax.interop.peft.tuners.tokens import read_tokens, token_modules, token_shapes
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.trees import weights_with_path
from lora_jax.variants.dora import DORA, column_norm_squared


def load_peft(
  folder: str | Path, tensors: Sequence[StoredTensor], params: PyTree
) -> tuple[LoraConfig, PyTree]:
  """Reads an adapter that PEFT has saved.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    tensors: of the model in `transformers`, as `stored_tensors(config)` returns them.
    params: of the base model. Shapes are enough, unless the adapter is DoRA, which needs |W|^2, has
      trained rows of an embedding, or biases of B, which are added to the base model's.

  Returns:
    The config, with its variant, and the trainable tree of `lora_jax.lora`.
  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if the adapter is of a method that is not read, or of another model, or a tensor is
      missing, unexpected, misshapen, truncated or not finite; each is named. For adapters that need
      the base model's values, if params are shapes.
  """
  folder = local_path(folder)
  check_folder(folder)
  config = parse(read_json(folder / CONFIG), folder / CONFIG)
  leaves = dict(weights_with_path(params))
  if config.peft_type == "LN_TUNING":
    return _load_norms(folder, config, tensors, leaves)
  known = find_modules(tensors, leaves)
  modules = _targeted(folder, config, known)
  load = _load_lora if config.peft_type == "LORA" else _load_tuner
  return load(folder, config, known, modules, tensors, leaves)


def _load_lora(
  folder: Path,
  config: PeftConfig,
  known: Sequence[Module],
  modules: Sequence[Module],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> tuple[LoraConfig, PyTree]:
  """Reads LoRA and DoRA, with trained rows of embeddings."""
  tokens = token_modules(folder, config, known)
  _check_trained(folder, config, known, modules, tensors)
  if config.use_dora:
    _check_values(folder, modules, leaves)
  shapes = lora_shapes(config, modules) | token_shapes(tokens)
  arrays = _read(folder, config, shapes, modules, tensors, leaves)
  check_shapes(folder, config, known)
  parts = {module: _lora_parts(config, module, modules, arrays) for module in modules}
  weights, settings = place_parts(folder, parts | read_tokens(tokens, arrays, leaves), leaves)
  weights = {
    path: _with_norm(weight, leaves[path]) if weight.table == IN_FILE else weight
    for path, weight in weights.items()
  }
  return as_tree(weights, settings, read_whole(config, modules, arrays, tensors, leaves))


def _load_tuner(
  folder: Path,
  config: PeftConfig,
  known: Sequence[Module],
  modules: Sequence[Module],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> tuple[LoraConfig, PyTree]:
  """Reads the other methods that adapt weights."""
  tuner = TUNERS[config.peft_type]
  tuner.check(folder, modules)
  if config.peft_type != "TRAINABLE_TOKENS":  # PEFT ties its rows, too
    _check_trained(folder, config, known, modules, tensors)
  shapes = tuner.shapes(config, modules, tensors)
  arrays = _read(folder, config, shapes, modules, tensors, leaves)
  check_shapes(folder, config, known)
  weights, settings = place_parts(folder, tuner.read(config, modules, arrays, leaves), leaves)
  weights |= tuner.read_shared(arrays)
  return as_tree(weights, settings, read_whole(config, modules, arrays, tensors, leaves))


def _load_norms(
  folder: Path, config: PeftConfig, tensors: Sequence[StoredTensor], leaves: Mapping[str, Any]
) -> tuple[LoraConfig, PyTree]:
  """Reads LN tuning, whose modules are fully trained."""
  tuned = tuned_tensors(folder, config, tensors)
  embeddings = [module for module in find_modules(tensors, leaves) if not module.is_linear]
  trained = [m for m in embeddings if m.stored in tuned or config.saves(m.name)]
  check_tied(folder, trained, tensors)
  arrays = _read(folder, config, norm_shapes(tuned, leaves), [], tensors, leaves)
  extra = read_whole(config, [], arrays, tensors, leaves)
  for stored in tuned:
    put_whole(extra, stored, arrays[layer_name(stored)], leaves)
  return as_tree({}, {}, extra)


def _read(
  folder: Path,
  config: PeftConfig,
  shapes: Mapping[str, tuple[int, ...]],
  modules: Sequence[Module],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> Arrays:
  """Returns the tensors of these shapes, and those of fully trained leaves."""
  adapted = {module.module for module in modules}
  expected = {**shapes, **whole_shapes(config, adapted, tensors, leaves)}
  return read_arrays(folder, config, expected, tensors, leaves)


def _lora_parts(
  config: PeftConfig, module: Module, modules: Sequence[Module], arrays: Arrays
) -> list[Part]:
  a, b = module.from_file(*(arrays[key] for key in factor_names(module, modules)))
  magnitude = arrays[magnitude_name(module)].reshape(-1) if config.use_dora else None
  return Factors(a, b, config.scaling_of(module.name), magnitude).parts(module.outputs)


def _check_trained(
  folder: Path,
  config: PeftConfig,
  known: Sequence[Module],
  modules: Sequence[Module],
  tensors: Sequence[StoredTensor],
) -> None:
  """Raises ValueError if PEFT would not use an adapted or trained module as we do."""
  trained = [module for module in known if module in modules or config.saves(module.name)]
  check_called(folder, modules)
  check_tied(folder, [module for module in trained if module.stored.is_embedding], tensors)


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


def _with_norm(weight: LoraWeight, leaf: jax.Array) -> LoraWeight:
  """Returns a node of DoRA, with |W|^2 of the base model's weight."""
  axes, layers = weight.axes, weight.layers
  norm_squared = column_norm_squared(adapted_layers(values_of(leaf), axes, layers), axes)
  arrays = weight.arrays | {"norm_squared": norm_squared}
  return LoraWeight.from_arrays(arrays, DORA.table, axes, layers)
