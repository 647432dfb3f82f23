"""The loss of a classifier: cross entropy of the classes, or squared error of a regression."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Shaped

from lora_jax.training.loss import Batch, LossSum, cross_entropy


def classifier(model: nn.Module) -> Callable[..., Float[Array, "B L"]]:
  """Returns the logits of a model with a head as `fn(params, batch, *, key=None)`.

  Args:
    model: a module that is called like `Bert`. Its own dropout is on if there is a key.
  """

  def logits(
    params: PyTree, batch: Batch, *, key: PRNGKeyArray | None = None
  ) -> Float[Array, "B L"]:
    inputs = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "token_types"))
    rngs = {} if key is None else {"dropout": key}
    options: dict[str, Any] = {"deterministic": key is None, "rngs": rngs}
    outputs: Any = model.apply({"params": params}, *inputs, **options)
    return outputs

  return logits


def classification_loss(model: nn.Module) -> Callable[..., LossSum]:
  """Returns the loss of a model with a head as `fn(params, batch, *, key=None) -> LossSum`.

  The key is for the model's own dropout. The result is the sum over examples, and their number.
  """
  logits = classifier(model)

  def loss(params: PyTree, batch: Batch, *, key: PRNGKeyArray | None = None) -> LossSum:
    labels, weights = jnp.asarray(batch["labels"]), jnp.asarray(batch["weights"])
    return label_loss(logits(params, batch, key=key), labels, weights)

  return loss


def label_loss(
  logits: Float[Array, "B L"], labels: Shaped[Array, " B"], weights: Float[Array, " B"]
) -> LossSum:
  """Returns the weighted sum of the examples' losses.

  Args:
    logits: one for each class, or the one output of a regression.
    labels: class ids (cross entropy), or floats (squared error).
    weights: a weight for each example; 0 leaves it out.
  """
  if jnp.issubdtype(labels.dtype, jnp.integer):
    return cross_entropy(logits, labels, weights)
  if logits.shape[1] != 1:
    raise ValueError(f"a regression's head has one output, got {logits.shape[1]}")
  errors = jnp.square(logits[:, 0].astype(jnp.float32) - labels)
  return LossSum(jnp.sum(errors * weights), jnp.sum(weights))
