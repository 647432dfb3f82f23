"""HiRA: LoRA's A and B, of an update W * (A B) without a scaling.

    base_model.model.model.layers.0.self_attn.q_proj.hira_A    (rank, in)    lora_a, transposed
    base_model.model.model.layers.0.self_attn.q_proj.hira_B    (out, rank)   lora_b, transposed
    base_model.model.model.embed_tokens.hira_embedding_A       (rank, V)
    base_model.model.model.embed_tokens.hira_embedding_B       (D, rank)

A scaling is multiplied into B. PEFT 0.21 gives all modules the rank `r`, whatever `rank_pattern`
says: lower ranks are padded with zeros. It adds an embedding's rows without the factor by which
Gemma multiplies them, and with it once they are merged: such an embedding is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.leaves import Part, split_outputs
from lora_jax.interop.peft.modules import Arrays, Module
from lora_jax.interop.peft.parts import AdapterParts
from lora_jax.interop.peft.tuners.tuner import (
  Parts,
  Shapes,
  Tuner,
  Written,
  joined,
  key,
)
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.variants.hira import HIRA, weight


def _names(module: Module) -> tuple[str, str]:
  """Returns the names of A and B in the file.

  Raises:
    ValueError: if the module is an embedding that the model scales.
  """
  if module.stored.is_scaled:
    raise ValueError(
      f"{module.name}: the model multiplies these rows by a constant, which PEFT's HiRA leaves out "
      "until it is merged. Leave the embedding out, or adapt it by LoRA"
    )
  kind = "hira_embedding" if module.stored.is_embedding else "hira"
  return key(module, f"{kind}_A"), key(module, f"{kind}_B")


def _shapes(
  config: PeftConfig, modules: Sequence[Module], tensors: Sequence[StoredTensor]
) -> Shapes:
  del tensors
  shapes: Shapes = {}
  for module in modules:
    of_module = module.factor_shapes(config.rank)
    shapes |= dict(zip(_names(module), of_module, strict=True))
  return shapes


def _read(
  config: PeftConfig, modules: Sequence[Module], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  del leaves
  parts = {}
  for module in modules:
    a, b = (arrays[name].T for name in _names(module))
    pieces = split_outputs(b, module.outputs)
    parts[module] = [Part(HIRA, {"lora_a": a, "lora_b": piece}, config.rank) for piece in pieces]
  return parts


def _write(parts: Parts, adapter: AdapterParts) -> Written:
  del adapter
  factors = {}
  for module, of_module in parts.items():
    scaled = [p and p._replace(arrays=p.arrays | {"lora_b": _scaled(p)}) for p in of_module]
    pair = joined(scaled, module.outputs, ["lora_a"], ["lora_b"])
    factors[module] = pair["lora_a"].T, pair["lora_b"].T
  rank, arrays = max(len(a) for a, _ in factors.values()), {}
  for module, (a, b) in factors.items():
    more = 0, rank - len(a)
    padded = np.pad(a, (more, (0, 0))), np.pad(b, ((0, 0), more))
    arrays |= dict(zip(_names(module), padded, strict=True))
  return Written({"r": rank}, arrays)


def _scaled(part: Part) -> np.ndarray:
  b = part.arrays["lora_b"]
  return b if part.scaling == 1 else b * np.float32(part.scaling)


TUNER = Tuner("HiRA", (weight,), _shapes, _read, _write, has_embeddings=True)
