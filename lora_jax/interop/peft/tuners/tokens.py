"""Trainable tokens: the new rows of an embedding, where ours are their differences from the old.

    base_model.model.transformer.wte.trainable_tokens_delta                  (tokens, D)
    base_model.model.lm_head.trainable_tokens_delta                          again, of a tied head
    base_model.model.transformer.wte.token_adapter.trainable_tokens_delta    with LoRA

The differences need the base model's values.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.leaves import Part
from lora_jax.interop.peft.modules import (
  PREFIX,
  Arrays,
  Module,
  has_values,
  is_language_model,
  values_of,
)
from lora_jax.interop.peft.names import named
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
from lora_jax.variants.trainable_tokens import trainable_tokens_variant, weight

ROWS = "trainable_tokens_delta"
WITH_LORA = f"token_adapter.{ROWS}"
HEAD = f"{PREFIX}lm_head.{ROWS}"


def _tied(modules: Sequence[Module], tensors: Sequence[StoredTensor]) -> Module | None:
  """Returns the embedding that is also the head, of whose rows the file has a copy."""
  if not is_language_model(tensors) or "lm_head.weight" in {stored.name for stored in tensors}:
    return None
  return next((module for module in modules if module.is_input), None)


def _shapes(
  config: PeftConfig, modules: Sequence[Module], tensors: Sequence[StoredTensor]
) -> Shapes:
  ids = config.fields.token_indices
  shapes = {key(m, ROWS): _shape(m, ids, "token_indices") for m in modules}
  if tied := _tied(modules, tensors):
    shapes[HEAD] = shapes[key(tied, ROWS)]
  return shapes


def _shape(module: Module, ids: Sequence[int], field: str) -> tuple[int, int]:
  """Returns the shape of the rows of some tokens, which are checked."""
  if not ids or len(set(ids)) < len(ids) or max(ids) >= module.inputs:
    raise ValueError(
      f"{field} must be different ids below {module.inputs}, the rows of {module.name}, got "
      f"{list(ids)!r:.100}"
    )
  return len(ids), module.outputs[0]


def _read(
  config: PeftConfig, modules: Sequence[Module], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  parts = {}
  for module in modules:
    rows = arrays[key(module, ROWS)]
    if module.is_input and HEAD in arrays and not np.array_equal(rows, arrays[HEAD]):
      raise ValueError(
        f"{HEAD} differs from {key(module, ROWS)}: the head is the embedding (tied), and its rows "
        "would be too. Save the adapter again in PEFT"
      )
    parts[module] = [_part(module, config.fields.token_indices, rows, leaves)]
  return parts


def _part(module: Module, ids: Sequence[int], rows: np.ndarray, leaves: Mapping[str, Any]) -> Part:
  """Returns the differences of rows from the base model's."""
  delta = rows - _base_rows(module, ids, leaves)
  arrays = {"token_ids": np.asarray(ids, np.float32), "token_delta": delta}
  return Part(trainable_tokens_variant(ids), arrays)


def _base_rows(module: Module, ids: Sequence[int], leaves: Mapping[str, Any]) -> np.ndarray:
  (path,) = module.stored.paths
  if not has_values(leaves[path]):
    raise ValueError(
      f"{path}: PEFT stores the new rows of trained tokens, and lora_jax their differences from "
      "the base model's, of which params have only the shape. Give real arrays"
    )
  return np.asarray(values_of(leaves[path]), np.float32)[np.asarray(ids)]


def _write(parts: Parts, adapter: AdapterParts) -> Written:
  if adapter.extra:
    raise ValueError(
      "PEFT's trainable tokens have no modules_to_save, and `extra` has "
      f"{', '.join(sorted(adapter.extra))}. Adapt a weight by LoRA too, with which PEFT has both, "
      "or merge the adapter: lora_jax.interop.save_merged"
    )
  of_modules = {module: only(of_module) for module, of_module in parts.items()}
  ids = {module: _ids(part) for module, part in of_modules.items()}
  chosen = one_of_all(ids, "trainable tokens", "list of token_indices")
  rows = {key(m, ROWS): _rows(m, part, adapter.leaves) for m, part in of_modules.items()}
  if tied := _tied(list(parts), adapter.tensors):
    rows[HEAD] = rows[key(tied, ROWS)].copy()
  return Written({"token_indices": list(chosen)}, rows)


def _ids(part: Part) -> tuple[int, ...]:
  return tuple(int(each) for each in part.arrays["token_ids"])


def _rows(module: Module, part: Part, leaves: Mapping[str, Any]) -> np.ndarray:
  return _base_rows(module, _ids(part), leaves) + part.arrays["token_delta"]


TUNER = Tuner(
  "trainable tokens",
  (weight,),
  _shapes,
  _read,
  _write,
  has_linear=False,
  has_embeddings=True,
)


# ---- with LoRA, `trainable_token_indices` ------------------------------------------------------


def token_modules(
  where: Path, config: PeftConfig, modules: Sequence[Module]
) -> dict[Module, tuple[int, ...]]:
  """Returns the embeddings of which LoRA's config trains rows, and their ids.

  Args:
    where: the folder, for messages.
    config: of the adapter.
    modules: all of the model's.
  Raises:
    ValueError: if the model has no such embedding.
  """
  embeddings = [module for module in modules if module.stored.is_embedding]
  chosen: dict[Module, tuple[int, ...]] = {}
  for name, ids in config.tokens.items():
    tables = [m for m in embeddings if (named(m.name, [name]) if name else m.is_input)]
    if not tables:
      raise ValueError(
        f"{where}: trainable_token_indices: this model has no embedding {name}, but "
        f"{', '.join(module.name for module in embeddings)}. Rows of an untied head are not read: "
        "train the head as a whole (modules_to_save), or merge the adapter in PEFT"
      )
    chosen |= dict.fromkeys(tables, ids)
  for module in chosen:
    if config.targets(module.name) or config.saves(module.name):
      raise ValueError(
        f"{where}: trainable_token_indices and target_modules or modules_to_save both name "
        f"{module.name}; expected one of them"
      )
  return chosen


def token_shapes(tokens: Mapping[Module, Sequence[int]]) -> Shapes:
  """Returns the shapes of the rows by name, with LoRA."""
  field = "trainable_token_indices"
  return {key(m, WITH_LORA): _shape(m, ids, field) for m, ids in tokens.items()}


def read_tokens(
  tokens: Mapping[Module, Sequence[int]], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  """Returns the parts of trained rows that are stored with LoRA."""
  return {m: [_part(m, ids, arrays[key(m, WITH_LORA)], leaves)] for m, ids in tokens.items()}


def write_tokens(parts: Parts, adapter: AdapterParts) -> Written:
  """Returns the field and the tensors of trained rows with LoRA."""
  indices = {module.name: list(_ids(only(of_module))) for module, of_module in parts.items()}
  rows = {
    key(m, WITH_LORA): _rows(m, only(of_module), adapter.leaves) for m, of_module in parts.items()
  }
  return Written({"trainable_token_indices": indices} if indices else {}, rows)
