"""Merges a QA-LoRA adapter into the GGUF file it was trained on, as a new file of the same size.

The base model's file is copied, and the minima of adapted blocks are overwritten. All other bytes
are unchanged: other tensors, codes, scales and metadata.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import adapter_extra, adapter_weights
from lora_jax.files import local_path, new_path
from lora_jax.models.checkpoints.gguf import GGUF, open_gguf
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.quantization.ggml import join
from lora_jax.quantization.leaf import Quantized
from lora_jax.trees import weights_with_path
from lora_jax.variants.qa_merge import merge_quantized


def save_merged_gguf(
  path: str | Path,
  base: str | Path,
  config: LoraConfig,
  trainable: PyTree,
  tensors: Sequence[StoredTensor],
  params: PyTree,
) -> dict[str, float]:
  """Writes a GGUF file with an adapter merged into its quantized weights.

  Args:
    path: the file to write.
    base: the base model's GGUF file.
    config: the adapter's config; its variant is QA-LoRA in groups of whole blocks.
    trainable: the trained tree.
    tensors: the tensors of the model in `base`, and the leaves that they hold.
    params: the base model's params, as stored: `load_causal_lm(base, param_dtype="stored")`.

  Returns:
    By path, the error of each adapted weight from rounding its minima to float16, relative to the
    norm of its update.
  Raises:
    FileExistsError: if there is such a file.
    ValueError: if a weight cannot be merged exactly, as in `lora_jax.merge_quantized`; the adapter
      has fully trained leaves, which the file's types would round; `params` are not those of
      `base`, or it is a part of a split model.
    OSError: if it cannot be written, such as on a full disk; nothing is left behind.
  """
  path, file = local_path(path), open_gguf(base)
  if path.exists():
    raise FileExistsError(f"{path} exists; nothing is overwritten")
  if parts := {tensor.path for tensor in file.tensors.values()} - {file.path}:
    raise ValueError(
      f"{file.path} is one of {len(parts) + 1} parts; join them first: "
      "llama-gguf-split --merge FIRST_PART JOINED"
    )
  if extra := adapter_extra(trainable):
    raise ValueError(
      f"{', '.join(extra)} is fully trained; its tensor in {file.path} would round it. Export "
      "the merged model in floats, or train without config.extra"
    )
  merged, errors = merge_quantized(config, params, trainable)
  before, after = (dict(weights_with_path(tree)) for tree in (params, merged))
  adapted = adapter_weights(trainable).keys()
  changed = [tensor for tensor in tensors if adapted & set(tensor.paths)]
  for tensor in changed:
    _check_blocks(file, tensor, before)
  with new_path(path) as copy:
    shutil.copyfile(file.path, copy)
    with copy.open("r+b") as out:
      for tensor in changed:
        out.seek(file.tensors[tensor.name].offset)
        out.write(_blocks(file, tensor, after).data)
  return errors


def _check_blocks(file: GGUF, tensor: StoredTensor, leaves: Mapping[str, Quantized]) -> None:
  """Raises ValueError if a tensor of the file has not the blocks of its leaves, to the bit."""
  kind, stored = leaves[tensor.paths[0]].format, file.tensors[tensor.name]
  if stored.type != kind or not np.array_equal(_blocks(file, tensor, leaves), stored.bytes()):
    raise ValueError(
      f"{tensor.name} of {file.path} has other numbers than params: load params from this file, "
      'with param_dtype="stored"'
    )


def _blocks(file: GGUF, tensor: StoredTensor, leaves: Mapping[str, Quantized]) -> np.ndarray:
  """Returns leaves as the bytes of their tensor, (..., out, bytes of a row)."""
  kind = leaves[tensor.paths[0]].kind
  order = np.argsort(tensor.our_outputs(file.tensors[tensor.name].shape[-2]))

  def in_file(name: str) -> np.ndarray:
    parts = [np.asarray(leaves[path].arrays[name])[tensor.place] for path in tensor.paths]
    outputs = -2 - len(kind.parts[name].shape)
    return np.concatenate(parts, axis=outputs).take(order, axis=outputs)

  return join(kind, {name: in_file(name) for name in kind.parts})
