"""Writes adapters in PEFT's format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.files import local_path
from lora_jax.interop.peft.config import pattern_of, shortest_endings
from lora_jax.interop.peft.fused import check_parts, with_one_rank
from lora_jax.interop.peft.modules import (
  CONFIG,
  WEIGHTS,
  Arrays,
  Module,
  check_called,
  check_tied,
  factor_names,
  has_values,
  is_language_model,
  magnitude_name,
  whole_name,
)
from lora_jax.models.checkpoints.hub import StoredTensor, new_folder, save_tensors

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
  """Writes an adapter as a new folder that PEFT reads and that computes the same.

  Args:
    folder: to make.
    config: of the adapter.
    trainable: the trained tree.
    tensors: of the model in `transformers`, as `stored_tensors(config)` returns them.
    params: of the base model, or their shapes. DoRA of some of a fused weight's parts needs arrays.
    base_model: the base model's folder or hub repository, for the file.
    for_server: whether to write the format of adapter servers: one rank and one alpha for all
      modules (smaller ranks are padded with zeros), and no fully trained leaves.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the adapter is not for the base model, or PEFT has no format for it.
  """
  folder = local_path(folder)
  if folder.exists():
    raise FileExistsError(f"{folder} exists; nothing is overwritten")
  parts = check_parts(config, trainable, tensors, params)
  check_called(folder, parts.adapted)
  use_dora = parts.uses_dora("PEFT")
  if use_dora:
    _check_dora(parts.adapted, for_server)
  fused = parts.fuse(use_dora)
  check_tied(folder, [module for module in parts.trained if module.stored.is_embedding], tensors)
  if for_server:
    fused = with_one_rank(fused, config.alpha)
  chosen = list(fused)
  arrays = {}
  for module, joined in fused.items():
    factors = module.to_file(joined.a, joined.b)
    arrays |= dict(zip(factor_names(module, chosen), factors, strict=True))
    if joined.magnitude is not None:
      arrays[magnitude_name(module)] = joined.magnitude.reshape(module.magnitude_shape)
  parameters = [module.name for module in chosen if module.stored.is_parameter]
  linear = [module.name for module in chosen if not module.stored.is_parameter]
  if for_server and parameters:
    raise ValueError(
      f"servers read no target_parameters: {', '.join(parameters)}. Give tensors by which "
      "each expert has its own, stored_tensors(config, published=True)"
    )
  rank, ranks = pattern_of({module.name: joined.rank for module, joined in fused.items()})
  alpha, alphas = pattern_of({module.name: joined.alpha for module, joined in fused.items()})
  written = {
    "peft_type": "LORA",
    "base_model_name_or_path": base_model,
    "task_type": "CAUSAL_LM" if is_language_model(tensors) else None,
    "inference_mode": True,
    "r": rank,
    "lora_alpha": _whole_number(alpha),
    "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT has none of parameters
    "target_modules": _endings(linear, _names(parts.modules)),
    "bias": "none",
    "fan_in_fan_out": not any(module.stored.transposed for module in chosen if module.is_linear),
  }
  if parameters:
    written["target_parameters"] = _endings(parameters, [stored.name for stored in tensors])
  if ranks or alphas:
    alphas = {name: _whole_number(value) for name, value in alphas.items()}
    written |= {"rank_pattern": ranks, "alpha_pattern": alphas}
  if use_dora:
    written["use_dora"] = True
  if parts.extra:
    if for_server:
      raise ValueError(f"servers read no fully trained leaves: {', '.join(parts.extra)}")
    names, biases, full = _fully_trained(
      parts.extra, tensors, parts.leaves, {module.module for module in chosen}
    )
    written |= {"bias": biases, "modules_to_save": names or None}
    arrays |= full
    if CLASSIFIER in names:  # which PEFT then adds to modules_to_save
      written["task_type"] = "SEQ_CLS"
  _write(folder, written, arrays)


def _names(modules: Sequence[Module]) -> list[str]:
  """Returns the names of modules and of their parents, all of which an ending may match."""
  names = [module.name for module in modules if not module.stored.is_parameter]
  return list(dict.fromkeys([*names, *(name.rpartition(".")[0] for name in names)]))


def _whole_number(value: float) -> float:
  """Returns an integer where a number is one, as PEFT writes it."""
  return int(value) if value == int(value) else value


def _endings(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
  return shortest_endings(chosen, names) if chosen else []


def _check_dora(modules: Sequence[Module], for_server: bool) -> None:
  """Raises ValueError if PEFT or an adapter server has no DoRA for these modules."""
  if for_server:
    raise ValueError(
      "adapter servers read no DoRA: vLLM and SGLang refuse it. Write the nearest LoRA, "
      "lora_jax.convert(config, trainable, params, rank=...), or a merged model, "
      "lora_jax.interop.save_merged"
    )
  if experts := [m.name for m in modules if m.stored.is_parameter or m.stored.expert is not None]:
    raise ValueError(
      f"PEFT has no DoRA of target_parameters, as which it reads {', '.join(experts)}. Take the "
      "nearest LoRA of lora_jax.convert"
    )


def _fully_trained(
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


def _write(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> None:
  with new_folder(folder) as temporary:
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_tensors(temporary / WEIGHTS, arrays)
