"""DeBERTa-v2 and v3 (He et al. 2021, arXiv 2006.03654 and 2111.09543) in Flax Linen.

    x = norm(tokens[token])
    for each layer:  x = norm(x + attn(x));  x = norm(x + mlp(x))
    logits = out(gelu(dense(x of the first token)))

    attn    softmax((q k^T + q Kr^T + k Qr^T) / sqrt(3 H)) v, where the rows of Kr and Qr for row i
            of q and row j of k are those of the distance i - j (sec. 3.1: content to position,
            position to content)

Distances above half of the buckets share buckets, more of them the farther they are. The large v2
models add a convolution over the embeddings to the first layer's output.
`folder.py` reads and writes Hugging Face folders.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lora_jax.fields import Share, Within
from lora_jax.marks import LAYER_INPUT, LAYER_OUTPUT
from lora_jax.models.gpt2.model import ACTIVATIONS as MLP_ACTIVATIONS
from lora_jax.models.gpt2.model import layer_norm
from lora_jax.models.parts.causal_lm import dense, look_up, make_dense, make_layers, take
from lora_jax.models.parts.encoder import (
  Context,
  Encoder,
  attention_weights,
  check_encoder,
  dropout,
  embedding,
  finish_layer,
  head_layer,
  positions_of,
)
from lora_jax.models.parts.fields import (
  Epsilon,
  FloatDtype,
  NumLayers,
  NumRows,
  OneOf,
  Remat,
  RowIndex,
  Width,
)

__all__ = ["Deberta", "DebertaConfig"]

ACTIVATIONS = MLP_ACTIVATIONS | {"tanh": nn.tanh}
ActivationName = Annotated[str, OneOf(tuple(ACTIVATIONS))]


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
  """The shape and computation of a DeBERTa; the defaults are v3 base's.

  Attributes:
    vocab_size: V, tokens.
    num_positions: the length of the pretraining, tokens.
    input_positions: whether absolute positions are added to the embeddings.
    num_token_types: rows of the table of token types; 0 is none.
    embed_dim: D.
    num_layers: blocks.
    num_heads: N, of attention; divides `embed_dim`.
    mlp_dim: inner width of the MLP.
    activation: of the MLP, by Hugging Face's name.
    layer_norm_epsilon: added to the variance.
    max_distance: the largest distance that differs from those beyond.
    num_buckets: of distances in one direction, at least 4; None gives each distance its own.
    content_to_position: whether the scores have this term.
    position_to_content: whether the scores have this term.
    share_kernels: whether distances use the tokens' query and key kernels.
    norm_distances: whether the distances' embeddings are normalized.
    conv_size: tokens that the convolution spans, an odd number; None for no convolution.
    conv_activation: of the convolution.
    pad_id: the token that pads rows.
    num_labels: L, outputs of the head: classes, or 1 for a regression; None for no head.
    head_activation: between the head's layers.
    hidden_dropout: dropout rate after the embeddings, each sublayer and the distances' embeddings.
    attention_dropout: dropout rate of the attention's weights.
    pooler_dropout: dropout rate before the head's first layer.
    head_dropout: dropout rate before the head's last layer.
    dtype: of the computation; softmax, normalization and the head's last layer are float32.
    param_dtype: of new parameters.
    scan_layers: as in `BertConfig`.
    remat: as in `GPT2Config`.
  """

  vocab_size: NumRows = 128100
  num_positions: NumRows = 512
  input_positions: bool = False
  num_token_types: RowIndex = 0
  embed_dim: Width = 768
  num_layers: NumLayers = 12
  num_heads: Width = 12
  mlp_dim: Width = 3072
  activation: Annotated[str, OneOf(tuple(MLP_ACTIVATIONS))] = "gelu"
  layer_norm_epsilon: Epsilon = 1e-7
  max_distance: Width = 512
  num_buckets: Width | None = 256
  content_to_position: bool = True
  position_to_content: bool = True
  share_kernels: bool = True
  norm_distances: bool = True
  conv_size: Annotated[int, Within("[1, 1000]")] | None = None
  conv_activation: ActivationName = "gelu"
  pad_id: RowIndex = 0
  num_labels: Width | None = None
  head_activation: ActivationName = "gelu"
  hidden_dropout: Share = 0.1
  attention_dropout: Share = 0.1
  pooler_dropout: Share = 0.0
  head_dropout: Share = 0.1
  dtype: FloatDtype = "float32"
  param_dtype: FloatDtype = "float32"
  scan_layers: bool = False
  remat: Remat = None

  def __post_init__(self):
    check_encoder(self)
    if self.num_buckets is not None and not 4 <= self.num_buckets < 2 * self.max_distance - 1:
      raise ValueError(
        f"num_buckets must be at least 4 and below {2 * self.max_distance - 1}, so that some "
        f"distances share one, or None; got {self.num_buckets}"
      )
    if self.conv_size is not None and self.conv_size % 2 == 0:
      raise ValueError(f"conv_size must be an odd number, got {self.conv_size}")

  @property
  def span(self) -> int:
    """Rows of the table of distances in one direction."""
    return self.max_distance if self.num_buckets is None else self.num_buckets


class LayerInputs(NamedTuple):
  """Further inputs of the layers: distances and the convolution.

  Attributes:
    distances: (R, D), their embeddings, twice the span.
    rows: (T, S), the row of each query's distance to each key.
    conv: (B, T, D), added to the first layer's output; None adds nothing.
    conv_norm: the scale and bias of the norm after that.
    is_token: (B, T, 1), False for padding; None is True everywhere.
  """

  distances: Any
  rows: Any
  conv: Any = None
  conv_norm: Any = None
  is_token: Any = None


class Attention(nn.Module):
  """Attention with scores from contents and from distances."""

  config: DebertaConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], context: Context, deterministic: bool
  ) -> Float[Array, "B T D"]:
    config, extra = self.config, context.extra

    def layer(name: str) -> nn.Dense:
      return make_dense(config, config.embed_dim, name)

    def heads(layer: nn.Dense, x: Array) -> Array:
      return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], config.num_heads, -1)

    to_query, to_key = layer("query"), layer("key")
    query, key = heads(to_query, take(x, context.token_index)), heads(to_key, x)
    value = heads(layer("value"), x)
    distances = dropout(config.hidden_dropout, extra.distances, deterministic)
    rows = extra.rows[None] if context.token_index is None else extra.rows[context.token_index]
    rows = rows[:, None]  # (B, 1, T, S)
    scores = _einsum("BTNH,BSNH->BNTS", query, key)
    if config.content_to_position:
      keys = heads(to_key if config.share_kernels else layer("position_key"), distances)
      scores += jnp.take_along_axis(_einsum("BTNH,RNH->BNTR", query, keys), rows, axis=-1)
    if config.position_to_content:
      queries = heads(to_query if config.share_kernels else layer("position_query"), distances)
      key_scores, rows = _einsum("BSNH,RNH->BNSR", key, queries), rows.swapaxes(2, 3)
      scores += jnp.take_along_axis(key_scores, rows, axis=-1).swapaxes(2, 3)
    terms = 1 + config.content_to_position + config.position_to_content
    scores = scores * (terms * query.shape[-1]) ** -0.5
    weights = attention_weights(config, scores, context.mask, deterministic)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, value)
    return dense(config, config.embed_dim, "out", out.reshape(*out.shape[:2], -1))


def _einsum(axes: str, x: Array, y: Array) -> Array:
  return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


class Block(nn.Module):
  """One layer; the first one adds the convolution, if there is one, to its output."""

  config: DebertaConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], number: Any, context: Context, deterministic: bool
  ) -> tuple[Float[Array, "B T D"], None]:
    x = checkpoint_name(x, LAYER_INPUT)
    attended = Attention(self.config, name="attn")(x, context, deterministic)
    x = finish_layer(self.config, x, attended, context.token_index, deterministic)
    if context.extra.conv is not None and number is not None:
      x = jnp.where(number == 0, self._with_conv(x, context), x)
    return checkpoint_name(x, LAYER_OUTPUT), None

  def _with_conv(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
    extra = context.extra
    wide = (x + take(extra.conv, context.token_index)).astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + self.config.layer_norm_epsilon)
    scale, bias = (extra.conv_norm[name][None, None] for name in ("scale", "bias"))
    out = (normed * scale + bias).astype(x.dtype)
    return out if extra.is_token is None else out * take(extra.is_token, context.token_index)


class Head(nn.Module):
  """The classifier or regressor on the first token of a sequence."""

  config: DebertaConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B A D"], deterministic: bool) -> Float[Array, "B A L"]:
    config = self.config
    x = dropout(config.pooler_dropout, x, deterministic)
    x = ACTIVATIONS[config.head_activation](dense(config, config.embed_dim, "dense", x))
    return head_layer(config)(dropout(config.head_dropout, x, deterministic))


class Deberta(Encoder):
  """A DeBERTa-v2 or v3; `Encoder` defines its methods.

  Rows with padding need a mask; with a convolution, rows cannot be packed.
  """

  config: DebertaConfig

  def setup(self):
    config = self.config
    self.token_embedding = embedding(config, config.vocab_size)
    if config.input_positions:
      self.position_embedding = embedding(config, config.num_positions)
    if config.num_token_types:
      self.token_type_embedding = embedding(config, config.num_token_types)
    self.embed_norm = layer_norm(config, None)
    self.embed_dropout = nn.Dropout(config.hidden_dropout)
    self.relative_embedding = embedding(config, 2 * config.span)
    if config.norm_distances:
      self.relative_norm = layer_norm(config, None)
    if config.conv_size is not None:
      self.conv = nn.Conv(
        config.embed_dim,
        (config.conv_size,),
        kernel_init=nn.initializers.normal(0.02),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
      )
      self.conv_dropout = nn.Dropout(config.hidden_dropout)
      self.conv_norm = layer_norm(config, None)
    self.layers = make_layers(config, Block, num_static=1)
    if config.num_labels is not None:
      self.head = Head(config)

  def embed(
    self,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    token_types: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"] | None,
    deterministic: bool,
  ) -> Float[Array, "B T D"]:
    config = self.config
    if positions is not None and config.conv_size is not None:
      raise ValueError(
        "a DeBERTa with a convolution takes no packed rows, since the convolution would mix "
        "sequences; leave positions out, and give one sequence a row"
      )
    x = look_up(self.token_embedding, tokens)
    if config.input_positions:
      x = x + self.position_embedding(positions_of(tokens, positions, config.num_positions))
    if config.num_token_types:
      types = jnp.zeros_like(tokens) if token_types is None else token_types
      x = x + self.token_type_embedding(types)
    x = self.embed_norm(x)
    if segment_ids is not None:  # hides padding from the convolution
      x = x * (segment_ids != 0)[..., None]
    return self.embed_dropout(x, deterministic=deterministic)

  def extra(
    self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, deterministic: bool
  ) -> LayerInputs:
    """Returns the distances, and the convolution of the embeddings."""
    config, table = self.config, self.relative_embedding.embedding
    table = self.relative_norm(table) if config.norm_distances else table.astype(config.dtype)
    rows = distance_rows(config, x.shape[1])
    if config.conv_size is None:
      return LayerInputs(table, rows)
    out, is_token = self.conv(x), None
    if segment_ids is not None:
      is_token = (segment_ids != 0)[..., None]
      out = out * is_token
    out = self.conv_dropout(out, deterministic=deterministic)
    out = ACTIVATIONS[config.conv_activation](out)
    if self.is_initializing():
      self.conv_norm(out)  # applied by the first layer
    return LayerInputs(table, rows, out, self.conv_norm.variables["params"], is_token)

  def stack(self) -> Any:
    return self.layers

  def logits(self, first: Float[Array, "B A D"], deterministic: bool) -> Float[Array, "B A L"]:
    """Returns the head's output, float32, from the last layer's output for first tokens."""
    return self.head(first, deterministic)


def distance_rows(config: DebertaConfig, length: int) -> Int[Array, "T T"]:
  """Returns the row of the distances' table for each query (first axis) and key.

  Distances up to half of the buckets have one each; those beyond share buckets by their logarithm.
  """
  place = np.arange(length)
  distance = place[:, None] - place[None]
  if config.num_buckets is not None:
    half = config.num_buckets // 2
    far = np.maximum(np.abs(distance), half).astype(np.float32) / np.float32(half)
    share = np.log(far) / np.log(np.float32((config.max_distance - 1) / half))
    bucket = np.ceil(share * np.float32(half - 1)) + half
    distance = np.where(np.abs(distance) <= half, distance, np.sign(distance) * bucket)
  rows = np.clip(distance + config.span, 0, 2 * config.span - 1)
  return jnp.asarray(rows, jnp.int32)
