"""Reads adapters that PEFT has saved."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig, LoraRule, exact_config
from lora_jax.adapters.delta import LoraWeight
from lora_jax.axes import LoraAxes
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
  whole_name,
)
from lora_jax.models.checkpoints.hub import StoredTensor, open_safetensors
from lora_jax.models.checkpoints.stored import stored_shape
from lora_jax.models.files import read_json
from lora_jax.trees import leaves_with_path, nest


def load_peft(
  folder: str | Path, tensors: Sequence[StoredTensor], params: PyTree
) -> tuple[LoraConfig, PyTree]:
  """Reads an adapter that PEFT has saved.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    tensors: of the model in `transformers`, as `stored_tensors(config)` returns them.
    params: of the base, from which biases of B are added to the layers' own.

  Returns:
    The config and the trainable tree of `lora_jax.lora`.
  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if the adapter is of another method or another model, or a tensor is missing,
      unexpected, mis-shaped or truncated; each is named.
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(
      f"{folder} is not a folder; expected one with {CONFIG} and {WEIGHTS}. An adapter on the hub "
      "is brought to one by huggingface_hub.snapshot_download"
    )
  config = parse(read_json(folder / CONFIG), folder / CONFIG)
  leaves = dict(leaves_with_path(params))
  own = find_modules(tensors, leaves)
  modules = _targeted(folder, config, own)
  trained = [module for module in own if module in modules or config.saves(module.name)]
  check_called(folder, modules)
  check_tied(folder, [module for module in trained if module.stored.is_embedding], tensors)
  arrays = _read(folder, config, modules, tensors, leaves)
  targets: dict[str, dict[tuple[int, ...], LoraWeight]] = {}
  settings: dict[str, tuple[int, float]] = {}
  for module in modules:
    a, b = module.from_file(*(arrays[key] for key in factor_names(module, modules)))
    offsets = np.cumsum([0, *module.outputs])
    for path, start, stop in zip(module.stored.paths, offsets, offsets[1:], strict=False):
      weight = LoraWeight(a, b[..., start:stop], _axes(a.ndim, module.is_conv))
      targets.setdefault(path, {})[module.stored.place] = weight
      setting = weight.rank, config.scaling_of(module.name) * weight.rank
      if settings.setdefault(path, setting) != setting:
        raise ValueError(
          f"{folder}: the layers stacked in {path} have different ranks or alphas; load the model "
          "with scan_layers=False"
        )
  weights = {path: _stacked(of, tuple(leaves[path].shape)) for path, of in targets.items()}
  extra = _extra(config, modules, arrays, tensors, leaves)
  items = [(tuple(path.split("/")), leaf) for path, leaf in (weights | extra).items()]
  return _lora_config(settings, weights, extra), jax.tree.map(jnp.asarray, nest(items))


def _targeted(folder: Path, config: PeftConfig, own: Sequence[Module]) -> list[Module]:
  """Returns the modules and parameters that are adapted.

  Raises:
    ValueError: if there are none, or a target_parameter is none of the model's.
  """
  parameters = [module for module in own if module.stored.is_parameter]
  for name in config.target_parameters:
    if not any(module.name == name or module.name.endswith(f".{name}") for module in parameters):
      raise ValueError(
        f"{folder}: target_parameters {config.target_parameters}: this model has no {name}, but "
        f"{', '.join(sorted({_short(module) for module in parameters})) or 'none'}"
      )
  modules = [
    module
    for module in own
    if config.targets_parameter(module.name)
    or (not module.stored.is_parameter and config.targets(module.name, module.is_body))
  ]
  if not modules:
    raise ValueError(
      f"{folder}: target_modules {config.target_modules!r} are none of this model's: "
      f"{', '.join(sorted({_short(module) for module in own if module not in parameters}))}. "
      f"{_which_base(config)}"
    )
  return modules


def _which_base(config: PeftConfig) -> str:
  return f"Load the base that it was trained on{f' ({config.base})' if config.base else ''}"


def _short(module: Module) -> str:
  """Returns the end of a module's name; of a parameter, with its module's."""
  return ".".join(module.name.split(".")[-2 if module.stored.is_parameter else -1 :])


def _read(
  folder: Path,
  config: PeftConfig,
  modules: Sequence[Module],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> Arrays:
  """Returns the file's tensors by name, once they are exactly those of the config."""
  expected: dict[str, tuple[int, ...]] = {}
  for module in modules:
    shapes = module.factor_shapes(config.rank_of(module.name))
    expected |= dict(zip(factor_names(module, modules), shapes, strict=True))
    if config.lora_bias:
      expected[f"{PREFIX}{module.name}.lora_B.bias"] = (sum(module.outputs),)
  adapted = {module.module for module in modules}
  for stored in tensors:
    if _trained_whole(config, stored, adapted):
      expected[whole_name(stored, adapted)] = stored_shape(stored, leaves)
  arrays = _load(folder / WEIGHTS)
  _drop_base_copies(folder, arrays, modules, leaves)
  _drop_bias_copies(arrays, config, tensors)
  faults = [f"missing {n} {shape}" for n, shape in expected.items() if n not in arrays]
  faults += [f"unexpected {n} {x.shape}" for n, x in arrays.items() if n not in expected]
  faults += [
    f"{n} has shape {arrays[n].shape}, expected {shape}"
    for n, shape in expected.items()
    if n in arrays and arrays[n].shape != shape
  ]
  if faults:
    more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
    raise ValueError(
      f"{folder}: the tensors are not those of its {CONFIG} and this model: "
      f"{'; '.join(faults[:8])}{more}. {_which_base(config)}, and leave {CONFIG} as PEFT wrote it"
    )
  return arrays


def _drop_base_copies(
  folder: Path, arrays: Arrays, modules: Sequence[Module], leaves: Mapping[str, Any]
) -> None:
  """Leaves out the base's embedding or head, which PEFT saves beside an adapter of it.

  It may have been in another dtype there. Where `leaves` are shapes, its shape alone is compared.

  Raises:
    ValueError: if it is not this base's.
  """
  for module in modules:
    copy = arrays.pop(f"{PREFIX}{module.name}.base_layer.weight", None)
    if copy is None:
      continue
    (path,) = module.stored.paths
    if not _is_copy(module.stored.to_ours(copy), leaves[path]):
      raise ValueError(
        f"{folder}: the base's {module.name} that is saved with the adapter is not this base's. "
        "Load the base that it was trained on"
      )


def _drop_bias_copies(arrays: Arrays, config: PeftConfig, tensors: Sequence[StoredTensor]) -> None:
  """Leaves out what PEFT saves besides of a whole module's bias, as it saves all biases.

  The bias is there as it was in the base too, which nothing reads, and as it is, a second time.
  """
  for stored in tensors:
    if stored.is_bias and config.bias == "all" and config.saves(stored.module):
      module = f"{PREFIX}{stored.module}"
      arrays.pop(f"{module}.original_module.bias", None)
      again, own = f"{module}.modules_to_save.bias", arrays.get(f"{module}.bias")
      if own is not None and again in arrays and np.array_equal(arrays[again], own):
        del arrays[again]


def _is_copy(copy: np.ndarray, leaf: Any) -> bool:
  """Returns whether an array is a leaf, rounded to the dtype of one of the two."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return copy.shape == leaf.shape
  own = np.asarray(leaf)
  if copy.shape != own.shape:
    return False
  with np.errstate(over="ignore"):
    rounded = [own.astype(dtype).astype(np.float32) for dtype in (jnp.bfloat16, np.float16)]
    same = np.array_equal(copy.astype(own.dtype), own)
  return same or any(np.array_equal(copy, other) for other in rounded)


def _load(path: Path) -> Arrays:
  if not path.is_file():
    pickles = sorted(p.name for kind in ("*.bin", "*.pt") for p in path.parent.glob(kind))
    hint = f"; {', '.join(pickles)} may be a pickle and is not read" if pickles else ""
    raise FileNotFoundError(f"{path} does not exist{hint}. Save the adapter as safetensors")
  with open_safetensors(path) as file:
    return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118


def _trained_whole(config: PeftConfig, stored: StoredTensor, adapted: set[str]) -> bool:
  if config.saves(stored.module):
    return True
  return stored.is_bias and (
    config.bias == "all" or (config.bias == "lora_only" and stored.module in adapted)
  )


def _axes(ndim: int, is_conv: bool = False) -> LoraAxes:
  """Returns the axes of a weight's factors; but for a convolution all but two are stacks."""
  if is_conv:
    return LoraAxes((), tuple(range(ndim - 1)), (ndim - 1,))
  return LoraAxes(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,))


def _stacked(of_places: Mapping[tuple[int, ...], LoraWeight], shape: tuple[int, ...]) -> LoraWeight:
  """Returns the factors of a leaf, those of stacked layers and experts as one.

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
  a, b = (np.stack([getattr(part, name) for part in parts]) for name in ("lora_a", "lora_b"))
  return LoraWeight(a, b, _axes(a.ndim), layers)


def _extra(
  config: PeftConfig,
  modules: Sequence[Module],
  arrays: Arrays,
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """Returns our leaves that are trained whole: saved modules, biases, and biases of B added."""
  adapted = {module.module for module in modules}
  new: dict[str, np.ndarray] = {}

  def parts(stored: StoredTensor, array: np.ndarray) -> None:
    array = stored.to_ours(array)
    sizes = [leaves[path].shape[-1] for path in stored.paths]
    pieces = np.split(array, np.cumsum(sizes)[:-1], axis=-1)
    for path, piece in zip(stored.paths, pieces, strict=True):
      if not stored.place:
        new[path] = piece
      else:  # the layers that are not named stay as they are
        new.setdefault(path, np.array(leaves[path], np.float32))[stored.place] = piece

  for stored in tensors:
    if _trained_whole(config, stored, adapted):
      parts(stored, arrays[whole_name(stored, adapted)])
  if config.lora_bias:
    biases = {stored.module: stored for stored in tensors if stored.is_bias}
    for module in modules:
      if module.name not in biases:
        raise ValueError(f"lora_bias: {module.name} has no bias of its own to add that of B to")
      stored = biases[module.name]
      own = [new.get(p, np.asarray(leaves[p], np.float32))[stored.place] for p in stored.paths]
      of_b = config.scaling_of(module.name) * arrays[f"{PREFIX}{module.name}.lora_B.bias"]
      parts(stored, np.concatenate(own, axis=-1) + of_b)
  return new


def _lora_config(
  settings: Mapping[str, tuple[int, float]],
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
