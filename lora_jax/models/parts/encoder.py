"""Parts that the encoders share: layers, attention masks, heads and dropout.

x = embed(tokens, positions, token types)
for each layer:  x = norm(x + attn(x));  x = norm(x + mlp(x))
logits = head(x of the first token)
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lora_jax.fields import check_fields
from lora_jax.marks import ATTENTION_OUTPUT, MLP_OUTPUT
from lora_jax.models.gpt2.model import ACTIVATIONS, layer_norm
from lora_jax.models.parts.causal_lm import Layers, dense, take


class EncoderShape(Layers, Protocol):
  """The fields that the parts in this file read of a model's config."""

  @property
  def vocab_size(self) -> int: ...
  @property
  def pad_id(self) -> int: ...
  @property
  def embed_dim(self) -> int: ...
  @property
  def num_heads(self) -> int: ...
  @property
  def mlp_dim(self) -> int: ...
  @property
  def activation(self) -> str: ...
  @property
  def hidden_dropout(self) -> float: ...
  @property
  def attention_dropout(self) -> float: ...
  @property
  def num_labels(self) -> int | None: ...


class Context(NamedTuple):
  """Inputs that all layers share, apart from the hidden states.

  Attributes:
    mask: (B, 1, T, S), True where a token may see another; None is everywhere.
    token_index: (B, T), the tokens of each row to compute; None is all.
    extra: further inputs that a model's layers need.
  """

  mask: Any = None
  token_index: Any = None
  extra: Any = None


class Encoder(nn.Module):
  """An encoder; subclasses define `embed`, `stack` and `logits`, and may define `extra`."""

  config: Any

  def embed(
    self,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    token_types: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"] | None,
    deterministic: bool,
  ) -> Float[Array, "B T D"]:
    raise NotImplementedError

  def stack(self) -> Any:
    """Returns the layers, as `make_layers` makes them."""
    raise NotImplementedError

  def extra(
    self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, deterministic: bool
  ) -> Any:
    """Returns further inputs of the layers, apart from the embeddings and the mask."""
    del x, segment_ids, deterministic

  def logits(self, first: Float[Array, "B A D"], deterministic: bool) -> Float[Array, "B A L"]:
    """Returns the head's output, float32, from the last layer's output for first tokens."""
    raise NotImplementedError

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    token_types: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    token_index: Int[Array, "B A"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B *A L"]:
    """Returns the logits of each row in float32; without a head, the hidden states.

    Args:
      tokens: ids.
      segment_ids: tokens attend only within their own segment: 1 for tokens and 0 for padding, as
        in a mask, or 1, 2, ... for packed sequences. None is one segment a row.
      token_types: of each token (BERT: 1 in the second sentence of a pair); None is 0.
      positions: of each token in its sequence, from 0; None counts along each row.
      token_index: indices in each row of the first tokens of packed sequences; the logits are
        then (B, A, L). None is the row's first token.
      deterministic: whether to leave dropout out; False needs the rng `dropout`.
    """
    inputs = tokens, segment_ids, token_types, positions
    if self.config.num_labels is None:
      return self.hidden(*inputs, token_index, deterministic)
    first = jnp.zeros((tokens.shape[0], 1), jnp.int32) if token_index is None else token_index
    logits = self.logits(self.hidden(*inputs, first, deterministic), deterministic)
    return logits[:, 0] if token_index is None else logits

  def hidden(
    self,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    token_types: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    token_index: Int[Array, "B A"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B A D"]:
    """Returns the output of the last layer; arguments as in `__call__`.

    Args:
      token_index: indices in each row of the tokens to return the output of; None is all. With
        fewer than a row's tokens, the last layer computes only these (unless layers are scanned).
    """
    x = self.embed(tokens, segment_ids, token_types, positions, deterministic)
    mask = None
    if segment_ids is not None:
      mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    context = Context(mask, extra=self.extra(x, segment_ids, deterministic))
    stack = self.stack()
    if self.config.scan_layers:
      return take(
        stack(x, jnp.arange(self.config.num_layers), context, deterministic)[0], token_index
      )
    numbers = [0, *[None] * (len(stack) - 1)]  # the first is the one that may differ
    for block, number in zip(stack[:-1], numbers, strict=False):
      x, _ = block(x, number, context, deterministic)
    if token_index is not None and token_index.shape[1] >= tokens.shape[1]:
      return take(stack[-1](x, numbers[-1], context, deterministic)[0], token_index)
    if mask is not None and token_index is not None:
      mask = jnp.take_along_axis(mask, token_index[:, None, :, None], axis=2)
    return stack[-1](
      x, numbers[-1], context._replace(mask=mask, token_index=token_index), deterministic
    )[0]


class MLP(nn.Module):
  """Two dense layers with an activation between them."""

  config: EncoderShape

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config = self.config
    x = ACTIVATIONS[config.activation](dense(config, config.mlp_dim, "up", x))
    return dense(config, config.embed_dim, "down", x)


def finish_layer(
  config: EncoderShape,
  x: Float[Array, "B S D"],
  attended: Float[Array, "B T D"],
  token_index: Int[Array, "B T"] | None,
  deterministic: bool,
) -> Float[Array, "B T D"]:
  """Returns a layer's output from its input and its attention's output, inside its module."""
  attended = dropout(config.hidden_dropout, attended, deterministic)
  x = take(x, token_index) + checkpoint_name(attended, ATTENTION_OUTPUT)
  x = layer_norm(config, "attn_norm")(x)
  out = dropout(config.hidden_dropout, MLP(config, name="mlp")(x), deterministic)
  x = x + checkpoint_name(out, MLP_OUTPUT)
  return layer_norm(config, "mlp_norm")(x)


def attention_weights(
  config: EncoderShape,
  scores: Float[Array, "B N T S"],
  mask: Bool[Array, "B 1 T S"] | None,
  deterministic: bool,
) -> Float[Array, "B N T S"]:
  """Returns the attention weights: softmax in float32, then dropout."""
  scores = scores.astype(jnp.float32)
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = nn.softmax(scores, axis=-1).astype(config.dtype)
  return dropout(config.attention_dropout, weights, deterministic)


def dropout(rate: float, x: Array, deterministic: bool) -> Array:
  return nn.Dropout(rate)(x, deterministic=deterministic)


def positions_of(
  tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None, limit: int
) -> Int[Array, "B T"]:
  """Returns the positions, counted along each row if they are None, up to a limit."""
  if positions is not None:
    return positions
  if tokens.shape[1] > limit:
    raise ValueError(
      f"{tokens.shape[1]} tokens a row, but the model has {limit} positions; cut the rows, or "
      "give positions of packed sequences"
    )
  return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)


def embedding(config: EncoderShape, size: int) -> nn.Embed:
  """Returns an embedding table of `size` rows."""
  return nn.Embed(
    size,
    config.embed_dim,
    embedding_init=nn.initializers.normal(0.02),
    dtype=config.dtype,
    param_dtype=config.param_dtype,
  )


def heads(config: EncoderShape, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
  """Applies a dense layer and splits its output into the heads of the attention."""
  out = dense(config, config.embed_dim, name, x)
  return out.reshape(*x.shape[:2], config.num_heads, -1)


def head_layer(config: EncoderShape) -> nn.Dense:
  """Returns a head's last layer, computed in float32."""
  assert config.num_labels is not None, "the model has a head"
  return nn.Dense(
    config.num_labels,
    kernel_init=nn.initializers.normal(0.02),
    dtype="float32",
    param_dtype=config.param_dtype,
    name="out",
  )


def check_encoder(config: EncoderShape) -> None:
  """Raises ValueError if a field is out of bounds, or does not fit another."""
  check_fields(config)
  if config.embed_dim % config.num_heads:
    raise ValueError(
      f"num_heads must divide embed_dim, got {config.num_heads} heads for {config.embed_dim}"
    )
  if config.pad_id >= config.vocab_size:
    raise ValueError(f"pad_id must be below vocab_size = {config.vocab_size}, got {config.pad_id}")
