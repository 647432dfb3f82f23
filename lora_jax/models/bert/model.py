"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) in Flax Linen.

    x = norm(tokens[token] + positions[position] + types[token type])
    for each layer:  x = norm(x + attn(x));  x = norm(x + mlp(x))

    BERT     logits = out(tanh(pooler(x of the first token)))
    RoBERTa  logits = out(tanh(dense(x of the first token)))

They differ in their positions, in the names of the head and in where it has dropout.
`folder.py` reads and writes Hugging Face folders.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lora_jax.fields import Share
from lora_jax.marks import LAYER_INPUT, LAYER_OUTPUT
from lora_jax.models.gpt2.model import ACTIVATIONS, layer_norm
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
  heads,
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

__all__ = ["Bert", "BertConfig"]


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """The shape and computation of a BERT or RoBERTa; the defaults are BERT base's.

  Attributes:
    kind: `bert` or `roberta`.
    vocab_size: V, tokens.
    num_positions: rows of the table of positions. RoBERTa never uses the first `pad_id + 1`.
    num_token_types: rows of the table of token types.
    embed_dim: D.
    num_layers: blocks.
    num_heads: of attention; divides `embed_dim`.
    mlp_dim: inner width of the MLP.
    activation: of the MLP, by Hugging Face's name.
    layer_norm_epsilon: added to the variance.
    pad_id: the token that pads rows.
    pooler: whether there is one; BERT's head needs it, RoBERTa's has its own layer.
    num_labels: L, outputs of the head: classes, or 1 for a regression; None for no head.
    hidden_dropout: dropout rate after the embeddings and each sublayer.
    attention_dropout: dropout rate of the attention's weights.
    head_dropout: dropout rate before the head's layers.
    dtype: of the computation; softmax, normalization and the head's last layer are float32.
    param_dtype: of new parameters.
    scan_layers: stacks the layers' parameters (`layers/...` with a leading axis) and scans over
      them; otherwise they are `layers_0/...`, `layers_1/...`.
    remat: as in `GPT2Config`.
  """

  kind: Literal["bert", "roberta"] = "bert"
  vocab_size: NumRows = 30522
  num_positions: NumRows = 512
  num_token_types: Width = 2
  embed_dim: Width = 768
  num_layers: NumLayers = 12
  num_heads: Width = 12
  mlp_dim: Width = 3072
  activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu"
  layer_norm_epsilon: Epsilon = 1e-12
  pad_id: RowIndex = 0
  pooler: bool = True
  num_labels: Width | None = None
  hidden_dropout: Share = 0.1
  attention_dropout: Share = 0.1
  head_dropout: Share = 0.1
  dtype: FloatDtype = "float32"
  param_dtype: FloatDtype = "float32"
  scan_layers: bool = False
  remat: Remat = None

  def __post_init__(self):
    check_encoder(self)
    if self.num_labels is not None and self.pooler != (self.kind == "bert"):
      raise ValueError(
        f"the head of a {self.kind} {'needs the' if self.kind == 'bert' else 'has no'} pooler; "
        f"expected pooler={not self.pooler} with num_labels={self.num_labels}"
      )
    if self.first_position >= self.num_positions:
      raise ValueError(
        f"a roberta's first position is pad_id + 1 = {self.first_position}, but num_positions is "
        f"{self.num_positions}"
      )

  @property
  def first_position(self) -> int:
    """The row of the table for the first token of a sequence."""
    return self.pad_id + 1 if self.kind == "roberta" else 0


class Attention(nn.Module):
  """Multi-head attention among the tokens of a segment."""

  config: BertConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], context: Context, deterministic: bool
  ) -> Float[Array, "B T D"]:
    config = self.config
    query = heads(config, "query", take(x, context.token_index))
    key, value = heads(config, "key", x), heads(config, "value", x)
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    weights = attention_weights(config, scores, context.mask, deterministic)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, value)
    return dense(config, config.embed_dim, "out", out.reshape(*out.shape[:2], -1))


class Block(nn.Module):
  """One layer: attention and MLP, each added to its input and normalized."""

  config: BertConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], number: Any, context: Context, deterministic: bool
  ) -> tuple[Float[Array, "B T D"], None]:
    x = checkpoint_name(x, LAYER_INPUT)
    attended = Attention(self.config, name="attn")(x, context, deterministic)
    x = finish_layer(self.config, x, attended, context.token_index, deterministic)
    return checkpoint_name(x, LAYER_OUTPUT), None


class Head(nn.Module):
  """The classifier or regressor on the first token of a sequence."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B A D"], deterministic: bool) -> Float[Array, "B A L"]:
    config = self.config
    x = dropout(config.head_dropout, x, deterministic)
    if config.kind == "roberta":
      x = nn.tanh(dense(config, config.embed_dim, "dense", x))
      x = dropout(config.head_dropout, x, deterministic)
    return head_layer(config)(x)


class Bert(Encoder):
  """A BERT or RoBERTa; `Encoder` defines its methods."""

  config: BertConfig

  def setup(self):
    config = self.config
    self.token_embedding = embedding(config, config.vocab_size)
    self.position_embedding = embedding(config, config.num_positions)
    self.token_type_embedding = embedding(config, config.num_token_types)
    self.embed_norm = layer_norm(config, None)
    self.embed_dropout = nn.Dropout(config.hidden_dropout)
    self.layers = make_layers(config, Block, num_static=1)
    if config.pooler:
      self.pooler = make_dense(config, config.embed_dim, None)
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
    rows = self._position_rows(tokens, positions)
    types = jnp.zeros_like(tokens) if token_types is None else token_types
    x = look_up(self.token_embedding, tokens) + self.token_type_embedding(types)
    x = x + self.position_embedding(rows)
    if self.is_initializing() and self.config.pooler:
      self.pooled(x)  # not reached without a head
    return self.embed_dropout(self.embed_norm(x), deterministic=deterministic)

  def _position_rows(
    self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None
  ) -> Int[Array, "B T"]:
    """Returns the rows of the table of positions; RoBERTa counts without padding."""
    config = self.config
    rows = positions_of(tokens, positions, config.num_positions - config.first_position)
    if positions is not None or config.kind == "bert":
      return rows + config.first_position
    is_token = (tokens != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + config.pad_id

  def stack(self) -> Any:
    return self.layers

  def pooled(self, first: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the pooler's output from the last layer's output for first tokens."""
    if not self.config.pooler:
      raise ValueError("the model has no pooler, since its folder has none; use `hidden`")
    return nn.tanh(self.pooler(first))

  def logits(self, first: Float[Array, "B A D"], deterministic: bool) -> Float[Array, "B A L"]:
    """Returns the head's output, float32, from the last layer's output for first tokens."""
    first = self.pooled(first) if self.config.kind == "bert" else first
    return self.head(first, deterministic)
