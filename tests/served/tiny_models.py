"""Small random models of each architecture, and their GGUF files."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.models.checkpoints.gguf import write_gguf
from lora_jax.models.gpt2 import gguf as gpt2_gguf
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama import gguf as llama_gguf
from lora_jax.models.llama.model import Llama, LlamaConfig, MixtureConfig, RopeScaling, frequencies
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.trees import leaves_with_path

NUM_BYTES, NUM_TOKENS = 256, 272
SHAPE: dict[str, Any] = {
  "vocab_size": NUM_TOKENS,
  "num_positions": 96,
  "embed_dim": 32,
  "num_layers": 2,
  "num_heads": 4,
}
LLAMA = SHAPE | {"num_kv_heads": 2, "mlp_dim": 56}
EXPERTS = LLAMA | {"embed_dim": 16, "mlp_dim": 12}
LLAMA3 = RopeScaling("llama3", 4.0)
CONFIGS: dict[str, LlamaConfig | GPT2Config] = {
  "llama": LlamaConfig(**LLAMA),
  "llama_tied": LlamaConfig(**LLAMA, tie_head=True, rope_theta=500000.0, rope_scaling=LLAMA3),
  "llama_biased": LlamaConfig(
    **LLAMA, head_dim=12, qkv_bias=True, out_bias=True, rope_scaling=RopeScaling("linear", 2.0)
  ),
  "qwen2": LlamaConfig(**LLAMA, qkv_bias=True, tie_head=True),
  "qwen3": LlamaConfig(**LLAMA, qk_norm=True, head_dim=16),
  "gemma": LlamaConfig(
    **LLAMA | {"num_kv_heads": 1},
    **{"head_dim": 16, "activation": "gelu_pytorch_tanh", "norm_offset": 1.0},
    **{"scale_embedding": True, "tie_head": True},
  ),
  "mixtral": LlamaConfig(**EXPERTS, mixture=MixtureConfig(4, 2)),
  "qwen2_moe": LlamaConfig(**EXPERTS, qkv_bias=True, mixture=MixtureConfig(4, 2, False, 20)),
  "qwen3_moe": LlamaConfig(**EXPERTS, qk_norm=True, head_dim=8, mixture=MixtureConfig(4, 2)),
  "gpt2": GPT2Config(**SHAPE),
}


class Tiny(NamedTuple):
  """A model, its weights and its file."""

  config: Any
  params: PyTree
  path: Path

  @property
  def module(self) -> Any:
    return (GPT2 if isinstance(self.config, GPT2Config) else Llama)(self.config)

  @property
  def gguf(self) -> Any:
    """Our names of llama.cpp's tensors and keys."""
    return gpt2_gguf if isinstance(self.config, GPT2Config) else llama_gguf

  def call(self, params: PyTree, tokens: jax.Array) -> jax.Array:
    return self.module.apply({"params": params}, tokens)


def make_tiny(folder: Path, name: str, *, scan_layers: bool = False) -> Tiny:
  """Writes a model of `CONFIGS` with random weights, and logits of about 10."""
  config = dataclasses.replace(CONFIGS[name], scan_layers=scan_layers)
  tiny = Tiny(config, None, folder / f"{name}.gguf")
  tiny = tiny._replace(params=random_params(shapes_of(tiny.module)))
  metadata = tiny.gguf.written_metadata(config) | TOKENIZER
  tensors = dict(arrays_of(tiny))
  if getattr(config, "rope_scaling", None) is LLAMA3:
    plain = frequencies(dataclasses.replace(config, rope_scaling=None))
    tensors["rope_freqs.weight"] = np.asarray(plain / frequencies(config))
  write_gguf(tiny.path, tiny.gguf.architecture_of(config), metadata, tensors)
  return tiny


def random_params(shapes: PyTree) -> PyTree:
  draw = np.random.default_rng(0)

  def array(keys: Any, shape: Any) -> jax.Array:
    name = keys[-1].key
    x = draw.standard_normal(shape.shape)
    if name in ("scale", "bias"):
      return jnp.asarray(0.2 * x + (name == "scale"), jnp.float32)
    return jnp.asarray(1.5 * x / shape.shape[-1 if name == "embedding" else -2] ** 0.5, jnp.float32)

  return jax.tree_util.tree_map_with_path(array, shapes)


def arrays_of(tiny: Tiny) -> Iterator[tuple[str, np.ndarray]]:
  """Yields a model's tensors as llama.cpp has them."""
  leaves = dict(leaves_with_path(tiny.params))
  for stored in tiny.gguf.gguf_tensors(tiny.config):
    parts = [np.asarray(leaves[path][stored.place]) for path in stored.paths]
    array = np.concatenate(parts, axis=-1) + np.float32(stored.offset)
    order = np.argsort(stored.our_outputs(array.shape[-1]))
    yield stored.name, stored.to_file(array[..., order])


def _tokenizer() -> dict[str, Any]:
  """Returns the keys of a tokenizer: 256 bytes, one merge and special tokens."""
  from tokenizers.pre_tokenizers import ByteLevel

  special = [f"<|{i}|>" for i in range(NUM_TOKENS - NUM_BYTES - 1)]
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*sorted(ByteLevel.alphabet()), "ab", *special],
    "tokenizer.ggml.token_type": [1] * (NUM_BYTES + 1) + [3] * len(special),  # 3 is control
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": NUM_BYTES + 1,
    "tokenizer.ggml.eos_token_id": NUM_BYTES + 1,
    "tokenizer.ggml.add_bos_token": False,
  }


TOKENIZER = _tokenizer()
