"""Writes adapters in PEFT's format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.files import local_path
from lora_jax.interop.peft.fully_trained import CLASSIFIER, write_whole
from lora_jax.interop.peft.fused import with_one_rank
from lora_jax.interop.peft.modules import (
  CONFIG,
  SHAPES,
  WEIGHTS,
  Module,
  check_called,
  check_tied,
  factor_names,
  is_language_model,
  magnitude_name,
  module_shapes,
)
from lora_jax.interop.peft.names import pattern_of, shortest_endings
from lora_jax.interop.peft.parts import AdapterParts, check_parts
from lora_jax.interop.peft.tuners.norms import as_tuned
from lora_jax.interop.peft.tuners.table import TUNERS, tuner_type
from lora_jax.interop.peft.tuners.tokens import write_tokens
from lora_jax.interop.peft.tuners.tuner import Written, whole_number
from lora_jax.models.checkpoints.hub import StoredTensor, new_folder, save_tensors


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

  A variant that PEFT has is written as PEFT's own method; one that is plain LoRA, such as PiSSA, as
  that. `lora_jax.to_lora` makes plain LoRA of the others where it is exact, `lora_jax.convert` the
  nearest one. An adapter of no weights, `LoraConfig(1, 1.0, target=(), extra=lora_jax.NORMS)`, is
  LN tuning.

  Args:
    folder: to make.
    config: of the adapter.
    trainable: the trained tree.
    tensors: of the model in `transformers`, as `stored_tensors(config)` returns them.
    params: of the base model, or their shapes. DoRA of some of a fused weight's parts and trainable
      tokens need arrays.
    base_model: the base model's folder or hub repository, for the file.
    for_server: whether to write the format of adapter servers: one rank and one alpha for all
      modules (smaller ranks are padded with zeros), and no fully trained leaves. Variants that are
      plain LoRA are written as that, even if PEFT has them.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the adapter is not for the base model, or PEFT has no format for it.
  """
  folder = local_path(folder)
  if folder.exists():
    raise FileExistsError(f"{folder} exists; nothing is overwritten")
  parts = check_parts(config, trainable, tensors, params)
  check_called(folder, parts.adapted)
  kind = "LORA" if for_server else _method_of(parts)
  if kind == "LN_TUNING":
    check_tied(folder, parts.embeddings, tensors)
    written = as_tuned(_whole(parts, []), tensors, parts.leaves)
  elif kind == "LORA":
    written = _lora(folder, config, parts, for_server)
  else:
    written = _tuner(folder, config, parts, kind)
  fields = {
    "peft_type": kind,
    "base_model_name_or_path": base_model,
    "task_type": "CAUSAL_LM" if is_language_model(tensors) else None,
    "inference_mode": True,
    **written.fields,
  }
  if CLASSIFIER in fields.get("modules_to_save", ()):  # which PEFT then adds to modules_to_save
    fields["task_type"] = "SEQ_CLS"
  with new_folder(folder) as temporary:
    (temporary / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    save_tensors(temporary / WEIGHTS, written.arrays, _metadata(parts))


def _metadata(parts: AdapterParts) -> dict[str, str]:
  """Returns the shapes of the modules whose tensors do not tell them, for the file's header."""
  paths = {path for path, weight in parts.weights.items() if weight.weight_shape is not None}
  modules = [module for module in parts.adapted if paths & set(module.stored.paths)]
  return {SHAPES: json.dumps(module_shapes(modules))} if modules else {}


def _method_of(parts: AdapterParts) -> str:
  """Returns the `peft_type` for an adapter: LORA for one of several methods."""
  if not parts.weights:
    return "LN_TUNING"
  kinds = {tuner_type(parts.variant_of(path)) for path in parts.weights}
  return kinds.pop() if len(kinds) == 1 else "LORA"


def _tuner(folder: Path, config: LoraConfig, parts: AdapterParts, kind: str) -> Written:
  """Returns the fields and tensors of a method other than LoRA."""
  tuner = TUNERS[kind]
  tuner.check(folder, parts.adapted)
  modules = parts.of_modules()
  chosen = list(modules)
  if kind != "TRAINABLE_TOKENS":  # PEFT ties its rows, too
    check_tied(folder, parts.embeddings, parts.tensors)
  written, whole = tuner.write(modules, parts), _whole(parts, chosen)
  biases = whole.fields.pop("bias")
  if biases != "none" and tuner.only_biases is None:
    raise ValueError(
      f"PEFT's {tuner.name} trains no biases, except those of whole modules; `extra` has biases. "
      "Leave them out, or merge the adapter: lora_jax.interop.save_merged"
    )
  fields: dict[str, Any] = {
    "target_modules": _endings([m.name for m in chosen], parts.module_names)
  }
  if tuner.only_biases is not None:
    fields["bias"] = tuner.only_biases if biases == "lora_only" else biases
  if tuner.dropout is not None:
    fields[tuner.dropout] = config.dropout
  if tuner.has_linear and tuner.has_conv1d:
    fields["fan_in_fan_out"] = _fan_in_fan_out(chosen)
  fields |= {**whole.fields, **written.fields}
  return Written(fields, {**written.arrays, **whole.arrays})


def _whole(parts: AdapterParts, chosen: Sequence[Module]) -> Written:
  """Returns `modules_to_save`, `bias` and the tensors of the fully trained leaves."""
  adapted = {module.module for module in chosen}
  names, biases, arrays = write_whole(parts.extra, parts.tensors, parts.leaves, adapted)
  fields = {"bias": biases} | ({"modules_to_save": names} if names else {})
  return Written(fields, arrays)


def _lora(folder: Path, config: LoraConfig, parts: AdapterParts, for_server: bool) -> Written:
  """Returns the fields and tensors of LoRA or DoRA, with trained rows of embeddings."""
  kinds = {path: tuner_type(parts.variant_of(path)) for path in parts.weights}
  tokens = [path for path, kind in kinds.items() if kind == "TRAINABLE_TOKENS"]
  if for_server and (tokens or parts.extra):
    unread = "trainable tokens" if tokens else "fully trained leaves"
    raise ValueError(f"servers read no {unread}: {', '.join(tokens or parts.extra)}")
  low_rank = parts.without(tokens).as_lora()
  of_tokens = parts.without(low_rank.weights.keys()).of_modules()
  use_dora = low_rank.uses_dora("PEFT")
  if use_dora:
    _check_dora(low_rank.adapted, for_server)
  fused = low_rank.fuse(use_dora)
  check_tied(folder, low_rank.embeddings, parts.tensors)
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
  fields: dict[str, Any] = {
    "r": rank,
    "lora_alpha": whole_number(alpha),
    "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT has none of parameters
    "target_modules": _endings(linear, parts.module_names),
    "fan_in_fan_out": _fan_in_fan_out(chosen),
  }
  if parameters:
    fields["target_parameters"] = _endings(parameters, [stored.name for stored in parts.tensors])
  if ranks or alphas:
    alphas = {name: whole_number(value) for name, value in alphas.items()}
    fields |= {"rank_pattern": ranks, "alpha_pattern": alphas}
  if use_dora:
    fields["use_dora"] = True
  rows, whole = write_tokens(of_tokens, parts), _whole(low_rank, chosen)
  fields |= {**rows.fields, **whole.fields}
  return Written(fields, {**arrays, **rows.arrays, **whole.arrays})


def _fan_in_fan_out(modules: Sequence[Module]) -> bool:
  return not any(module.stored.transposed for module in modules if module.is_linear)


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
