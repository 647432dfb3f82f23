"""Merges an adapter into its base model, as a new Hugging Face folder in the same dtype.

The base model's files are copied, and the bytes of adapted or fully trained tensors are overwritten
one tensor at a time. All other bytes stay as they are, and the model is never in memory as a whole.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.biases import bias_gains, find_biases
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight, adapter_extra, whole_weights
from lora_jax.adapters.targets import find_leaves, shapes
from lora_jax.adapters.weights import merge_weight
from lora_jax.axes import LoraAxes
from lora_jax.files import local_path
from lora_jax.models.checkpoints.encoder_folder import OLD_NAMES
from lora_jax.models.checkpoints.hub import (
  FLOATS,
  INDEX,
  StoredTensor,
  Tensors,
  new_folder,
  open_tensors,
  weight_files,
)
from lora_jax.models.checkpoints.stored import expected_shapes
from lora_jax.trees import leaves_with_path, replace_leaves
from lora_jax.variants.lora import LORA

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")  # configs, tokenizers, templates


def save_merged(
  folder: str | Path,
  base_folder: str | Path,
  config: LoraConfig,
  trainable: PyTree,
  tensors: Sequence[StoredTensor],
  params: PyTree,
) -> dict[str, float]:
  """Merges an adapter into its base model, in a new folder that `transformers` reads.

  Each weight is merged in float32 and rounded once, to its dtype in the base model's folder.

  Args:
    folder: to make.
    base_folder: from which the base model was loaded.
    config: of the adapter.
    trainable: the trained tree.
    tensors: of the model in `base_folder`: `stored_tensors(config)`, or
      `stored_tensors(config, published=True)` of a mixture whose experts have tensors of their own.
    params: of the base model, or their shapes.

  Returns:
    The rounding error of each adapted or fully trained leaf, as in `lora_jax.merge_error`:
    max|merged - exact| / max|exact|, the largest over stacked layers.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the adapter is not for the base model, the folder has another model, or a merged
      weight is too large for its dtype.
  """
  folder, base_folder = local_path(folder), local_path(base_folder)
  new_leaves = _NewLeaves(config, trainable, params)
  leaves = dict(leaves_with_path(params))
  names, index = weight_files(base_folder)
  with open_tensors(base_folder) as base, new_folder(folder) as new_copy:
    changed = _changed(base_folder, base, tensors, leaves, new_leaves)
    for name in (*_others(base_folder, index is not None), *names):
      shutil.copyfile(base_folder / name, new_copy / name)
    for tensor, stored in changed.items():
      merged = new_leaves.put_into(base.read(tensor), stored, leaves)
      name, start = base.place(tensor)
      with (new_copy / name).open("r+b") as file:
        file.seek(start)
        file.write(merged.reshape(-1).view(np.uint8).data)
  return new_leaves.errors


def merged_params(
  config: LoraConfig, trainable: PyTree, params: PyTree, dtype: Any
) -> tuple[PyTree, dict[str, float]]:
  """Returns a base model's params with an adapter merged into them, in another dtype.

  For models with parts that the base model's folder lacks, such as a new head. Leaves are merged
  one at a time in float32 and rounded once.

  Args:
    config: of the adapter.
    trainable: the trained tree.
    params: of the base model.
    dtype: of the result.

  Returns:
    The params, on the host, and the rounding errors, as in `save_merged`.
  Raises:
    ValueError: if the adapter is not for the base model, or a merged weight is too large for
      `dtype`.
  """
  leaves = _NewLeaves(config, trainable, params)

  def merged(path: str, leaf: Any) -> np.ndarray:
    wide = np.asarray(leaf, np.float32)
    return (
      leaves.rounded(wide, path, (), np.dtype(dtype))
      if path in leaves.errors
      else wide.astype(dtype)
    )

  return replace_leaves(
    params, {p: merged(p, x) for p, x in leaves_with_path(params)}
  ), leaves.errors


class _NewLeaves:
  """The leaves that replace a base model's, and their rounding errors."""

  def __init__(self, config: LoraConfig, trainable: PyTree, params: PyTree):
    targets, extra = find_leaves(config, params)
    check_adapter(trainable, targets, extra)
    self._targets = targets
    self._weights = whole_weights(trainable, shapes(targets))
    self._full = adapter_extra(trainable)
    biases = find_biases(targets, extra, params)
    self._gains = bias_gains(biases, trainable, targets)
    self.errors = dict.fromkeys((*self._weights, *self._gains, *self._full), 0.0)

  def put_into(
    self, array: np.ndarray, stored: StoredTensor, leaves: Mapping[str, Any]
  ) -> np.ndarray:
    """Returns a tensor of the base model with its new parts, in its own dtype."""
    array = np.array(array, order="C")
    leaf_parts = stored.to_ours(array)
    stop = 0
    for path in stored.paths:
      start, stop = stop, stop + leaves[path].shape[-1]
      if path in self.errors:
        part = leaf_parts[..., start:stop]
        part[...] = self.rounded(part, path, stored.place, array.dtype)
    return array

  def rounded(
    self, base: np.ndarray, path: str, place: tuple[int, ...], dtype: np.dtype
  ) -> np.ndarray:
    """Returns the new part of a leaf in a dtype, and records the rounding error."""
    exact = self._exact(base, path, place)
    with np.errstate(over="ignore"):  # is raised below
      part = exact.astype(dtype)
    size, error = np.abs(exact).max(), np.abs(part.astype(exact.dtype) - exact).max()
    if not np.isfinite(error):
      raise ValueError(
        f"{path}: merged, it has values up to {size:g}, which {dtype} cannot hold. Take a base "
        "model in another dtype"
      )
    self.errors[path] = max(self.errors[path], float(error / size) if size else 0.0)
    return part

  def _exact(self, base: np.ndarray, path: str, place: tuple[int, ...]) -> np.ndarray:
    """Returns the new part in float32, before rounding."""
    if path in self._full:
      return np.asarray(self._full[path][place], np.float32)
    wide = base.astype(np.float32)
    if path in self._gains:
      return wide * np.asarray(self._gains[path][place])
    weight = self._weights[path]
    for i in place:
      weight = None if weight is None else _of_layer(path, weight, i)
    if weight is None:
      return wide
    with jax.default_matmul_precision("float32"):
      variant, scaling = self._targets[path].variant or LORA, self._targets[path].scaling
      return np.asarray(merge_weight(jnp.asarray(wide), weight, variant, scaling))


def _of_layer(path: str, weight: LoraWeight, layer: int) -> LoraWeight | None:
  """Returns the arrays of one layer or expert of a stack; None if it is not adapted."""
  if weight.axes.batch[:1] != (0,):
    raise ValueError(f"{path}: expected layers or experts to be a batch axis, got {weight.axes}")
  if weight.layers is not None:
    if layer not in weight.layers:
      return None
    layer = weight.layers.index(layer)
  batch, inputs, outputs = (tuple(dim - 1 for dim in dims) for dims in weight.axes)
  axes = LoraAxes(batch[1:], inputs, outputs)
  arrays = {
    spec.name: weight.arrays[spec.name][layer if "batch" in spec.words.split() else ...]
    for spec in weight.table
  }
  return LoraWeight.from_arrays(arrays, weight.table, axes, None)


def _changed(
  folder: Path,
  base: Tensors,
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
  new_leaves: _NewLeaves,
) -> dict[str, StoredTensor]:
  """Returns the tensors to write, by their names in the base model's files.

  Raises:
    ValueError: if one is missing or misshapen, or a leaf is in no tensor.
  """
  present = set(base)
  prefixes = sorted({name.partition(".")[0] for name in present})

  def name_of(stored: StoredTensor) -> str:
    """Returns a tensor's name in the files, which may lack the model's prefix or have another."""
    candidates = [stored.name, stored.name.partition(".")[2]]
    candidates += [f"{prefix}.{stored.name}" for prefix in prefixes]
    for now, old in OLD_NAMES.items():
      candidates += [name.removesuffix(now) + old for name in candidates if name.endswith(now)]
    return next((name for name in candidates if name in present), stored.name)

  changed = {
    name_of(stored_tensor): stored_tensor
    for stored_tensor in tensors
    if new_leaves.errors.keys() & set(stored_tensor.paths)
  }
  if missing := sorted(
    set(new_leaves.errors) - {p for stored_tensor in changed.values() for p in stored_tensor.paths}
  ):
    raise ValueError(f"the model has no tensor for {', '.join(missing)}")
  expected = expected_shapes(list(changed.values()), leaves)
  for name, stored_tensor in changed.items():
    shape = base.shape(name) if name in present else None
    if shape != expected[stored_tensor.name] or base.dtype(name) not in FLOATS:
      got = "nothing" if shape is None else f"{base.dtype(name)} {shape}"
      raise ValueError(
        f"{folder}: {name}: expected floats of shape {expected[stored_tensor.name]}, got {got}. "
        "Give the folder from which the base model was loaded"
      )
  for other in present - {
    name_of(stored_tensor) for stored_tensor in tensors
  }:  # a tied head that is written out
    for name, stored_tensor in list(changed.items()):
      same = stored_tensor.is_embedding and base.shape(other) == base.shape(name)
      same = same and base.dtype(other) == base.dtype(name)
      if same and np.array_equal(base.read(other), base.read(name)):
        changed[other] = stored_tensor
  return changed


def _others(folder: Path, has_index: bool) -> list[str]:
  """Returns the names of the other files to copy, without those that describe other weights."""
  names = {path.name for kind in COPIED for path in folder.glob(kind) if path.is_file()}
  stale = {name for name in names if name.endswith(".index.json")} | {"adapter_config.json"}
  return sorted(names - stale) + ([INDEX] if has_index else [])
