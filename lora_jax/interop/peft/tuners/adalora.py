"""AdaLoRA: A, B and the e between them.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A   (rank, in)    lora_a, transposed
    base_model.model.model.layers.0.self_attn.q_proj.lora_E   (rank, 1)     lora_e
    base_model.model.model.layers.0.self_attn.q_proj.lora_B   (out, rank)   lora_b, transposed

The file lacks the triplets that were pruned: `rank_pattern` has, for each of the `init_r` of a
module, whether it is there. Here they are zeros, so that all weights keep one rank. Written are the
triplets whose e is not 0, or all if every e of the adapter is: it was not trained yet.

The scaling is alpha / (init_r + 1e-5), whatever was pruned. Where ours differ, e is rescaled.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.fields import AdaLoraFields
from lora_jax.interop.peft.leaves import Part, split_outputs
from lora_jax.interop.peft.modules import Arrays, Module
from lora_jax.interop.peft.names import usual
from lora_jax.interop.peft.parts import AdapterParts
from lora_jax.interop.peft.tuners.tuner import (
  Parts,
  Shapes,
  Tuner,
  Written,
  joined,
  key,
  whole_number,
)
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.variants.adalora import ADALORA, weight

ADDED = 1e-5
"""To the rank, in PEFT's scaling."""


def _kept(config: PeftConfig, module: Module) -> np.ndarray:
  """Returns for each triplet whether the file has it."""
  fields: AdaLoraFields = config.fields
  name = f"{module.name}.lora_E"
  patterns = fields.rank_pattern or {}
  entries = [pattern for place, pattern in patterns.items() if place in (name, f"{name}.default")]
  if not patterns:
    return np.ones(fields.init_r, bool)
  pattern = entries[0] if entries else None
  if not isinstance(pattern, list) or {*map(type, pattern)} - {bool}:
    raise ValueError(
      f"rank_pattern[{name!r}] must be a list of true and false, one for each of init_r="
      f"{fields.init_r}, got {repr(pattern)[:100]}"
    )
  if len(pattern) != fields.init_r:
    raise ValueError(
      f"rank_pattern[{name!r}] has {len(pattern)} entries, expected init_r={fields.init_r}"
    )
  return np.array(pattern)


def _names(module: Module) -> tuple[str, str, str]:
  return key(module, "lora_A"), key(module, "lora_E"), key(module, "lora_B")


def _shapes(
  config: PeftConfig, modules: Sequence[Module], tensors: Sequence[StoredTensor]
) -> Shapes:
  del tensors
  shapes: Shapes = {}
  for module in modules:
    rank = int(_kept(config, module).sum())
    of_module = (rank, module.inputs), (rank, 1), (sum(module.outputs), rank)
    shapes |= dict(zip(_names(module), of_module, strict=True))
  return shapes


def _read(
  config: PeftConfig, modules: Sequence[Module], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  del leaves
  rank, parts = config.rank, {}
  for module in modules:
    kept = _kept(config, module)
    stored_a, stored_e, stored_b = (arrays[name] for name in _names(module))
    sizes = module.inputs, 1, sum(module.outputs)
    a, e, b = (np.zeros((rank, size), np.float32) for size in sizes)
    a[kept], e[kept], b[kept] = stored_a, stored_e, stored_b.T
    parts[module] = [
      Part(
        ADALORA,
        {"lora_a": a.T, "lora_e": e[:, 0], "lora_b": piece},
        rank,
        config.alpha / (rank + ADDED),
      )
      for piece in split_outputs(b, module.outputs)
    ]
  return parts


def _write(parts: Parts, adapter: AdapterParts) -> Written:
  del adapter
  scaling = usual(part.scaling for of_module in parts.values() for part in of_module if part)
  by_module = {
    module: joined(
      [part and _rescaled(part, scaling) for part in of_module],
      module.outputs,
      ["lora_a", "lora_e"],
      ["lora_b"],
    )
    for module, of_module in parts.items()
  }
  rank = max(len(arrays["lora_e"]) for arrays in by_module.values())
  is_trained = any(arrays["lora_e"].any() for arrays in by_module.values())
  arrays: Arrays = {}
  pattern: dict[str, list[bool]] = {}
  for module, of_module in by_module.items():
    a, e, b = (of_module[name] for name in ("lora_a", "lora_e", "lora_b"))
    kept = (e != 0) | (not is_trained)
    tensors = a.T[kept], e[kept, None], b[kept].T
    arrays |= dict(zip(_names(module), tensors, strict=True))
    padded = np.pad(kept, (0, rank - len(kept)))
    pattern[f"{module.name}.lora_E"] = [bool(each) for each in padded]
  fields: dict[str, Any] = {
    "init_r": rank,
    "target_r": rank,
    "lora_alpha": _alpha(scaling, rank),
    "total_step": 1,  # which PEFT demands; the file does not depend on it
  }
  if not all(map(all, pattern.values())):
    fields["rank_pattern"] = pattern
  return Written(fields, arrays)


def _rescaled(part: Part, scaling: float) -> Part:
  if part.scaling == scaling:
    return part
  e = part.arrays["lora_e"] * np.float32(part.scaling / scaling)
  return part._replace(arrays=part.arrays | {"lora_e": e})


def _alpha(scaling: float, rank: int) -> float:
  """Returns the alpha of a scaling; that of PEFT's own files to the digit."""
  alpha = scaling * (rank + ADDED)
  return whole_number(round(alpha, 9))


TUNER = Tuner(
  "AdaLoRA",
  (weight,),
  _shapes,
  _read,
  _write,
  only_biases="lora_only",
  dropout="lora_dropout",
)
