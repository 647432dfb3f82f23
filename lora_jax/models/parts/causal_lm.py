"""Parts that the language models share: layers, masks, caches and heads.

x = embed(tokens, positions)
for each layer:  x = block(x, its cache, context)
logits = head(norm(x))
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PyTree

from lora_jax.marks import FLOAT32_DOT, HEAD_INPUT, TOKEN_EMBEDDINGS, TOKENS
from lora_jax.models.parts.attention import cached_attention, causal_attention, write_cache

Cache = tuple[Any, ...] | tuple[Array, Array]


class Layers(Protocol):
  """The fields that layers read of a model's config."""

  @property
  def num_layers(self) -> int: ...
  @property
  def dtype(self) -> Any: ...
  @property
  def param_dtype(self) -> Any: ...
  @property
  def scan_layers(self) -> bool: ...
  @property
  def remat(self) -> str | None: ...


class Shape(Layers, Protocol):
  """The fields that the parts in this file read of a language model's config."""

  @property
  def num_positions(self) -> int: ...
  @property
  def num_kv_heads(self) -> int: ...
  @property
  def head_size(self) -> int: ...
  @property
  def attention(self) -> str: ...
  @property
  def sliding_window(self) -> int | None: ...


class Context(NamedTuple):
  """Inputs that all layers share, apart from the hidden states and the cache.

  Attributes:
    mask: (#B, 1, T, S), True where a token may see another, in addition to causal order; None is
      everywhere.
    index: the first cache slot to write.
    token_index: (B, T), the tokens of each row whose output is computed; None is all.
    rotation: (B, T, H) cosines and sines that rotate queries and keys by position, or None.
  """

  mask: Any = None
  index: Any = None
  token_index: Any = None
  rotation: Any = None


class CausalLM(nn.Module):
  """A language model; subclasses define `embed`, `stack`, `norm` and `logits`."""

  config: Any

  def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    raise NotImplementedError

  def stack(self) -> Any:
    """Returns the layers, as `make_layers` makes them."""
    raise NotImplementedError

  def norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    raise NotImplementedError

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns the head's output, float32, for any of the hidden states."""
    raise NotImplementedError

  def rotation(self, positions: Int[Array, "B T"]) -> Any:
    del positions

  def slides(self, layer: int) -> bool:
    """Returns whether a layer has the config's sliding window, if there is one."""
    del layer
    return True

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
    token_index: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Returns the normalized output of the last layer; arguments as in `__call__`.

    Args:
      token_index: indices in each row of the tokens to return the output of; None is all. With
        fewer than a row's tokens, the last layer computes only these (unless layers are scanned).
    """
    mask = None
    if segment_ids is not None:
      mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return self._run(tokens, positions, None, Context(mask, token_index=token_index))[0]

  def extend(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    index: Int[Array, ""] | int,
    mask: Bool[Array, "#B T S"],
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Processes further tokens and writes their keys and values into the cache.

    Only the mask decides what a token sees: it holds the causal order, the padding and the slots
    that a beam descends from.

    Args:
      tokens: ids.
      positions: of each token in its sequence.
      cache: as `init_cache` makes it, with S slots.
      index: the first of the T slots that are written.
      mask: True where a token attends to a slot; a token's own slot included.

    Returns:
      The normalized output of the last layer, for `logits`, and the cache.
    """
    slots, window = jax.tree.leaves(cache)[0].shape[-1], self.config.sliding_window
    if window is not None and slots > window:
      raise ValueError(
        f"the model's sliding window is {window} tokens; a cache of {slots} slots would have to "
        "slide, which is not supported. Generate fewer tokens"
      )
    if isinstance(index, int) and not 0 <= index <= slots - tokens.shape[1]:
      raise ValueError(
        f"{tokens.shape[1]} tokens do not fit a cache of {slots} slots from slot {index} on"
      )
    return self._run(tokens, positions, cache, Context(mask[:, None], index))

  def _run(self, tokens, positions, cache, context: Context) -> tuple[Array, Any]:
    limit = self.config.num_positions
    if positions is None:
      if tokens.shape[1] > limit:
        raise ValueError(
          f"{tokens.shape[1]} tokens a row, but the model has {limit} positions; "
          "cut the rows, or give positions of packed examples"
        )
      positions = jnp.arange(tokens.shape[1])[None]
    positions = jnp.broadcast_to(positions, tokens.shape)
    x, token_index = self.embed(tokens, positions), context.token_index
    windowed, window = context.mask, self.config.sliding_window
    if cache is None and window is not None and window < tokens.shape[1]:
      windowed = window_mask(windowed, window, tokens.shape[1])
    context = context._replace(token_index=None, rotation=self.rotation(positions))
    stack = self.stack()
    if self.config.scan_layers:
      x, cache = stack(x, cache, context._replace(mask=windowed))
      return self.norm(take(x, token_index)), cache
    written = []
    for i, block in enumerate(stack):
      before = None if cache is None else cache[i]
      layer_context = context._replace(mask=windowed) if self.slides(i) else context
      if token_index is not None and block is stack[-1] and token_index.shape[1] < tokens.shape[1]:
        mask = causal_mask(layer_context.mask, token_index, tokens.shape[1])
        x, layer = block(x, before, layer_context._replace(mask=mask, token_index=token_index))
        token_index = None  # the others are gone
      else:
        x, layer = block(x, before, layer_context)
      written.append(layer)
    return self.norm(take(x, token_index)), None if cache is None else tuple(written)


def make_layers(config: Layers, block: Callable[..., nn.Module], num_static: int = 0) -> Any:
  """Returns the layers of a model: a list, or one module that scans over stacked ones.

  Args:
    config: of the model.
    block: makes a layer, which is called with its input, its cache or number, the context that
      all layers share, and Python values.
    num_static: the number of such values.
  """
  if config.remat is not None:
    policy = getattr(jax.checkpoint_policies, config.remat)
    static = tuple(range(4, 4 + num_static))  # the block itself is 0
    remat: Any = nn.remat
    block = remat(block, policy=policy, prevent_cse=not config.scan_layers, static_argnums=static)
  if not config.scan_layers:
    return [block(config) for _ in range(config.num_layers)]
  in_axes: Any = (0, nn.broadcast, *[nn.broadcast] * num_static)
  return nn.scan(
    block,  # pyright: ignore
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=config.num_layers,
  )(config)


def shapes_of(model: nn.Module) -> PyTree:
  """Returns the `ShapeDtypeStruct`s of a model's params, tracing only one of its equal layers.

  Args:
    model: its `config` has `num_layers` and `scan_layers`; its layers come from `make_layers`.
  """
  config: Any = getattr(model, "config")  # noqa: B009
  single = model.clone(config=dataclasses.replace(config, num_layers=1, scan_layers=False))
  tokens = jax.ShapeDtypeStruct((1, 1), "int32")
  shapes = dict(jax.eval_shape(single.init, jax.random.key(0), tokens)["params"])
  (first,) = (name for name in shapes if name.endswith("_0"))
  layer, layers = shapes.pop(first), first.removesuffix("_0")
  if not config.scan_layers:
    return shapes | {f"{layers}_{i}": layer for i in range(config.num_layers)}

  def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.num_layers, *leaf.shape), leaf.dtype)

  return shapes | {layers: jax.tree.map(stacked, layer)}


def look_up(table: nn.Embed, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
  """Returns the embeddings of tokens, marked for methods that replace them."""
  return checkpoint_name(table(checkpoint_name(tokens, TOKENS)), TOKEN_EMBEDDINGS)


def attend(
  config: Shape,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  cache: Any,
  context: Context,
) -> tuple[Float[Array, "B T N H"], Any]:
  """Returns the attention over the sequence itself or over a cache, and the cache.

  Several heads of the queries share one of the keys and values, N / K of them.
  """
  if cache is not None:
    keys, values = cache = write_cache(cache, key, value, context.index)
    assert context.mask is not None, "a cache is read by a mask"
    return cached_attention(query, keys, values, context.mask), cache
  if config.attention == "compact":
    return causal_attention(query, key, value, context.mask), None
  implementation: Any = config.attention
  out = jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=context.mask,
    is_causal=context.token_index is None,
    implementation=implementation,
  )
  return out, None


def init_cache(config: Shape, batch_size: int, num_slots: int) -> Cache:
  """Returns an empty cache of keys and values for `CausalLM.extend`.

  Each layer has keys (batch_size, heads, head size, num_slots) and values (batch_size, heads,
  num_slots, head size) of the model's dtype; the axis of scanned layers comes first.
  """
  heads, size = config.num_kv_heads, config.head_size
  shapes = (batch_size, heads, size, num_slots), (batch_size, heads, num_slots, size)
  if config.scan_layers:
    keys, values = (jnp.zeros((config.num_layers, *shape), config.dtype) for shape in shapes)
    return keys, values
  return tuple(
    tuple(jnp.zeros(shape, config.dtype) for shape in shapes) for _ in range(config.num_layers)
  )


def dense(
  config: Layers,
  features: int,
  name: str,
  x: Float[Array, "B T D"],
  std: float = 0.02,
  use_bias: bool = True,
) -> Float[Array, "B T F"]:
  """Applies a dense layer to one axis of tokens instead of rows and positions.

  With two, the gradients of kernels and of LoRA's B contract over both, and XLA on CPUs first
  copies the transposed gradient of the output, which costs as much as several such matmuls.
  """
  layer = make_dense(config, features, name, std, use_bias)
  return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def make_dense(
  config: Layers, features: int, name: str | None, std: float = 0.02, use_bias: bool = True
) -> nn.Dense:
  """Returns a dense layer."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=nn.initializers.normal(std),
    name=name,
  )


def float32_dot(
  x: Float[Array, "..."], weight: Float[Array, "..."], dimensions: Any, precision: Any = None
) -> Float[Array, "..."]:
  """Returns the logits, float32: GPT-2's are about -100, where bfloat16's steps are half a nat.

  In bfloat16 the gradient of the logits, at most 1 for a token, is rounded to bfloat16: otherwise
  the matmuls of the backward pass, as large as this one, would be float32.
  """
  is_bfloat16 = x.dtype == weight.dtype == jnp.bfloat16
  dot = _dot_with_rounded_gradient if is_bfloat16 else _float32_dot
  return dot(x, weight, dimensions, precision)


def _float32_dot(x: Array, weight: Array, dimensions: Any, precision: Any) -> Array:
  return jax.lax.dot_general(x, weight, dimensions, precision, preferred_element_type=jnp.float32)


_float32_dot.__name__ = FLOAT32_DOT  # by which the transform knows it
_dot_with_rounded_gradient: Any = jax.custom_vjp(_float32_dot, nondiff_argnums=(2, 3))


def _forward(x: Array, weight: Array, dimensions: Any, precision: Any) -> Any:
  return _float32_dot(x, weight, dimensions, precision), (x, weight)


def _rounded_backward(dimensions: Any, precision: Any, inputs: Any, gradient: Array) -> Any:
  def dot(x: Array, weight: Array) -> Array:
    return jax.lax.dot_general(x, weight, dimensions, precision)

  return jax.vjp(dot, *inputs)[1](gradient.astype(jnp.bfloat16))


_dot_with_rounded_gradient.defvjp(_forward, _rounded_backward)


def make_head(config: Any) -> nn.Dense:
  """Returns a head that is not tied to the embedding."""
  return nn.Dense(
    config.vocab_size,
    use_bias=False,
    kernel_init=nn.initializers.normal(0.02),
    dot_general=float32_dot,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
  )


def head(
  hidden: Float[Array, "*B D"], lm_head: nn.Dense | None, embedding: Float[Array, "V D"] | None
) -> Float[Array, "*B V"]:
  """Returns the logits of a head, or of the embedding if the head is tied to it.

  It computes over one axis of tokens, for the reason given in `dense`.
  """
  tokens = checkpoint_name(hidden, HEAD_INPUT).reshape(-1, hidden.shape[-1])
  if lm_head is not None:
    logits = lm_head(tokens)
  else:
    assert embedding is not None, "an untied head or the embedding"
    logits = float32_dot(tokens, embedding, (((1,), (1,)), ((), ())))
  return logits.reshape(*hidden.shape[:-1], -1)


def take(
  x: Float[Array, "B S *D"], token_index: Int[Array, "B T"] | None
) -> Float[Array, "B T *D"]:
  """Returns some tokens of each row; all of them if `token_index` is None."""
  return x if token_index is None else jnp.take_along_axis(x, token_index[..., None], axis=1)


def window_mask(
  mask: Bool[Array, "#B 1 T T"] | None, window: int, length: int
) -> Bool[Array, "#B 1 T T"]:
  """Returns a mask that hides the tokens `window` or more positions back."""
  place = jnp.arange(length)
  visible = (place[:, None] - place[None] < window)[None, None]
  return visible if mask is None else mask & visible


def causal_mask(
  mask: Bool[Array, "#B 1 S S"] | None, token_index: Int[Array, "B T"], length: int
) -> Bool[Array, "B 1 T S"]:
  """Returns the mask of some tokens of each row: causal, and limited by `mask`."""
  causal = (token_index[:, :, None] >= jnp.arange(length)[None, None])[:, None]
  return (
    causal if mask is None else causal & jnp.take_along_axis(mask, token_index[:, None, :, None], 2)
  )
