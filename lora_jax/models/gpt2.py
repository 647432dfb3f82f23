"""GPT-2 (Radford et al. 2019) in Flax Linen.

    x = wte[token] + wpe[position]
    for each layer:  x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))
    logits = ln_f(x) wte^T

Query, key and value have kernels of their own, so that LoRA of `attn/(query|value)/kernel` is
the paper's. `hub.py` reads and writes Hugging Face folders. There is no dropout in the model:
the paper fine-tunes with LoRA's own alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from lora_jax.models.attention import cached_attention, causal_attention, write_cache

Cache = tuple[Any, ...] | tuple[Array, Array]
REMAT_POLICIES = (
  "nothing_saveable",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
  "everything_saveable",
)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu_new": nn.gelu,
  "gelu_pytorch_tanh": nn.gelu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
  "silu": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """The shape of a GPT-2 and how it is computed; the defaults are GPT-2 small's.

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
    remat: what the backward pass keeps of each layer: None is everything; else the name of a
      policy of `jax.checkpoint_policies`, one of `REMAT_POLICIES`.
    attention: `compact`, whose backward pass is the shorter one of `attention.py`; `xla` and
      `cudnn` are `jax.nn.dot_product_attention` (`cudnn`: GPUs, float16 or bfloat16 only).
  """

  vocab_size: int = 50257
  num_positions: int = 1024
  embed_dim: int = 768
  num_layers: int = 12
  num_heads: int = 12
  mlp_dim: int | None = None
  activation: str = "gelu_new"
  layer_norm_epsilon: float = 1e-5
  tie_head: bool = True
  dtype: Any = "float32"
  param_dtype: Any = "float32"
  scan_layers: bool = False
  remat: str | None = None
  attention: str = "compact"

  def __post_init__(self):
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f"num_heads must divide embed_dim, got {self.num_heads} heads for {self.embed_dim}"
      )
    _check_choice("activation", self.activation, tuple(ACTIVATIONS))
    _check_choice("attention", self.attention, ("compact", "xla", "cudnn"))
    _check_choice("remat", self.remat, (None, *REMAT_POLICIES))
    for name in ("dtype", "param_dtype"):
      _check_choice(name, jnp.dtype(getattr(self, name)).name, ("float32", "bfloat16", "float16"))


class Attention(nn.Module):
  """Causal multi-head attention, over the sequence itself or over a cache."""

  config: GPT2Config

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B S D"],
    mask: Bool[Array, "#B 1 T K"] | None,
    cache: Any,
    index: Any,
    at: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Any]:
    config = self.config

    def heads(name: str, x: Array) -> Array:
      size = config.embed_dim // config.num_heads
      return _dense(config, config.embed_dim, name, x).reshape(*x.shape[:2], -1, size)

    query, key, value = heads("query", _take(x, at)), heads("key", x), heads("value", x)
    if cache is not None:
      keys, values = cache = write_cache(cache, key, value, index)
      assert mask is not None, "a cache is read by a mask"
      out = cached_attention(query, keys, values, mask)
    elif config.attention == "compact":
      out = causal_attention(query, key, value, mask)
    else:
      implementation: Any = config.attention
      out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=at is None, implementation=implementation
      )
    out = out.reshape(*out.shape[:2], -1)
    return _dense(config, config.embed_dim, "out", out, _residual_std(config)), cache


class MLP(nn.Module):
  """Two dense layers with an activation between them."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config = self.config
    x = _dense(config, config.mlp_dim or 4 * config.embed_dim, "up", x)
    x = ACTIVATIONS[config.activation](x)
    return _dense(config, config.embed_dim, "down", x, _residual_std(config))


class Block(nn.Module):
  """One layer: attention and MLP, each after a LayerNorm and added to its input."""

  config: GPT2Config

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], cache: Any, mask: Any, index: Any, at: Any = None
  ) -> tuple[Float[Array, "B T D"], Any]:
    config = self.config
    attended, cache = Attention(config, name="attn")(
      _layer_norm(config, "ln_1")(x), mask, cache, index, at
    )
    x = _take(x, at) + attended
    return x + MLP(config, name="mlp")(_layer_norm(config, "ln_2")(x)), cache


class GPT2(nn.Module):
  """A GPT-2 language model."""

  config: GPT2Config

  def setup(self):
    config = self.config
    embed = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    init = nn.initializers.normal(0.02)
    self.wte = nn.Embed(config.vocab_size, config.embed_dim, embedding_init=init, **embed)
    self.wpe = nn.Embed(config.num_positions, config.embed_dim, embedding_init=init, **embed)
    block = Block
    if config.remat is not None:
      policy = getattr(jax.checkpoint_policies, config.remat)
      block = nn.remat(Block, policy=policy, prevent_cse=not config.scan_layers)
    if config.scan_layers:
      in_axes: Any = (0, nn.broadcast, nn.broadcast)  # of the cache, the mask and the index
      self.h: Any = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=config.num_layers,
      )(config)
    else:
      self.h = [block(config) for _ in range(config.num_layers)]
    self.ln_f = _layer_norm(config, None)
    if not config.tie_head:
      self.lm_head = nn.Dense(
        config.vocab_size, use_bias=False, kernel_init=init, dot_general=_float32_dot, **embed
      )

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Returns the logits of each next token, float32.

    Args:
      tokens: ids.
      positions: of each token in its sequence, from 0; None counts along each row.
      segment_ids: tokens attend within their own segment only: packed examples are 1, 2, ...,
        and padding is 0. None is one segment a row.
    """
    return self.logits(self.hidden(tokens, positions, segment_ids))

  def hidden(
    self,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    at: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Returns the normalized output of the last layer; arguments as of a call.

    Args:
      at: indices in each row of the tokens whose output is wanted; None is all of them. Where
        they are fewer than a row's tokens, the last layer computes no other outputs (of layers
        that are not scanned).
    """
    mask = None
    if segment_ids is not None:
      mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return self._layers(tokens, positions, None, mask, None, at)[0]

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns the head's output, float32, for any of the hidden states.

    It sees one axis of tokens, for the reason given in `_dense`.
    """
    tokens = hidden.reshape(-1, hidden.shape[-1])
    if self.config.tie_head:
      embedding = self.wte.embedding.astype(self.config.dtype)
      logits = _float32_dot(tokens, embedding, (((1,), (1,)), ((), ())))
    else:
      logits = self.lm_head(tokens)
    return logits.reshape(*hidden.shape[:-1], -1)

  def extend(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    index: Int[Array, ""] | int,
    mask: Bool[Array, "#B T S"],
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Processes further tokens, whose keys and values it writes into the cache.

    The mask alone decides what a token sees: it holds the causal order, padding, and which
    slots a beam descends from.

    Args:
      tokens: ids.
      positions: of each token in its sequence.
      cache: as `init_cache` makes it, with S slots.
      index: the first of the T slots that are written.
      mask: True where a token attends to a slot; a token's own slot included.

    Returns:
      The normalized output of the last layer, for `logits`, and the cache.
    """
    slots = jax.tree.leaves(cache)[0].shape[-1]
    if isinstance(index, int) and not 0 <= index <= slots - tokens.shape[1]:
      raise ValueError(
        f"{tokens.shape[1]} tokens do not fit a cache of {slots} slots from slot {index} on"
      )
    return self._layers(tokens, positions, cache, mask[:, None], index)

  def _layers(self, tokens, positions, cache, mask, index, at=None) -> tuple[Array, Any]:
    limit = self.config.num_positions
    if positions is None:
      if tokens.shape[1] > limit:
        raise ValueError(
          f"{tokens.shape[1]} tokens a row, but the model has {limit} positions; "
          "cut the rows, or give positions of packed examples"
        )
      positions = jnp.arange(tokens.shape[1])[None]
    x = self.wte(tokens) + self.wpe(jnp.broadcast_to(positions, tokens.shape))
    if self.config.scan_layers:
      x, cache = self.h(x, cache, mask, index)
      return self.ln_f(_take(x, at)), cache
    layers = []
    for i, block in enumerate(self.h):
      before = None if cache is None else cache[i]
      if at is not None and block is self.h[-1] and at.shape[1] < tokens.shape[1]:
        x, layer = block(x, before, _causal_mask(mask, at, tokens.shape[1]), index, at)
        at = None  # the others are gone
      else:
        x, layer = block(x, before, mask, index)
      layers.append(layer)
    return self.ln_f(_take(x, at)), None if cache is None else tuple(layers)


def init_cache(config: GPT2Config, batch_size: int, num_slots: int) -> Cache:
  """Returns an empty cache of keys and values for `GPT2.extend`.

  Each layer has keys (batch_size, heads, head size, num_slots) and values (batch_size, heads,
  num_slots, head size) of the model's dtype; the axis of scanned layers comes first.
  """
  heads, size = config.num_heads, config.embed_dim // config.num_heads
  shapes = (batch_size, heads, size, num_slots), (batch_size, heads, num_slots, size)
  if config.scan_layers:
    keys, values = (jnp.zeros((config.num_layers, *shape), config.dtype) for shape in shapes)
    return keys, values
  return tuple(
    tuple(jnp.zeros(shape, config.dtype) for shape in shapes) for _ in range(config.num_layers)
  )


_float32_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
"""Of a head: GPT-2's logits are about -100, where bfloat16's steps are of half a nat."""


def _dense(
  config: GPT2Config, features: int, name: str, x: Float[Array, "B T D"], std: float = 0.02
) -> Float[Array, "B T F"]:
  """Applies a dense layer that sees one axis of tokens instead of rows and positions.

  With two, the gradients of kernels and of LoRA's B contract over both, for which XLA on CPUs
  first copies the transposed gradient of the output, at the cost of several such products.
  """
  layer = nn.Dense(
    features,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=nn.initializers.normal(std),
    name=name,
  )
  return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def _take(x: Float[Array, "B S D"], at: Int[Array, "B T"] | None) -> Float[Array, "B T D"]:
  """Returns some tokens of each row; all of them if `at` is None."""
  return x if at is None else jnp.take_along_axis(x, at[..., None], axis=1)


def _causal_mask(
  mask: Bool[Array, "B 1 S S"] | None, at: Int[Array, "B T"], length: int
) -> Bool[Array, "B 1 T S"]:
  """Returns what some tokens of each row see: up to themselves, and by the mask."""
  causal = (at[:, :, None] >= jnp.arange(length)[None, None])[:, None]
  return causal if mask is None else causal & jnp.take_along_axis(mask, at[:, None, :, None], 2)


def _residual_std(config: GPT2Config) -> float:
  """Radford et al. 2019, sec. 2.3: new kernels before each of the 2 L sums are smaller."""
  return 0.02 / (2 * config.num_layers) ** 0.5


def _layer_norm(config: GPT2Config, name: str | None) -> nn.LayerNorm:
  return nn.LayerNorm(
    config.layer_norm_epsilon,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_fast_variance=False,
    name=name,
  )


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
