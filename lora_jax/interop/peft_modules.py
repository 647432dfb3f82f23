"""Adapters in the form of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

    base_model.model.transformer.h.0.attn.c_attn.lora_A.weight   (rank, in)    ours, transposed
    base_model.model.transformer.h.0.attn.c_attn.lora_B.weight   (out, rank)   likewise
    base_model.model.transformer.wte.lora_embedding_A            (rank, V)
    base_model.model.transformer.wte.lora_embedding_B            (D, rank)

Where PEFT adapts a fused weight and our leaves are its parts, an adapter goes over exactly. From
PEFT, all parts share A, and each has its rows of B. To PEFT, the As of the parts stand one below
another, with zeros in B where a part has no share in them, so that ranks add up; As that are equal
stand there once.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.models.hub import StoredTensor

Arrays = dict[str, np.ndarray]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Module:
  """A module with a weight: where it is in PEFT, and which leaves of ours it is."""

  def __init__(self, stored: StoredTensor, params: Mapping[str, Any]):
    self.stored = stored
    self.name = stored.name.removesuffix(".weight")
    stacked = stored.layer is not None
    self.shapes = [tuple(params[path].shape)[stacked:] for path in stored.paths]

  @property
  def is_linear(self) -> bool:
    return not self.stored.is_embedding

  @property
  def is_body(self) -> bool:
    """Whether it is what PEFT calls linear: neither an embedding nor the head."""
    return self.is_linear and self.name != "lm_head"

  @property
  def inputs(self) -> int:
    return self.shapes[0][0]

  @property
  def outputs(self) -> list[int]:
    return [shape[1] for shape in self.shapes]

  def factor_names(self) -> tuple[str, str]:
    """Returns the names of A and B in the file."""
    name = PREFIX + self.name
    if self.stored.is_embedding:
      return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def find_modules(tensors: Sequence[StoredTensor], leaves: Mapping[str, Any]) -> list[Module]:
  """Returns the linear layers and embeddings of a model."""
  return [
    Module(stored, leaves)
    for stored in tensors
    if stored.name.endswith(".weight")
    and len(leaves[stored.paths[0]].shape) - (stored.layer is not None) == 2
  ]


def is_encoder(tensors: Sequence[StoredTensor]) -> bool:
  """Tells whether a model is an encoder, with or without a classifier: no language model."""
  return any("encoder.layer." in stored.name for stored in tensors)


def check_tied(where: Path, embeddings: Sequence[Module], tensors: Sequence[StoredTensor]) -> None:
  """Raises ValueError if a trained embedding is the head too, where PEFT trains one use alone."""
  untied = is_encoder(tensors) or any(stored.name == "lm_head.weight" for stored in tensors)
  tied = [m.name for m in embeddings if re.search(r"(wte|embed_tokens|word_embeddings)$", m.name)]
  if tied and not untied:
    raise ValueError(
      f"{where}: {tied[0]} is the head too. PEFT trains its lookup alone, lora_jax both uses: they "
      "would compute different things. Leave it out, or untie the head"
    )
