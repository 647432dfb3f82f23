"""MiSS: one shard for each module, as here, and no scaling, which is multiplied into the shard.

    base_model.model.model.layers.0.self_attn.q_proj.miss_block  (rank, out)               shard
                                                                 (rank, mini)              mini
                                                                 (out / rank, rank, rank)  bat

The mode is `init_weights`; rank and mode are those of all modules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.adapters.delta import Variant
from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.fields import MissFields
from lora_jax.interop.peft.leaves import Part
from lora_jax.interop.peft.modules import Arrays, Module
from lora_jax.interop.peft.parts import AdapterParts
from lora_jax.interop.peft.tuners.tuner import (
  Parts,
  Shapes,
  Tuner,
  Written,
  key,
  one_of_all,
  only,
)
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.variants.miss import (
  MISS,
  MISS_BAT,
  bat_weight,
  mini_weight,
  miss_mini_variant,
  weight,
)

MODES: Mapping[Callable[..., Any], bool | str] = {
  weight: True,
  mini_weight: "mini",
  bat_weight: "bat",
}


def _variant(fields: MissFields) -> Variant:
  if fields.init_weights == "mini":
    return miss_mini_variant(fields.mini_r)
  return MISS_BAT if fields.init_weights == "bat" else MISS


def _shapes(
  config: PeftConfig, modules: Sequence[Module], tensors: Sequence[StoredTensor]
) -> Shapes:
  del tensors
  fields: MissFields = config.fields
  shapes: Shapes = {}
  for module in modules:
    (num_outputs,), rank = module.outputs, fields.r
    if fields.init_weights == "bat":
      _check_divides("r", rank, module, (module.inputs, num_outputs))
      shape = num_outputs // rank, rank, rank
    elif fields.init_weights == "mini":
      _check_divides("mini_r", fields.mini_r, module, (num_outputs,))
      shape = rank, fields.mini_r
    else:
      shape = rank, num_outputs
    shapes[key(module, "miss_block")] = shape
  return shapes


def _check_divides(name: str, size: int, module: Module, sizes: Sequence[int]) -> None:
  if any(each % size for each in sizes):
    raise ValueError(
      f"{name}={size} must divide the sides of {module.name}, {' x '.join(map(str, sizes))}: the "
      "config is of another model, or has been changed"
    )


def _read(
  config: PeftConfig, modules: Sequence[Module], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  del leaves
  variant, rank = _variant(config.fields), config.fields.r
  return {m: [Part(variant, {"shard": arrays[key(m, "miss_block")]}, rank)] for m in modules}


def _write(parts: Parts, adapter: AdapterParts) -> Written:
  del adapter
  of_modules = {module: only(of_module) for module, of_module in parts.items()}
  modes = {module: MODES[part.variant.weight] for module, part in of_modules.items()}
  mode = one_of_all(modes, "MiSS", "mode (init_weights)")
  rank = one_of_all({m: part.rank for m, part in of_modules.items()}, "MiSS", "rank")
  fields = {"r": rank, "init_weights": mode}
  if mode == "mini":
    sizes = {module: part.arrays["shard"].shape[-1] for module, part in of_modules.items()}
    fields["mini_r"] = one_of_all(sizes, "MiSS", "mini_r")
  arrays = {
    key(module, "miss_block"): part.arrays["shard"] * np.float32(part.scaling)
    for module, part in of_modules.items()
  }
  return Written(fields, arrays)


TUNER = Tuner(
  "MiSS",
  tuple(MODES),
  _shapes,
  _read,
  _write,
  has_conv1d=False,
  splits=False,
  only_biases="MiSS_only",
)
