"""Fully trained leaves: PEFT's `modules_to_save`, its biases, and the layers of LN tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.modules import PREFIX, Arrays, Module, has_values, values_of
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.models.checkpoints.stored import stored_shape

CLASSIFIER = "classifier"  # the head of a model for sequence classification


def is_fully_trained(config: PeftConfig, stored: StoredTensor, adapted: set[str]) -> bool:
  """Returns whether a tensor is trained itself; `adapted` are the names of adapted modules."""
  if config.saves(stored.module):
    return True
  return stored.is_bias and (
    config.bias == "all" or (config.bias == "lora_only" and stored.module in adapted)
  )


def whole_name(stored: StoredTensor, adapted: set[str]) -> str:
  """Returns the name in the file of a fully trained tensor.

  Args:
    stored: the tensor; a bias of an adapted module is one level deeper.
    adapted: the names of the adapted modules.
  """
  module, _, kind = stored.name.rpartition(".")
  return f"{PREFIX}{module}{'.base_layer' if module in adapted else ''}.{kind}"


def whole_shapes(
  config: PeftConfig,
  adapted: set[str],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the file's fully trained tensors, by name.

  Args:
    config: of the adapter.
    adapted: the names of the adapted modules.
    tensors: of the model.
    leaves: of the base model, or their shapes.
  """
  return {
    whole_name(stored, adapted): stored_shape(stored, leaves)
    for stored in tensors
    if is_fully_trained(config, stored, adapted)
  }


def read_whole(
  config: PeftConfig,
  modules: Sequence[Module],
  arrays: Arrays,
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """Returns the fully trained leaves: saved modules, and biases with those of B added."""
  adapted = {module.module for module in modules}
  loaded: dict[str, np.ndarray] = {}
  for stored in tensors:
    if is_fully_trained(config, stored, adapted):
      put_whole(loaded, stored, arrays[whole_name(stored, adapted)], leaves)
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
      put_whole(loaded, stored, np.concatenate(known, axis=-1) + of_b, leaves)
  return loaded


def put_whole(
  loaded: dict[str, np.ndarray], stored: StoredTensor, array: np.ndarray, leaves: Mapping[str, Any]
) -> None:
  """Puts a fully trained tensor into the leaves that it holds.

  Args:
    loaded: the fully trained leaves by path, which it changes.
    stored: the tensor.
    array: its values.
    leaves: of the base model, whose values the other layers of a stack keep.
  """
  sizes = [leaves[path].shape[-1] for path in stored.paths]
  pieces = np.split(stored.to_ours(array), np.cumsum(sizes)[:-1], axis=-1)
  for path, piece in zip(stored.paths, pieces, strict=True):
    if not stored.place:
      loaded[path] = piece
    else:
      loaded.setdefault(path, np.array(values_of(leaves[path]), np.float32))[stored.place] = piece


def write_whole(
  whole: Mapping[str, Any],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
  adapted: set[str],
) -> tuple[list[str], str, Arrays]:
  """Returns the fully trained modules, the value of `bias` for other biases, and the tensors.

  Args:
    whole: the fully trained leaves, by path.
    tensors: of the model.
    leaves: of the base model, or their shapes.
    adapted: the names of the adapted modules.
  """
  by_module: dict[str, list[StoredTensor]] = {}
  for stored in tensors:
    by_module.setdefault(stored.module, []).append(stored)
  names: list[str] = []
  trained: list[StoredTensor] = []
  biases: list[StoredTensor] = []
  for module, module_tensors in by_module.items():
    paths = {path for stored in module_tensors for path in stored.paths}
    if not paths & set(whole):
      continue
    if module not in adapted and paths <= set(whole):
      names.append(module)
      trained += module_tensors
      continue
    picked = [
      stored for stored in module_tensors if stored.is_bias and set(stored.paths) <= set(whole)
    ]
    if paths & set(whole) - {path for stored in picked for path in stored.paths}:
      raise ValueError(
        f"PEFT trains whole modules: {module} has {', '.join(sorted(paths))}, of which "
        f"{', '.join(sorted(paths & set(whole)))} are fully trained. Add the others to `extra`"
      )
    biases += picked
  saved = {stored.name for stored in trained}
  other_biases = [stored for stored in tensors if stored.is_bias and stored.name not in saved]
  word, biases = _which_biases(biases, other_biases, adapted, whole, leaves)
  arrays = {}
  for stored in (*trained, *biases):
    array = np.concatenate([_whole(whole[path], stored) for path in stored.paths], axis=-1)
    arrays[whole_name(stored, adapted)] = stored.to_file(array)
  picked = [name for name in by_module if name.split(".")[0] == CLASSIFIER]
  if picked and set(picked) <= set(names):
    names = [*(name for name in names if name not in picked), CLASSIFIER]
  return names, word, arrays  # whole names, since PEFT matches all that end with a short one


def _which_biases(
  trained: Sequence[StoredTensor],
  all_biases: Sequence[StoredTensor],
  adapted: set[str],
  whole: Mapping[str, Any],
  leaves: Mapping[str, Any],
) -> tuple[str, list[StoredTensor]]:
  """Returns PEFT's `bias` for trained biases, and their tensors.

  Layers of a stack whose bias is unchanged need not be among them.
  """
  picked = [stored for stored in all_biases if stored.module in adapted]
  if not trained:
    return "none", []
  if len(trained) == len(all_biases):
    return "all", list(trained)
  changed = [
    stored
    for stored in trained
    if not stored.place or not all(_is_unchanged(whole[p], leaves[p], stored) for p in stored.paths)
  ]
  names = {stored.name for stored in trained}
  if {s.name for s in changed} <= {s.name for s in picked} <= names:
    return "lora_only", picked
  raise ValueError(
    "PEFT trains all biases, or those of the adapted modules, or modules as a whole; `extra` has "
    f"{', '.join(sorted(s.name for s in changed)[:4])} and others. Of the adapted modules' it "
    f"lacks {', '.join(sorted({s.name for s in picked} - names)[:4]) or 'none'}, of all "
    f"{', '.join(sorted({s.name for s in all_biases} - names)[:4])}"
  )


def _is_unchanged(leaf: Any, base: Any, stored: StoredTensor) -> bool:
  """Returns whether a layer's part of a leaf is the base model's; False if that is a shape."""
  if not has_values(base):
    return False
  return np.array_equal(_whole(leaf, stored), _whole(base, stored))


def _whole(leaf: Any, stored: StoredTensor) -> np.ndarray:
  return np.asarray(leaf, np.float32)[stored.place]
