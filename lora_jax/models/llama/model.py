"""The Llama family in Flax Linen: Llama 2 and 3, Mistral, Mixtral, Qwen 2 and 3, Gemma.

    x = embed[token]
    for each layer:  x = x + attn(norm(x));  x = x + mlp(norm(x))
    logits = norm(x) head

    norm(x) = x / rms(x) * scale                  (Zhang and Sennrich 2019)
    attn    queries and keys are rotated by their position (Su et al. 2021, RoPE); several heads
            of the queries share one of the keys and values (Ainslie et al. 2023)
    mlp     a gated one, or a mixture of such: `mixture.py`

`folder.py` reads and writes Hugging Face folders.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lora_jax.fields import Finite, Positive, check_fields
from lora_jax.marks import ATTENTION_OUTPUT, LAYER_INPUT, LAYER_OUTPUT, MLP_OUTPUT
from lora_jax.models.parts.causal_lm import (
  CausalLM,
  Context,
  attend,
  dense,
  head,
  init_cache,
  look_up,
  make_head,
  make_layers,
  take,
)
from lora_jax.models.parts.fields import (
  AttentionName,
  Epsilon,
  FloatDtype,
  NumLayers,
  NumRows,
  OneOf,
  Remat,
  RowIndex,
  Width,
)
from lora_jax.models.parts.mixture import ACTIVATIONS, MLP, Mixture, MixtureConfig, residual_std

__all__ = ["Llama", "LlamaConfig", "MixtureConfig", "RopeScaling", "init_cache"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How a model's rotation is stretched beyond the length of its pretraining.

  Attributes:
    kind: `linear` divides all frequencies by `factor`; `llama3` only the low ones, and those
      between by a part of it.
    factor: the stretch.
    low_freq_factor: wavelengths above `original_positions / low_freq_factor` are low.
    high_freq_factor: those below `original_positions / high_freq_factor` are high.
    original_positions: the length of the pretraining, tokens.
  """

  kind: Literal["linear", "llama3"]
  factor: Positive
  low_freq_factor: Positive = 1.0
  high_freq_factor: Positive = 4.0
  original_positions: NumRows = 8192

  def __post_init__(self):
    check_fields(self)
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f"low_freq_factor must be below high_freq_factor, got {self.low_freq_factor} and "
        f"{self.high_freq_factor}"
      )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The shape and computation of a model of the Llama family; the defaults are Llama 2's.

  Attributes:
    vocab_size: V, tokens.
    num_positions: the longest sequence, tokens.
    embed_dim: D.
    num_layers: blocks.
    num_heads: N, of the queries.
    num_kv_heads: K, of the keys and values; divides N.
    head_dim: of each head; None is D / N.
    mlp_dim: inner width of the MLP, or of each expert.
    mixture: the experts that replace the MLP (Mixtral, Qwen-MoE); None is one MLP.
    activation: of the MLP's gate, by Hugging Face's name: `silu` or `gelu_pytorch_tanh`.
    rms_norm_epsilon: added to the mean square.
    rope_theta: the base of the rotation's wavelengths.
    rope_scaling: their scaling; None for no scaling.
    qkv_bias: whether query, key and value have biases (Qwen 2).
    out_bias: whether attention's output has one.
    mlp_bias: whether the MLP has biases.
    qk_norm: whether queries and keys are normalized, head by head (Qwen 3).
    sliding_window: the number of tokens that a token sees, itself included; None is all before it.
    window_layers: numbers of the layers with a sliding window; None is all layers.
    norm_offset: added to the norms' scales (Gemma: 1).
    scale_embedding: whether embeddings are multiplied by sqrt(D) (Gemma).
    tie_head: whether the head is the token embedding.
    dtype: of the computation; softmax, norms, rotations and logits are float32.
    param_dtype: of new parameters.
    scan_layers: stacks the layers' parameters (`layers/...` with a leading axis) and scans over
      them; otherwise they are `layers_0/...`, `layers_1/...`.
    remat: as in `GPT2Config`.
    attention: as in `GPT2Config`.
  """

  vocab_size: NumRows = 32000
  num_positions: NumRows = 4096
  embed_dim: Width = 4096
  num_layers: NumLayers = 32
  num_heads: Width = 32
  num_kv_heads: Width = 32
  head_dim: Width | None = None
  mlp_dim: Width = 11008
  mixture: MixtureConfig | None = None
  activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "silu"
  rms_norm_epsilon: Epsilon = 1e-5
  rope_theta: Positive = 10000.0
  rope_scaling: RopeScaling | None = None
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  sliding_window: NumRows | None = None
  window_layers: tuple[RowIndex, ...] | None = None
  norm_offset: Finite = 0.0
  scale_embedding: bool = False
  tie_head: bool = False
  dtype: FloatDtype = "float32"
  param_dtype: FloatDtype = "float32"
  scan_layers: bool = False
  remat: Remat = None
  attention: AttentionName = "compact"

  def __post_init__(self):
    check_fields(self)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads must divide num_heads, got {self.num_kv_heads} for {self.num_heads}"
      )
    if self.head_dim is None and self.embed_dim % self.num_heads:
      raise ValueError(
        f"num_heads must divide embed_dim, got {self.num_heads} heads for {self.embed_dim}; or "
        "give head_dim"
      )
    if self.head_size % 2:
      raise ValueError(f"the rotation needs an even size of a head, got {self.head_size}")
    if self.mixture is not None and self.mlp_bias:
      raise ValueError("experts have no biases; set mlp_bias to False")
    if self.window_layers is not None and self.scan_layers:
      raise ValueError(
        "scanned layers must be equal: layers with and without a sliding window need "
        "scan_layers=False"
      )

  @property
  def head_size(self) -> int:
    return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim


class RMSNorm(nn.Module):
  """Divides by the root of the mean square, in float32, and multiplies by a scale."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    config, offset = self.config, self.config.norm_offset
    init = nn.initializers.constant(1.0 - offset)
    scale = self.param("scale", init, (x.shape[-1],), config.param_dtype)
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + config.rms_norm_epsilon)
    scale = (scale.astype(jnp.float32) + offset).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (normed * scale).astype(config.dtype)


class Attention(nn.Module):
  """Causal attention with rotated queries and keys, over the sequence itself or over a cache."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], cache: Any, context: Context
  ) -> tuple[Float[Array, "B T D"], Any]:
    config, size = self.config, self.config.head_size

    def heads(name: str, x: Array, count: int) -> Array:
      out = dense(config, count * size, name, x, use_bias=config.qkv_bias)
      return out.reshape(*x.shape[:2], count, size)

    query = heads("query", take(x, context.token_index), config.num_heads)
    key = heads("key", x, config.num_kv_heads)
    value = heads("value", x, config.num_kv_heads)
    if config.qk_norm:
      query, key = RMSNorm(config, name="query_norm")(query), RMSNorm(config, name="key_norm")(key)
    query = rotate(query, *(take(part, context.token_index) for part in context.rotation))
    key = rotate(key, *context.rotation)
    out, cache = attend(config, query, key, value, cache, context)
    out = out.reshape(*out.shape[:2], -1)
    out = dense(config, config.embed_dim, "out", out, residual_std(config), config.out_bias)
    return out, cache


class Block(nn.Module):
  """One layer: attention and MLP, each after a norm and added to its input."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], cache: Any, context: Context
  ) -> tuple[Float[Array, "B T D"], Any]:
    config, x = self.config, checkpoint_name(x, LAYER_INPUT)
    attention = Attention(config, name="attn")
    attended, cache = attention(RMSNorm(config, name="attn_norm")(x), cache, context)
    x = take(x, context.token_index) + checkpoint_name(attended, ATTENTION_OUTPUT)
    mlp = (MLP if config.mixture is None else Mixture)(config, name="mlp")
    out = mlp(RMSNorm(config, name="mlp_norm")(x))
    return checkpoint_name(x + checkpoint_name(out, MLP_OUTPUT), LAYER_OUTPUT), cache


class Llama(CausalLM):
  """A language model of the Llama family; `CausalLM` defines its methods."""

  config: LlamaConfig

  def setup(self):
    config = self.config
    self.token_embedding = nn.Embed(
      config.vocab_size,
      config.embed_dim,
      embedding_init=nn.initializers.normal(0.02),
      dtype=config.dtype,
      param_dtype=config.param_dtype,
    )
    self.layers = make_layers(config, Block)
    self.final_norm = RMSNorm(config)
    if not config.tie_head:
      self.lm_head = make_head(config)

  def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    x = look_up(self.token_embedding, tokens)
    scale = jnp.asarray(math.sqrt(self.config.embed_dim), x.dtype)
    return x * scale if self.config.scale_embedding else x

  def stack(self) -> Any:
    return self.layers

  def norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return self.final_norm(x)

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns the head's output, float32, for any of the hidden states."""
    if self.config.tie_head:
      return head(hidden, None, self.token_embedding.embedding.astype(self.config.dtype))
    return head(hidden, self.lm_head, None)

  def slides(self, layer: int) -> bool:
    return self.config.window_layers is None or layer in self.config.window_layers

  def rotation(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Returns the cosines and sines of each token's rotation, (B, T, H), float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(self.config)[None, None]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def frequencies(config: LlamaConfig) -> Float[Array, " half"]:
  """Returns the angles by which each pair of a head's elements rotates per token."""
  size, scaling = config.head_size, config.rope_scaling
  plain = config.rope_theta ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
  if scaling is None:
    return plain
  if scaling.kind == "linear":
    return plain / scaling.factor
  turns = scaling.original_positions * plain / (2 * math.pi)  # within the original length
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # 0 is stretched, 1 unchanged
  return (1 - share) * plain / scaling.factor + share * plain


def rotate(
  x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"]
) -> Float[Array, "B T N H"]:
  """Rotates each pair of a head's elements, i and i + H / 2, in float32."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([-second, first], axis=-1)
  return (x * cos[:, :, None] + rotated * sin[:, :, None]).astype(x.dtype)
