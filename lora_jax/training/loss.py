"""The loss of a language model on its supervised tokens.

With logits z over V tokens, a target t and label smoothing eps, in nats, a token's loss is

    (1 - eps) * -log p_t + eps * mean_v(-log p_v)  =  logsumexp(z) - sum_v q_v z_v

with q = (1 - eps) * onehot(t) + eps / V, as in the paper's code.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Inexact, Int, PRNGKeyArray, PyTree

from lora_jax.marks import HEAD_INPUT
from lora_jax.training.chunks import chunked_sum

Batch = Mapping[str, Any]


class LossSum(NamedTuple):
  """A sum of token losses in nats, and the number of tokens in it."""

  total: Float[Array, ""]
  weight: Float[Array, ""]


def mean(loss: LossSum) -> Float[Array, ""]:
  """Returns the mean loss per token, nats."""
  return per_token(loss.total, loss.weight)


def per_token(
  total: Inexact[Array, "*shape"], weight: Float[Array, ""]
) -> Inexact[Array, "*shape"]:
  """Returns a sum over tokens divided by their number plus 1e-4, as in the paper's code."""
  return total / (weight + 1e-4)


def cross_entropy(
  logits: Float[Array, "*B V"],
  targets: Int[Array, "*B"],
  weights: Float[Array, "*B"],
  label_smoothing: float = 0.0,
) -> LossSum:
  """Returns the weighted sum of the tokens' losses.

  Args:
    logits: the next token's logits; sums are computed in float32.
    targets: ids of the next token.
    weights: a weight for each token; 0 leaves it out.
    label_smoothing: eps, the share of the target that is spread evenly over all tokens.
  """
  logits = logits.astype(jnp.float32)
  is_target = (
    jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
  )
  uniform = label_smoothing / logits.shape[-1]
  # A sum of products of two arrays with an axis of size 1 is 20 times slower in JAX 0.10 on CPUs.
  terms = jnp.where(is_target, (1 - label_smoothing + uniform) * logits, uniform * logits)
  losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(terms, axis=-1)
  return LossSum(jnp.sum(losses * weights), jnp.sum(weights))


def language_model_loss(
  model: nn.Module, label_smoothing: float = 0.0, chunk_size: int | None = None
) -> Callable[..., LossSum]:
  """Returns the loss of a model as `fn(params, batch, *, key=None) -> LossSum`.

  The head, and as much of the last layer as possible, are applied only to positions with a target.
  These models have no dropout of their own, so a key changes nothing.

  Args:
    model: a module with the methods `hidden` and `logits`, such as `GPT2`.
    label_smoothing: as in `cross_entropy`.
    chunk_size: number of a row's target tokens whose logits are in memory at once, forward and
      backward; None is all. The gradient of a chunk is computed with its loss (`chunked_sum`); an
      adapted or quantized head computes the logits again in the backward pass instead.
  """

  def loss(params: PyTree, batch: Batch, *, key: PRNGKeyArray | None = None) -> LossSum:
    del key
    batch = {name: jnp.asarray(array) for name, array in batch.items()}

    def call(method: str, *args: Any) -> Any:
      return model.apply({"params": params}, *args, method=method)

    names = ("tokens", "positions", "segment_ids", "target_index")
    hidden = call("hidden", *(batch[name] for name in names))

    def chunk_loss(hidden: Array, weights: Array, targets: Array) -> LossSum:
      return cross_entropy(call("logits", hidden), targets, weights, label_smoothing)

    count, weights, targets = hidden.shape[1], batch["target_weights"], batch["targets"]
    if chunk_size is None or chunk_size >= count:
      return chunk_loss(hidden, weights, targets)
    if count % chunk_size:
      raise ValueError(f"chunk_size {chunk_size} must divide the {count} target tokens of a row")

    def split(x: Array) -> Array:
      return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)

    hidden = checkpoint_name(hidden, HEAD_INPUT)  # its sharding is lost inside the sum
    total = chunked_sum(
      lambda *chunk: chunk_loss(*chunk).total, (split(hidden), split(weights)), (split(targets),)
    )
    return LossSum(total, jnp.sum(weights))

  return loss
