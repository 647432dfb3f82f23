"""VeRA: two vectors for each module, and two matrices that all modules share.

    base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d   (rank,)   vera_d
    base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b   (out,)    vera_b
    base_model.vera_A   (rank, largest in)    vera_in, transposed
    base_model.vera_B   (largest out, rank)   vera_out, transposed

PEFT has one rank; the d of a weight with a lower one is padded with zeros. A module of several of
our weights, such as GPT-2's `c_attn`, is not exchanged: it has one d, and each of its outputs a
column of B of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.adapters.delta import SHARED_AXES, LoraWeight, shared_path
from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.leaves import Part
from lora_jax.interop.peft.modules import Arrays, Module
from lora_jax.interop.peft.parts import AdapterParts
from lora_jax.interop.peft.tuners.tuner import Parts, Shapes, Tuner, Written, key, only
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.variants.vera import VERA, weight

A, B = "base_model.vera_A", "base_model.vera_B"
D, SCALES = "vera_lambda_d", "vera_lambda_b"


def _shapes(
  config: PeftConfig, modules: Sequence[Module], tensors: Sequence[StoredTensor]
) -> Shapes:
  del tensors
  rank = config.rank
  shapes: Shapes = {}
  for module in modules:
    shapes |= {key(module, D): (rank,), key(module, SCALES): (sum(module.outputs),)}
  largest_in = max(module.inputs for module in modules)
  largest_out = max(sum(module.outputs) for module in modules)
  return shapes | {A: (rank, largest_in), B: (largest_out, rank)}


def _read(
  config: PeftConfig, modules: Sequence[Module], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  del leaves
  return {
    module: [
      Part(
        VERA,
        {"vera_d": arrays[key(module, D)], "vera_b": arrays[key(module, SCALES)]},
        config.rank,
      )
    ]
    for module in modules
  }


def _read_shared(arrays: Arrays) -> dict[str, LoraWeight]:
  table = VERA.shared_table
  assert table is not None
  shared = {"vera_in": arrays[A].T, "vera_out": arrays[B].T}
  return {shared_path(VERA.name): LoraWeight.from_arrays(shared, table, SHARED_AXES, None)}


def _write(parts: Parts, adapter: AdapterParts) -> Written:
  if len(adapter.shared) > 1:
    raise ValueError(
      "PEFT's VeRA has one A and one B for all modules, and this adapter has those of "
      f"{', '.join(adapter.shared)}. Take plain LoRA, by lora_jax.to_lora or lora_jax.convert"
    )
  (node,) = adapter.shared.values()
  a, b = (np.asarray(node.arrays[name], np.float32).T for name in ("vera_in", "vera_out"))
  arrays = {A: a, B: b}
  for module, of_module in parts.items():
    vectors = only(of_module).arrays
    arrays[key(module, D)] = np.pad(vectors["vera_d"], (0, len(a) - len(vectors["vera_d"])))
    arrays[key(module, SCALES)] = vectors["vera_b"]
  return Written({"r": len(a), "save_projection": True}, arrays)


TUNER = Tuner(
  "VeRA",
  (weight,),
  _shapes,
  _read,
  _write,
  read_shared=_read_shared,
  splits=False,
  only_biases="vera_only",
  dropout="vera_dropout",
)
