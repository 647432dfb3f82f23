"""Reads the shape of a model from the metadata of a GGUF file."""

from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.models.checkpoints.config_fields import read_fields
from lora_jax.models.checkpoints.gguf import GGUF
from lora_jax.trees import closest_names

TOKENS = "tokenizer.ggml.tokens"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FIXED: dict[str, Any] = {  # keys of any architecture that must have this value, if they are there
  "attention.causal": True,
  "use_parallel_residual": False,
  "pooling_type": 0,
  "leading_dense_block_count": 0,
  "nextn_predict_layers": 0,
}
UNUSED = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")


def read_metadata(
  file: GGUF, kind: type, keys: Mapping[str, str], known: Collection[str], fixed: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns fields of a model's config by our names.

  Args:
    file: of the model.
    kind: the dataclass of the config.
    keys: names in the metadata by ours, without the architecture.
    known: other keys that the caller reads.
    fixed: values that keys must have, if they are there.
  Raises:
    ValueError: naming the key, if it is missing, of another type, out of bounds or unknown: it may
      change the model's computation.
  """
  prefix = f"{file.architecture}."
  values = {
    key.removeprefix(prefix): value
    for key, value in file.metadata.items()
    if key.startswith(prefix)
  }
  fixed = {**FIXED, **fixed}
  for key, value in values.items():
    if key in fixed and (type(value) is not type(fixed[key]) or value != fixed[key]):
      raise ValueError(f"{prefix}{key}={value!r} is not supported; expected {fixed[key]!r}")
    names = (*keys.values(), *known, *fixed, *UNUSED)
    if key not in names:
      likely = ", ".join(prefix + name for name in closest_names(key, names))
      raise ValueError(
        f"the key {prefix}{key} is not supported: it may change the model's computation. The "
        f"closest supported keys are {likely}"
      )
  return read_fields(kind, file.metadata, {name: prefix + key for name, key in keys.items()})


def vocab_size(file: GGUF) -> int:
  """Returns V: the number of the tokenizer's tokens, or of the embedding's rows without one."""
  tokens = file.metadata.get(TOKENS)
  if isinstance(tokens, list):
    return len(tokens)
  if EMBEDDING not in file.tensors:
    raise ValueError(f"missing {TOKENS}, and the tensor {EMBEDDING}")
  return file.tensors[EMBEDDING].shape[0]
