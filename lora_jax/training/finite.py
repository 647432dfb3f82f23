"""Stops a run with numbers that are not finite, naming them and the remedy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from lora_jax.training.checkpoint import Checkpoints
from lora_jax.trees import leaves_with_path

RELOAD = "these weights are damaged, or overflowed in a narrow dtype; load others, or use float32"


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
  """Returns whether no element of a tree of floats is infinite or NaN."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def check_initial(trainable: PyTree) -> None:
  """Raises FloatingPointError if a weight to train is not finite before the first step."""
  if not bool(all_finite(trainable)):
    path = _first_with(jnp.isnan, trainable) or _first_with(jnp.isinf, trainable)
    raise FloatingPointError(f"{path} is not finite before the first step: {RELOAD}")


class Diagnosis:
  """Stops a run whose loss, gradient or weights are not finite, saying why."""

  def __init__(self, checkpoints: Checkpoints, base: PyTree):
    self._checkpoints, self._base = checkpoints, base

  def check(self, value: float, quantity: str, step: int) -> None:
    """Raises FloatingPointError if a value is not finite."""
    if np.isfinite(value):
      return
    steps = self._checkpoints.steps()
    note = f"the checkpoint of step {steps[-1]} is untouched" if steps else "nothing was saved yet"
    raise FloatingPointError(
      f"the {quantity} of step {step}: {value}; training has stopped and {note}. {self._advice()}"
    )

  def _advice(self) -> str:
    path = _first_with(jnp.isnan, self._base)
    if path is not None:
      return f"The base params hold NaN at {path}: {RELOAD}"
    advice = "Try a lower learning rate, a longer warmup or clipping of the gradient's norm"
    path = _first_with(jnp.isinf, self._base)
    if path is not None:
      return f"{advice}. The base params are infinite at {path}: unless that is a mask, {RELOAD}"
    return f"{advice}; with float16, bfloat16"


def _first_with(is_wrong: Callable[[jax.Array], jax.Array], tree: PyTree) -> str | None:
  """Returns the path of the first leaf with a wrong element; None if there is none."""
  for path, leaf in leaves_with_path(tree):
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and bool(jnp.any(is_wrong(leaf))):
      return path
  return None
