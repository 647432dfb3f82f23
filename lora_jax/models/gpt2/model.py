"""GPT-2 (Radford et al. 2019) in Flax Linen.

    x = wte[token] + wpe[position]
    for each layer:  x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))
    logits = ln_f(x) wte^T

Query, key and value have separate kernels, so that LoRA of `attn/(query|value)/kernel` is the
paper's. `folder.py` reads and writes Hugging Face folders. The model has no dropout: the paper
fine-tunes with LoRA's dropout only.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lora_jax.fields import check_fields
from lora_jax.marks import ATTENTION_OUTPUT, LAYER_INPUT, LAYER_OUTPUT, MLP_OUTPUT
from lora_jax.models.parts.activations import gelu_tanh
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
  Width,
)

__all__ = ["ACTIVATIONS", "GPT2", "GPT2Config", "init_cache", "layer_norm"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu_new": gelu_tanh,
  "gelu_pytorch_tanh": gelu_tanh,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
  "silu": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """The shape and computation of a GPT-2; the defaults are GPT-2 small's.

  Attributes:
    vocab_size: V, tokens.
    num_positions: the longest sequence, tokens.
    embed_dim: D.
    num_layers: blocks.
    num_heads: of attention; divides `embed_dim`.
    mlp_dim: inner width of the MLP; None is 4 D.
    activation: of the MLP, by Hugging Face's name. `gelu_new` is the tanh form.
    layer_norm_epsilon: added to the variance.
    tie_head: whether the head is the token embedding.
    dtype: of the computation; softmax, normalization and logits are float32.
    param_dtype: of new parameters.
    scan_layers: stacks the layers' parameters (`h/...` with a leading axis) and scans over
      them, which compiles faster; otherwise they are `h_0/...`, `h_1/...`.
    remat: the policy of `jax.checkpoint_policies` that chooses what to save for the backward pass,
      one of `REMAT_POLICIES`; None saves everything.
    attention: `compact` has the short backward pass of `attention.py`; `xla` and `cudnn` are
      `jax.nn.dot_product_attention` (`cudnn`: only on GPUs, in float16 or bfloat16).
  """

  vocab_size: NumRows = 50257
  num_positions: NumRows = 1024
  embed_dim: Width = 768
  num_layers: NumLayers = 12
  num_heads: Width = 12
  mlp_dim: Width | None = None
  activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu_new"
  layer_norm_epsilon: Epsilon = 1e-5
  tie_head: bool = True
  dtype: FloatDtype = "float32"
  param_dtype: FloatDtype = "float32"
  scan_layers: bool = False
  remat: Remat = None
  attention: AttentionName = "compact"

  def __post_init__(self):
    check_fields(self)
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f"num_heads must divide embed_dim, got {self.num_heads} heads for {self.embed_dim}"
      )

  @property
  def num_kv_heads(self) -> int:
    return self.num_heads

  @property
  def sliding_window(self) -> None:
    return None

  @property
  def head_size(self) -> int:
    return self.embed_dim // self.num_heads


class Attention(nn.Module):
  """Causal multi-head attention, over the sequence itself or over a cache."""

  config: GPT2Config

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], cache: Any, context: Context
  ) -> tuple[Float[Array, "B T D"], Any]:
    config = self.config

    def heads(name: str, x: Array) -> Array:
      return dense(config, config.embed_dim, name, x).reshape(*x.shape[:2], -1, config.head_size)

    query, key, value = (
      heads("query", take(x, context.token_index)),
      heads("key", x),
      heads("value", x),
    )
    out, cache = attend(config, query, key, value, cache, context)
    out = out.reshape(*out.shape[:2], -1)
    return dense(config, config.embed_dim, "out", out, _residual_std(config)), cache


class MLP(nn.Module):
  """Two dense layers with an activation between them."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config = self.config
    x = dense(config, config.mlp_dim or 4 * config.embed_dim, "up", x)
    x = ACTIVATIONS[config.activation](x)
    return dense(config, config.embed_dim, "down", x, _residual_std(config))


class Block(nn.Module):
  """One layer: attention and MLP, each after a LayerNorm and added to its input."""

  config: GPT2Config

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], cache: Any, context: Context
  ) -> tuple[Float[Array, "B T D"], Any]:
    config, x = self.config, checkpoint_name(x, LAYER_INPUT)
    attention = Attention(config, name="attn")
    attended, cache = attention(layer_norm(config, "ln_1")(x), cache, context)
    x = take(x, context.token_index) + checkpoint_name(attended, ATTENTION_OUTPUT)
    out = MLP(config, name="mlp")(layer_norm(config, "ln_2")(x))
    return checkpoint_name(x + checkpoint_name(out, MLP_OUTPUT), LAYER_OUTPUT), cache


class GPT2(CausalLM):
  """A GPT-2 language model; `CausalLM` defines its methods."""

  config: GPT2Config

  def setup(self):
    config = self.config
    embed = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    init = nn.initializers.normal(0.02)
    self.wte = nn.Embed(config.vocab_size, config.embed_dim, embedding_init=init, **embed)
    self.wpe = nn.Embed(config.num_positions, config.embed_dim, embedding_init=init, **embed)
    self.h = make_layers(config, Block)
    self.ln_f = layer_norm(config, None)
    if not config.tie_head:
      self.lm_head = make_head(config)

  def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return look_up(self.wte, tokens) + self.wpe(positions)

  def stack(self) -> Any:
    return self.h

  def norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return self.ln_f(x)

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns the head's output, float32, for any of the hidden states."""
    if self.config.tie_head:
      return head(hidden, None, self.wte.embedding.astype(self.config.dtype))
    return head(hidden, self.lm_head, None)


def _residual_std(config: GPT2Config) -> float:
  """Returns the initial std of kernels before a sum (Radford et al. 2019, sec. 2.3)."""
  return 0.02 / (2 * config.num_layers) ** 0.5


def layer_norm(config: Any, name: str | None) -> nn.LayerNorm:
  """Returns a LayerNorm that computes the variance from the differences, as torch does."""
  return nn.LayerNorm(
    config.layer_norm_epsilon,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_fast_variance=False,
    name=name,
  )
