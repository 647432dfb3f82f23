"""The tensors of an adapter's file in PEFT's format, checked against its config and the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.modules import (
  CONFIG,
  MAGNITUDE,
  PREFIX,
  WEIGHTS,
  Arrays,
  Module,
  factor_names,
  magnitude_name,
  whole_name,
)
from lora_jax.models.checkpoints.hub import StoredTensor, open_safetensors
from lora_jax.models.checkpoints.stored import stored_shape


def read_arrays(
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
    if config.use_dora:
      expected[magnitude_name(module)] = module.magnitude_shape
    if config.lora_bias:
      expected[f"{PREFIX}{module.name}.lora_B.bias"] = (sum(module.outputs),)
  adapted = {module.module for module in modules}
  for stored in tensors:
    if is_trained_whole(config, stored, adapted):
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
      f"{'; '.join(faults[:8])}{more}. {which_base(config)}, and leave {CONFIG} as PEFT wrote it"
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
      duplicate, base = f"{module}.modules_to_save.bias", arrays.get(f"{module}.bias")
      if base is not None and duplicate in arrays and np.array_equal(arrays[duplicate], base):
        del arrays[duplicate]


def _is_copy(copy: np.ndarray, leaf: Any) -> bool:
  """Returns whether an array is a leaf, rounded to the dtype of one of the two."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return copy.shape == leaf.shape
  base = np.asarray(leaf)
  if copy.shape != base.shape:
    return False
  with np.errstate(over="ignore"):
    rounded = [base.astype(dtype).astype(np.float32) for dtype in (jnp.bfloat16, np.float16)]
    same = np.array_equal(copy.astype(base.dtype), base)
  return same or any(np.array_equal(copy, other) for other in rounded)


def _load(path: Path) -> Arrays:
  if not path.is_file():
    pickles = sorted(p.name for kind in ("*.bin", "*.pt") for p in path.parent.glob(kind))
    hint = f"; {', '.join(pickles)} may be a pickle and is not read" if pickles else ""
    raise FileNotFoundError(f"{path} does not exist{hint}. Save the adapter as safetensors")
  with open_safetensors(path) as file:
    arrays = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
  for name in [name for name in arrays if name.endswith(f"{MAGNITUDE}.weight")]:
    usual = name.removesuffix(".weight")  # PEFT writes this name and reads both
    if usual not in arrays:
      arrays[usual] = arrays.pop(name)
  return arrays


def is_trained_whole(config: PeftConfig, stored: StoredTensor, adapted: set[str]) -> bool:
  """Returns whether a tensor is trained itself; `adapted` are the names of adapted modules."""
  if config.saves(stored.module):
    return True
  return stored.is_bias and (
    config.bias == "all" or (config.bias == "lora_only" and stored.module in adapted)
  )


def which_base(config: PeftConfig) -> str:
  """Returns advice for messages: which base to load."""
  return f"Load the base that it was trained on{f' ({config.base})' if config.base else ''}"
