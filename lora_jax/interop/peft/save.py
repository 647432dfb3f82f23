"""Writes adapters in PEFT's form."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight, adapter_extra, adapter_weights
from lora_jax.adapters.targets import find_leaves
from lora_jax.interop.peft.config import pattern_of, shortest_endings
from lora_jax.interop.peft.modules import (
  CONFIG,
  WEIGHTS,
  Arrays,
  Module,
  check_called,
  check_tied,
  factor_names,
  find_modules,
  is_language_model,
  whole_name,
)
from lora_jax.models.checkpoints.hub import StoredTensor, new_folder, save_tensors
from lora_jax.trees import leaves_with_path

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
  check_called(Path(folder), [m for m in modules if set(m.stored.paths) & set(weights)])
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
    factors = module.to_file(fused[module.name].a, fused[module.name].b)
    arrays |= dict(zip(factor_names(module, chosen), factors, strict=True))
  parameters = [module.name for module in chosen if module.stored.is_parameter]
  linear = [module.name for module in chosen if not module.stored.is_parameter]
  if for_server and parameters:
    raise ValueError(
      f"the form for servers has no target_parameters: {', '.join(parameters)}. Give the tensors "
      "where each expert has its own, stored_tensors(config, published=True)"
    )
  rank, ranks = pattern_of({name: one.rank for name, one in fused.items()})
  alpha, alphas = pattern_of({name: one.alpha for name, one in fused.items()})
  written = {
    "peft_type": "LORA",
    "base_model_name_or_path": base_model,
    "task_type": "CAUSAL_LM" if is_language_model(tensors) else None,
    "inference_mode": True,
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT has none of parameters
    "target_modules": _endings(linear, _names(modules)),
    "bias": "none",
    "fan_in_fan_out": not any(module.stored.transposed for module in chosen if module.is_linear),
  }
  if parameters:
    written["target_parameters"] = _endings(parameters, [stored.name for stored in tensors])
  if ranks or alphas:
    written |= {"rank_pattern": ranks, "alpha_pattern": alphas}
  if whole:
    if for_server:
      raise ValueError(f"servers read no leaves that are trained whole: {', '.join(whole)}")
    names, biases, of_whole = _trained_whole(whole, tensors, leaves, {m.module for m in chosen})
    written |= {"bias": biases, "modules_to_save": names or None}
    arrays |= of_whole
    if CLASSIFIER in names:  # which PEFT then adds to what it trains whole
      written["task_type"] = "SEQ_CLS"
  _write(Path(folder), written, arrays)


def _names(modules: Sequence[Module]) -> list[str]:
  """Returns the names of modules, and of those that they are parts of, which endings might mean."""
  names = [module.name for module in modules if not module.stored.is_parameter]
  return list(dict.fromkeys([*names, *(name.rpartition(".")[0] for name in names)]))


def _endings(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
  return shortest_endings(chosen, names) if chosen else []


@dataclasses.dataclass(frozen=True)
class _Fused:
  """One module's factors as PEFT has them: `alpha / rank * b @ a`."""

  a: np.ndarray  # (rank, in), of stacked experts (experts, rank, in)
  b: np.ndarray  # (out, rank), likewise
  alpha: float

  @property
  def rank(self) -> int:
    return self.a.shape[-2]

  def with_rank(self, rank: int) -> "_Fused":
    """Returns the same with zeros up to a rank, and alpha equal to it."""
    more, experts = (0, rank - self.rank), [(0, 0)] * (self.a.ndim - 2)
    b = self.b * np.float32(self.alpha / self.rank)
    a, b = np.pad(self.a, (*experts, more, (0, 0))), np.pad(b, (*experts, (0, 0), more))
    return _Fused(a, b, float(rank))


def _fused(
  module: Module, weights: Mapping[str, LoraWeight], scalings: Mapping[str, float]
) -> _Fused | None:
  """Returns the factors of a module from those of its parts; None if none is adapted."""
  found = [_of_place(weights.get(path), module) for path in module.stored.paths]
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
      zeros = np.zeros((*module.experts, sum(module.outputs), a.shape[-2]), np.float32)
      blocks.append(zeros)
    blocks[place][..., start : start + b.shape[-2], :] = b
  a, b = np.concatenate(factors, axis=-2), np.concatenate(blocks, axis=-1)
  return _Fused(a, b, scaling * a.shape[-2])


def _of_place(weight: LoraWeight | None, module: Module) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns A (..., rank, in) and B (..., out, rank) of a module; None if it is not adapted."""
  if weight is None:
    return None
  if weight.axes.inputs > weight.axes.outputs:
    raise ValueError(f"PEFT has no form for factors with axes {weight.axes}")
  a, b = np.asarray(weight.lora_a, np.float32), np.asarray(weight.lora_b, np.float32)
  if module.is_conv:
    return module.stored.to_file(a).reshape(a.shape[-1], -1), b.T
  place, layers = module.stored.place, weight.layers
  if layers is not None and not place:  # some experts; the others are zero
    some, (a, b) = (a, b), (np.zeros((*module.experts, *x.shape[1:]), np.float32) for x in (a, b))
    a[list(layers)], b[list(layers)] = some
  elif layers is not None:
    if place[0] not in layers:
      return None
    place = (layers.index(place[0]), *place[1:])
  return a[place].swapaxes(-1, -2), b[place].swapaxes(-1, -2)


def _trained_whole(
  whole: Mapping[str, Any],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
  adapted: set[str],
) -> tuple[list[str], str, Arrays]:
  """Returns the modules that are trained whole, PEFT's word for the other biases, and the tensors.

  Args:
    whole: the leaves that are trained whole, by path.
    tensors: of the model.
    leaves: of the base, or their shapes.
    adapted: the names of the adapted modules.
  """
  by_module: dict[str, list[StoredTensor]] = {}
  for stored in tensors:
    by_module.setdefault(stored.module, []).append(stored)
  names: list[str] = []
  trained: list[StoredTensor] = []
  biases: list[StoredTensor] = []
  for module, of_module in by_module.items():
    paths = {path for stored in of_module for path in stored.paths}
    if not paths & set(whole):
      continue
    if module not in adapted and paths <= set(whole):
      names.append(module)
      trained += of_module
      continue
    own = [stored for stored in of_module if stored.is_bias and set(stored.paths) <= set(whole)]
    if paths & set(whole) - {path for stored in own for path in stored.paths}:
      raise ValueError(
        f"PEFT trains whole modules: {module} has {', '.join(sorted(paths))}, of which "
        f"{', '.join(sorted(paths & set(whole)))} are trained whole. Add the others to `extra`"
      )
    biases += own
  saved = {stored.name for stored in trained}
  others = [stored for stored in tensors if stored.is_bias and stored.name not in saved]
  word, biases = _which_biases(biases, others, adapted, whole, leaves)
  arrays = {}
  for stored in (*trained, *biases):
    array = np.concatenate([_whole(whole[path], stored) for path in stored.paths], axis=-1)
    arrays[whole_name(stored, adapted)] = stored.to_file(array)
  own = [name for name in by_module if name.split(".")[0] == CLASSIFIER]
  if own and set(own) <= set(names):
    names = [*(name for name in names if name not in own), CLASSIFIER]
  return names, word, arrays  # whole names: PEFT means all that end with a short one


def _which_biases(
  trained: Sequence[StoredTensor],
  all_biases: Sequence[StoredTensor],
  adapted: set[str],
  whole: Mapping[str, Any],
  leaves: Mapping[str, Any],
) -> tuple[str, list[StoredTensor]]:
  """Returns PEFT's word for trained biases, and which tensors these are.

  Of stacked layers those that are as the base has them need not be among them.
  """
  own = [stored for stored in all_biases if stored.module in adapted]
  if not trained:
    return "none", []
  if len(trained) == len(all_biases):
    return "all", list(trained)
  changed = [
    stored
    for stored in trained
    if not stored.place or not all(_is_of_base(whole[p], leaves[p], stored) for p in stored.paths)
  ]
  names = {stored.name for stored in trained}
  if {s.name for s in changed} <= {s.name for s in own} <= names:
    return "lora_only", own
  raise ValueError(
    "PEFT trains all biases, or those of the adapted modules, or modules as a whole; `extra` has "
    f"{', '.join(sorted(s.name for s in changed)[:4])} and others. Of the adapted modules' it "
    f"lacks {', '.join(sorted({s.name for s in own} - names)[:4]) or 'none'}, of all "
    f"{', '.join(sorted({s.name for s in all_biases} - names)[:4])}"
  )


def _is_of_base(leaf: Any, base: Any, stored: StoredTensor) -> bool:
  """Returns whether a layer's part of a leaf is the base's; never, of a base's shapes."""
  if isinstance(base, jax.ShapeDtypeStruct):
    return False
  return np.array_equal(_whole(leaf, stored), _whole(base, stored))


def _whole(leaf: Any, stored: StoredTensor) -> np.ndarray:
  return np.asarray(leaf, np.float32)[stored.place]


def _write(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> None:
  with new_folder(folder) as new:
    (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_tensors(new / WEIGHTS, arrays)
