"""Prompt tuning of PEFT: the vectors of `prefix_embedding`, all of them before the prompt.

    prompt_embeddings   (slots, D)   lora_added/prefix_embedding

PEFT puts its virtual tokens before all others, and so does `lora_jax.Slots(num_prefix)`. It has no
infix slots. Where a model multiplies embeddings by sqrt(D), as Gemma, `transformers` does so in the
lookup, which PEFT's vectors replace: they are sqrt(D) times ours.

An encoder's head reads the first token. That is a virtual token in PEFT and [CLS] here, so adapters
of encoders are not exchanged.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.parts import ADDED
from lora_jax.fields import Count
from lora_jax.files import local_path, read_json
from lora_jax.interop.peft.config import PROMPT_TUNING, PeftConfig, read_fields
from lora_jax.interop.peft.modules import CONFIG, WEIGHTS, Module, find_modules, is_encoder
from lora_jax.interop.peft.read import check_folder, read_arrays, which_base
from lora_jax.methods.prefix import PREFIX_EMBEDDING
from lora_jax.models.checkpoints.hub import StoredTensor, new_folder, save_tensors
from lora_jax.trees import leaves_with_path, weights_with_path

VECTORS = "prompt_embeddings"
IGNORED = {  # about the initial vectors, and what PEFT fills in from the model
  *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
  *("num_layers", "num_attention_heads"),
}


@dataclasses.dataclass(frozen=True)
class PromptFields:
  """The fields of `adapter_config.json` that are read."""

  num_virtual_tokens: Count
  token_dim: Count | None = None
  num_transformer_submodules: Literal[1] | None = None  # 2 of an encoder with a decoder
  modules_to_save: tuple[str, ...] | None = None
  base_model_name_or_path: str | None = None
  inference_mode: bool | None = None


def save_peft_prompt(
  folder: str | Path,
  trainable: PyTree,
  tensors: Sequence[StoredTensor],
  params: PyTree,
  *,
  base_model: str | None = None,
) -> None:
  """Writes the vectors of `lora_jax.prefix_embedding` as PEFT's prompt tuning, in a new folder.

  PEFT computes the same if all slots are before the prompt, `lora_jax.Slots(num_slots)`, which the
  tree does not tell.

  Args:
    folder: to make.
    trainable: the trained tree, `{"lora_added": {"prefix_embedding": (slots, D)}}`.
    tensors: of the language model in `transformers`, as `stored_tensors(config)` returns them.
    params: of the base model, or their shapes.
    base_model: the base model's folder or hub repository, for the file.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the tree is of another method or model, or the model is an encoder.
  """
  folder = local_path(folder)
  if folder.exists():
    raise FileExistsError(f"{folder} exists; nothing is overwritten")
  table = _token_table(folder, tensors, dict(weights_with_path(params)))
  leaves, path = dict(leaves_with_path(trainable)), f"{ADDED}/{PREFIX_EMBEDDING}"
  if set(leaves) != {path}:
    raise ValueError(
      f"expected the trainable tree of prefix_embedding, with the leaf {path}, got "
      f"{', '.join(sorted(leaves)) or 'no leaf'}. PEFT has no other prefix, and none with LoRA"
    )
  vectors, (width,) = np.asarray(leaves[path], np.float32), table.outputs
  if vectors.ndim != 2 or vectors.shape[1] != width:
    raise ValueError(
      f"{path} has shape {vectors.shape}, expected (slots, {width}), of this model's embeddings"
    )
  fields = {
    "peft_type": PROMPT_TUNING,
    "base_model_name_or_path": base_model,
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "num_virtual_tokens": len(vectors),
    "token_dim": width,
    "num_transformer_submodules": 1,
  }
  with new_folder(folder) as temporary:
    (temporary / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    save_tensors(temporary / WEIGHTS, {VECTORS: vectors * _factor(table)})


def load_peft_prompt(folder: str | Path, tensors: Sequence[StoredTensor], params: PyTree) -> PyTree:
  """Reads prompt tuning that PEFT has saved, for `lora_jax.prefix_embedding`.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    tensors: of the language model in `transformers`, as `stored_tensors(config)` returns them.
    params: of the base model, or their shapes.

  Returns:
    The trainable tree of `lora_jax.prefix_embedding(fn, num_slots)`, in which the number of slots
    is that of PEFT's virtual tokens. The slots of its tokens are `lora_jax.Slots(num_slots)`.
  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if the adapter is of another method or model, the model is an encoder, or a tensor
      is missing, unexpected, misshapen, truncated or not finite; each is named.
  """
  folder = local_path(folder)
  check_folder(folder)
  where = folder / CONFIG
  config = _parse(read_json(where), where)
  fields, leaves = config.fields, dict(weights_with_path(params))
  table = _token_table(folder, tensors, leaves)
  (width,) = table.outputs
  if fields.token_dim not in (None, width):
    raise ValueError(
      f"{where}: token_dim is {fields.token_dim}, and this model's embeddings have {width} "
      f"dimensions. {which_base(config)}"
    )
  expected = {VECTORS: (fields.num_virtual_tokens, width)}
  vectors = read_arrays(folder, config, expected, tensors, leaves)[VECTORS]
  return {ADDED: {PREFIX_EMBEDDING: jnp.asarray(vectors / _factor(table))}}


def _parse(entries: Mapping[str, Any], where: Path) -> PeftConfig:
  """Returns the config; raises ValueError as `lora_jax.interop.peft.config.parse`."""
  if (method := entries.get("peft_type")) != PROMPT_TUNING:
    raise ValueError(
      f"{where}: expected peft_type {PROMPT_TUNING}, got {repr(method)[:100]}. Read an adapter of "
      "weights by lora_jax.interop.load_peft"
    )
  fields = read_fields(PromptFields, IGNORED, entries, where)
  if fields.modules_to_save:
    raise ValueError(
      f"{where}: modules_to_save={list(fields.modules_to_save)}: fully trained modules are not "
      "read with prompt tuning. Train without them"
    )
  return PeftConfig(PROMPT_TUNING, fields, base=fields.base_model_name_or_path or "")


def _token_table(where: Path, tensors: Sequence[StoredTensor], leaves: Mapping[str, Any]) -> Module:
  """Returns the embedding of a language model's tokens; raises ValueError for other models."""
  if is_encoder(tensors):
    raise ValueError(
      f"{where}: this model is an encoder, whose head reads the first token: a virtual one in "
      "PEFT's prompt tuning, and [CLS] here. Take an adapter of weights, such as LoRA"
    )
  tables = [module for module in find_modules(tensors, leaves) if module.is_input]
  if len(tables) != 1:
    raise ValueError(
      f"{where}: expected a language model with one embedding of tokens, got tensors of "
      f"{', '.join(table.name for table in tables) or 'none'}"
    )
  return tables[0]


def _factor(table: Module) -> np.float32:
  """Returns what our vectors are multiplied by in PEFT."""
  return np.sqrt(np.float32(table.outputs[0])) if table.stored.is_scaled else np.float32(1)
