"""The losses: of language models, on the tokens that have one, and of classifiers.

With logits z over V tokens, a target t and label smoothing eps, in nats, a token's loss is

    (1 - eps) * -log p_t + eps * mean_v(-log p_v)  =  logsumexp(z) - sum_v q_v z_v

with q = (1 - eps) * onehot(t) + eps / V, as the paper's code has it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree, Shaped

Batch = Mapping[str, Any]


class LossSum(NamedTuple):
  """A sum of token losses in nats, and the number of tokens in it."""

  total: Float[Array, ""]
  weight: Float[Array, ""]


def mean(loss: LossSum) -> Float[Array, ""]:
  """Returns the mean loss of a token, nats."""
  return per_token(loss.total, loss.weight)


def per_token(total: Float[Array, "*shape"], weight: Float[Array, ""]) -> Float[Array, "*shape"]:
  """Returns a sum over tokens by their number, to which 1e-4 is added as in the paper's code."""
  return total / (weight + 1e-4)


def cross_entropy(
  logits: Float[Array, "*B V"],
  targets: Int[Array, "*B"],
  weights: Float[Array, "*B"],
  label_smoothing: float = 0.0,
) -> LossSum:
  """Returns the weighted sum of the tokens' losses.

  Args:
    logits: of the next token; the sums are made in float32.
    targets: ids of the next token.
    weights: of each token; 0 leaves it out.
    label_smoothing: eps, the share of the target that goes to all tokens alike.
  """
  logits = logits.astype(jnp.float32)
  is_target = (
    jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
  )
  uniform = label_smoothing / logits.shape[-1]
  wanted = jnp.where(is_target, 1 - label_smoothing + uniform, uniform)
  losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(wanted * logits, axis=-1)
  return LossSum(jnp.sum(losses * weights), jnp.sum(weights))


def language_model_loss(
  model: nn.Module, label_smoothing: float = 0.0, chunk_size: int | None = None
) -> Callable[[PyTree, Batch], LossSum]:
  """Returns the loss of a model as a function `fn(params, batch)`, for a method to adapt.

  The head, and the last layer as far as it can, see only the positions whose output has a target.

  Args:
    model: with the methods `hidden` and `logits`, as `GPT2`.
    label_smoothing: as of `cross_entropy`.
    chunk_size: target tokens of a row whose logits are in memory at once, forward and
      backward; None is all.
  """

  def loss(params: PyTree, batch: Batch) -> LossSum:
    batch = {name: jnp.asarray(array) for name, array in batch.items()}

    def call(method: str, *args: Any) -> Any:
      return model.apply({"params": params}, *args, method=method)

    names = ("tokens", "positions", "segment_ids", "target_index")
    hidden = call("hidden", *(batch[name] for name in names))

    def of_chunk(hidden: Array, targets: Array, weights: Array) -> LossSum:
      return cross_entropy(call("logits", hidden), targets, weights, label_smoothing)

    count = hidden.shape[1]
    if chunk_size is None or chunk_size >= count:
      return of_chunk(hidden, batch["targets"], batch["target_weights"])
    if count % chunk_size:
      raise ValueError(f"chunk_size {chunk_size} must divide the {count} target tokens of a row")

    def add(total: LossSum, chunk: tuple[Array, ...]) -> tuple[LossSum, None]:
      part = jax.checkpoint(of_chunk)(*chunk)
      return LossSum(*(a + b for a, b in zip(total, part, strict=True))), None

    def split(x: Array) -> Array:
      return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)

    chunks = tuple(split(x) for x in (hidden, batch["targets"], batch["target_weights"]))
    zero = LossSum(jnp.zeros(()), jnp.zeros(()))
    return jax.lax.scan(add, zero, chunks)[0]

  return loss


def classifier(model: nn.Module) -> Callable[[PyTree, Batch], Float[Array, "B L"]]:
  """Returns the logits of a model with a head as `fn(params, batch)`, for a method to adapt.

  Args:
    model: called as `Bert`. A batch with `dropout_key`, as the train step makes it, has the
      model's own dropout; without it there is none.
  """

  def logits(params: PyTree, batch: Batch) -> Float[Array, "B L"]:
    tokens = jnp.asarray(batch["tokens"])
    inputs = (jnp.asarray(batch[name]) for name in ("segment_ids", "token_types"))
    rngs = {"dropout": batch["dropout_key"]} if "dropout_key" in batch else {}
    options: dict[str, Any] = {"deterministic": not rngs, "rngs": rngs}
    out: Any = model.apply({"params": params}, tokens, *inputs, **options)
    return out

  return logits


def classification_loss(model: nn.Module) -> Callable[[PyTree, Batch], LossSum]:
  """Returns the loss of a model with a head as a function `fn(params, batch)`.

  It is the cross entropy of the classes, or where the labels are no integers the squared error of
  the head's one output. A sum over records, and their number.
  """
  of = classifier(model)

  def loss(params: PyTree, batch: Batch) -> LossSum:
    return label_loss(
      of(params, batch), jnp.asarray(batch["labels"]), jnp.asarray(batch["weights"])
    )

  return loss


def label_loss(
  logits: Float[Array, "B L"], labels: Shaped[Array, " B"], weights: Float[Array, " B"]
) -> LossSum:
  """Returns the weighted sum of the records' losses, as `classification_loss` defines them."""
  if jnp.issubdtype(labels.dtype, jnp.integer):
    return cross_entropy(logits, labels, weights)
  if logits.shape[1] != 1:
    raise ValueError(f"a regression's head has one output, got {logits.shape[1]}")
  errors = jnp.square(logits[:, 0].astype(jnp.float32) - labels)
  return LossSum(jnp.sum(errors * weights), jnp.sum(weights))
