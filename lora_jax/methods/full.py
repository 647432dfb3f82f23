"""Full fine-tuning: every leaf is trainable."""

from collections.abc import Callable
from typing import Any

from lora_jax.adaptation import Adaptation


def full_finetuning(fn: Callable[..., Any]) -> Adaptation:
  """Returns full fine-tuning of `fn(params, *args, **kwargs)` as an `Adaptation`.

  The trainable tree *is* `params`, not a copy, which would hold the weights twice: a step
  that donates it deletes the original. `apply` takes its `params` argument for the sake of
  the common form, and ignores it.
  """

  def init(key, params, *args, **kwargs):
    del key, args, kwargs
    return params

  def apply(params, trainable, *args, lora_key=None, scaling=None, dropout_rate=None, **kwargs):
    del params, lora_key, scaling, dropout_rate
    return fn(trainable, *args, **kwargs)

  def merge(params, trainable):
    del params
    return trainable

  return Adaptation(init, apply, merge)
