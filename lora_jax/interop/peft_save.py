"""Writes adapters in PEFT's form."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.adapter import LoraWeight, adapter_extra, adapter_weights
from lora_jax.config import LoraConfig, find_leaves
from lora_jax.interop.peft_config import pattern_of, shortest_endings
from lora_jax.interop.peft_modules import (
  CONFIG,
  PREFIX,
  WEIGHTS,
  Arrays,
  Module,
  check_tied,
  find_modules,
  is_encoder,
)
from lora_jax.models.hub import StoredTensor, save_tensors
from lora_jax.trees import leaves_with_path

PyTree = Any

CLASSIFIER = "classifier"  # the head of a model for sequence classification


def save_peft(
  folder: str | Path,
  config: LoraConfig,
  trainable: PyTree,
  tensors: Sequence[StoredTensor],
  params: PyTree,
  *,
  base_model: str | None = None,
  for_server: bool = False,
) -> None:
  """Writes an adapter as a new folder that PEFT reads, and that computes the same.

  Args:
    folder: to make.
    config: of the adapter.
    trainable: the trained tree.
    tensors: of the model in `transformers`, as `stored_tensors(config)` returns them.
    params: of the base, or their shapes.
    base_model: the base's folder or hub repository, for the file.
    for_server: whether to write what adapter servers read: one rank and one alpha for all
      modules (smaller ranks are filled up with zeros), and nothing that is trained whole.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if PEFT has no form for the adapter.
  """
  if Path(folder).exists():
    raise FileExistsError(f"{folder} exists; nothing is overwritten")
  leaves = dict(leaves_with_path(params))
  weights, whole = adapter_weights(trainable), adapter_extra(trainable)
  scalings = {path: target.scaling for path, target in find_leaves(config, params)[0].items()}
  modules = find_modules(tensors, leaves)
  fused = {m.name: f for m in modules if (f := _fused(m, weights, scalings)) is not None}
  chosen = [module for module in modules if module.name in fused]
  placed = {path for module in chosen for path in module.stored.paths}
  if lost := sorted(set(weights) - placed):
    raise ValueError(f"the model has no module for the adapted {', '.join(lost)}")
  if not fused:
    raise ValueError("the trainable tree adapts no weight, and PEFT's form is for LoRA")
  trained = [m for m in modules if m in chosen or set(m.stored.paths) & set(whole)]
  check_tied(Path(folder), [m for m in trained if m.stored.is_embedding], tensors)
  if for_server:
    rank = max(one.rank for one in fused.values())
    fused = {name: one.with_rank(rank) for name, one in fused.items()}
  arrays = {}
  for module in chosen:
    one = fused[module.name]
    arrays |= dict(zip(module.factor_names(), (one.a, one.b), strict=True))
  rank, ranks = pattern_of({name: one.rank for name, one in fused.items()})
  alpha, alphas = pattern_of({name: one.alpha for name, one in fused.items()})
  written = {
    "peft_type": "LORA",
    "base_model_name_or_path": base_model,
    "task_type": None if is_encoder(tensors) else "CAUSAL_LM",
    "inference_mode": True,
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": config.dropout,
    "target_modules": shortest_endings(fused, [module.name for module in modules]),
    "bias": "none",
    "fan_in_fan_out": not any(module.stored.transposed for module in chosen if module.is_linear),
  }
  if ranks or alphas:
    written |= {"rank_pattern": ranks, "alpha_pattern": alphas}
  if whole:
    if for_server:
      raise ValueError(f"servers read no leaves that are trained whole: {', '.join(whole)}")
    names, of_whole = _modules_to_save(whole, tensors, leaves, set(fused))
    written["modules_to_save"], arrays = names, arrays | of_whole
    if CLASSIFIER in names:  # which PEFT then adds to what it trains whole
      written["task_type"] = "SEQ_CLS"
  _write(Path(folder), written, arrays)


@dataclasses.dataclass(frozen=True)
class _Fused:
  """One module's factors as PEFT has them: `alpha / rank * b @ a`."""

  a: np.ndarray  # (rank, in)
  b: np.ndarray  # (out, rank)
  alpha: float

  @property
  def rank(self) -> int:
    return len(self.a)

  def with_rank(self, rank: int) -> "_Fused":
    """Returns the same with zeros up to a rank, and alpha equal to it."""
    more = rank - self.rank
    b = self.b * np.float32(self.alpha / self.rank)
    return _Fused(np.pad(self.a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more))), float(rank))


def _fused(
  module: Module, weights: Mapping[str, LoraWeight], scalings: Mapping[str, float]
) -> _Fused | None:
  """Returns the factors of a module from those of its parts; None if none is adapted."""
  found = [_of_layer(weights.get(path), module.stored.layer) for path in module.stored.paths]
  if all(part is None for part in found):
    return None
  used = [scalings[p] for p, part in zip(module.stored.paths, found, strict=True) if part]
  scaling = used[0] if len(set(used)) == 1 else 1.0
  factors: list[np.ndarray] = []  # the different As
  blocks: list[np.ndarray] = []  # of B, (out, rank of that A)
  offsets = np.cumsum([0, *module.outputs])
  for path, part, start in zip(module.stored.paths, found, offsets, strict=False):
    if part is None:
      continue
    a, b = part
    b = b if scaling == scalings[path] else b * np.float32(scalings[path])
    same = (i for i, other in enumerate(factors) if np.array_equal(other, a))
    place = next(same, None)
    if place is None:
      place = len(factors)
      factors.append(a)
      blocks.append(np.zeros((sum(module.outputs), len(a)), np.float32))
    blocks[place][start : start + len(b)] = b
  a, b = np.concatenate(factors), np.concatenate(blocks, axis=1)
  return _Fused(a, b, scaling * len(a))


def _of_layer(weight: LoraWeight | None, layer: int | None) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns A (rank, in) and B (out, rank) of one layer; None if it is not adapted."""
  if weight is None:
    return None
  a, b = np.asarray(weight.lora_a, np.float32), np.asarray(weight.lora_b, np.float32)
  if layer is not None:
    layers = range(len(a)) if weight.layers is None else weight.layers
    if layer not in layers:
      return None
    a, b = a[list(layers).index(layer)], b[list(layers).index(layer)]
  if weight.axes.inputs > weight.axes.outputs:
    raise ValueError(f"PEFT has no form for factors with axes {weight.axes}")
  return a.T, b.T


def _modules_to_save(
  whole: Mapping[str, Any],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
  adapted: set[str],
) -> tuple[list[str], Arrays]:
  """Returns the modules that are trained whole, and their tensors."""
  by_module: dict[str, list[StoredTensor]] = {}
  for stored in tensors:
    by_module.setdefault(stored.name.rpartition(".")[0], []).append(stored)
  arrays: Arrays = {}
  names = []
  for module, of_module in by_module.items():
    paths = {path for stored in of_module for path in stored.paths}
    if not paths & set(whole):
      continue
    if module in adapted or not paths <= set(whole):
      raise ValueError(
        f"PEFT trains whole modules: {module} has {', '.join(sorted(paths))}, of which "
        f"{', '.join(sorted(paths & set(whole)))} are trained whole. Add the others to `extra`"
      )
    names.append(module)
    for stored in of_module:
      array = np.concatenate([_whole(whole[path], stored) for path in stored.paths], axis=-1)
      arrays[f"{PREFIX}{stored.name}"] = array.T if stored.transposed else array
  own = [name for name in by_module if name.split(".")[0] == CLASSIFIER]
  if own and set(own) <= set(names):
    names = [*(name for name in names if name not in own), CLASSIFIER]
  return names, arrays  # whole names: PEFT means all that end with a short one


def _whole(leaf: Any, stored: StoredTensor) -> np.ndarray:
  array = np.asarray(leaf, np.float32)
  return array if stored.layer is None else array[stored.layer]


def _write(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> None:
  """Writes a folder, whole or not at all."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
    new = Path(name) / "folder"
    new.mkdir()
    (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_tensors(new / WEIGHTS, arrays)
    os.rename(new, folder)
