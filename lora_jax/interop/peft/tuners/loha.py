"""LoHa: two pairs of factors, of an update (A1 B1) * (A2 B2).

base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a   (out, rank)   b1, transposed
base_model.model.model.layers.0.self_attn.q_proj.hada_w1_b   (rank, in)    a1, transposed
...hada_w2_a, hada_w2_b                                      the same of b2 and a2
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.leaves import Part
from lora_jax.interop.peft.modules import Arrays, Module
from lora_jax.interop.peft.parts import AdapterParts
from lora_jax.interop.peft.tuners.tuner import (
  Parts,
  Shapes,
  Tuner,
  Written,
  alpha_fields,
  key,
  only,
  rank_fields,
)
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.variants.loha import LOHA, weight

TENSORS = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}


def _shapes(
  config: PeftConfig, modules: Sequence[Module], tensors: Sequence[StoredTensor]
) -> Shapes:
  del tensors
  shapes: Shapes = {}
  for module in modules:
    rank, (num_outputs,) = config.rank_of(module.name), module.outputs
    for ours, theirs in TENSORS.items():
      shape = (num_outputs, rank) if ours in ("b1", "b2") else (rank, module.inputs)
      shapes[key(module, theirs)] = shape
  return shapes


def _read(
  config: PeftConfig, modules: Sequence[Module], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  del leaves
  parts = {}
  for module in modules:
    ours = {name: arrays[key(module, theirs)].T for name, theirs in TENSORS.items()}
    rank, scaling = config.rank_of(module.name), config.scaling_of(module.name)
    parts[module] = [Part(LOHA, ours, rank, scaling)]
  return parts


def _write(parts: Parts, adapter: AdapterParts) -> Written:
  del adapter
  of_modules = {module: only(of_module) for module, of_module in parts.items()}
  arrays = {
    key(module, theirs): part.arrays[ours].T
    for module, part in of_modules.items()
    for ours, theirs in TENSORS.items()
  }
  ranks = {module: part.rank for module, part in of_modules.items()}
  alphas = {module: part.scaling * part.rank for module, part in of_modules.items()}
  return Written(rank_fields(ranks) | alpha_fields(alphas), arrays)


TUNER = Tuner("LoHa", (weight,), _shapes, _read, _write, has_conv1d=False, splits=False)
