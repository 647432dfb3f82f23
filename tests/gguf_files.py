"""Converts small folders of tests/golden to GGUF as llama.cpp's converter does, for tests.

Names are the package's (`gguf.get_tensor_name_map`), and what changes on the way is written here by
llama.cpp's rules, so that nothing comes from the tables that are tested.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from lora_jax.models.checkpoints.gguf import Blocks, write_gguf
from lora_jax.models.checkpoints.stored import expected_shapes
from lora_jax.trees import leaves_with_path

from tests.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
ARCHITECTURES = {  # of each folder
  **dict.fromkeys(("llama2", "llama3", "llama_biased", "mistral", "mixtral"), "llama"),
  **{"qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"},
  **{"gemma": "gemma", "tied": "gpt2", "untied": "gpt2"},
}
METADATA = {  # llama.cpp's: names in config.json, the first that is there
  "context_length": ("max_position_embeddings", "n_positions"),
  "embedding_length": ("hidden_size", "n_embd"),
  "block_count": ("num_hidden_layers", "n_layer"),
  "feed_forward_length": ("intermediate_size", "n_inner"),
  "attention.head_count": ("num_attention_heads", "n_head"),
  "attention.head_count_kv": ("num_key_value_heads",),
  "attention.key_length": ("head_dim",),
  "attention.value_length": ("head_dim",),
  "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
  "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
  "attention.sliding_window": ("sliding_window",),
  "expert_used_count": ("num_experts_per_tok",),
  "expert_count": ("num_local_experts", "num_experts"),
  "expert_feed_forward_length": ("moe_intermediate_size",),
  "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
  "vocab_size": ("vocab_size",),
}
Tensors = dict[str, Any]


def folder_of(name: str) -> Path:
  return GOLDEN / ("gpt2" if ARCHITECTURES[name] == "gpt2" else "llama") / name


def metadata_of(name: str) -> dict[str, Any]:
  """Returns the keys of a folder's model."""
  config = json.loads((folder_of(name) / "config.json").read_text())
  architecture = ARCHITECTURES[name]
  values = {
    key: next(config[field] for field in fields if config.get(field))
    for key, fields in METADATA.items()
    if any(config.get(field) for field in fields)
  }
  if architecture == "gpt2":
    values.setdefault("feed_forward_length", 4 * values["embedding_length"])
  else:
    rope = config.get("rope_parameters") or config
    values["rope.freq_base"] = float(rope.get("rope_theta") or config["rope_theta"])
    heads = values["embedding_length"] // values["attention.head_count"]
    values["rope.dimension_count"] = values.get("attention.key_length", heads)
    if rope.get("rope_type") == "linear":
      values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
  return {f"{architecture}.{key}": value for key, value in values.items()}


@functools.cache
def tensors_of(name: str) -> Tensors:
  """Returns the tensors of a folder by llama.cpp's names, converted by its rules."""
  architecture, config = (
    ARCHITECTURES[name],
    json.loads((folder_of(name) / "config.json").read_text()),
  )
  keys = metadata_of(name)
  count = keys[f"{architecture}.block_count"]
  heads = keys[f"{architecture}.attention.head_count"]
  kv_heads = keys.get(f"{architecture}.attention.head_count_kv", heads)
  number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
  names = gguf.get_tensor_name_map(number, count)
  experts: dict[str, list[np.ndarray]] = {}
  converted: Tensors = {}
  for source, array in sorted(load_file(folder_of(name) / "model.safetensors").items()):
    if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", source):
      experts.setdefault(f"{match[1]}.{match[3]}.weight", []).append(array)
      continue
    if architecture == "gpt2" and re.search(r"\.attn\.(bias|masked_bias)$", source):
      continue
    if architecture == "llama" and ".q_proj." in source:
      array = permuted(array, heads)
    if architecture == "llama" and ".k_proj." in source:
      array = permuted(array, kv_heads)
    if architecture == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", source):
      array = array.T
    if architecture == "gemma" and source.endswith("norm.weight"):
      array = array + np.float32(1)
    if architecture == "gemma" and source == "lm_head.weight":
      continue
    converted[names.get_name(source, (".weight", ".bias"))] = array.squeeze()
  for source, arrays in experts.items():
    converted[names.get_name(source, (".weight",))] = np.stack(arrays)
  rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
  if rope.get("rope_type", rope.get("type")) == "llama3":
    converted["rope_freqs.weight"] = llama3_factors(rope, keys["llama.rope.dimension_count"])
  return converted


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
  """Returns the rows of query or key as llama.cpp rotates them, a head's halves interleaved."""
  half = array.shape[0] // heads // 2
  return array.reshape(heads, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def llama3_factors(rope: dict[str, Any], size: int) -> np.ndarray:
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  length, factor = rope["original_max_position_embeddings"], rope["factor"]
  factors = []
  for i in range(0, size, 2):
    wavelength = 2 * math.pi * rope["rope_theta"] ** (i / size)
    if wavelength < length / high:
      factors.append(1.0)
    elif wavelength > length / low:
      factors.append(factor)
    else:
      smooth = (length / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.asarray(factors, np.float32)


def write_model(
  path: Path, name: str, change: Callable[[str, np.ndarray], Any] = lambda name, array: array
) -> Path:
  """Writes a folder's model as a GGUF file, each tensor changed by a function; returns the path."""
  tensors = {key: change(key, array) for key, array in tensors_of(name).items()}
  write_gguf(path, ARCHITECTURES[name], metadata_of(name), tensors)
  return path


def quantized(array: np.ndarray, kind: str) -> Blocks:
  """Returns an array in a block format, by the package's own quantization."""
  data = gguf.quants.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType[kind])
  return Blocks(kind, data.view(np.uint8))


def write_random(path: Path, config: Any, tables: Any, kind: str) -> Path:
  """Writes a model of random weights; matrices in a block format, other tensors as float32.

  Args:
    path: of the file.
    config: of the model.
    tables: the module `gguf` of the model's family.
    kind: of the blocks; matrices whose rows they do not divide are float16.
  """
  draw = np.random.default_rng(0)
  leaves = dict(leaves_with_path(tables.params_shapes(config)))
  tensors: Tensors = {}
  for name, shape in expected_shapes(tables.gguf_tensors(config), leaves).items():
    array = draw.normal(0, 0.1, [size for size in shape if size > 1]).astype(np.float32)
    if array.ndim > 1:
      block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
      fits = array.shape[-1] % block == 0
      array = quantized(array, kind) if fits else array.astype(np.float16)
    tensors[name] = array
  write_gguf(path, tables.architecture_of(config), tables.written_metadata(config), tensors)
  return path
