"""Whether a trainable tree fits the params and the config it is applied with."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.adapters.delta import LoraWeight, adapter_extra, adapter_weights, stored_shape


def check_adapter(trainable: PyTree, targets: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
  """Checks a trainable tree against the weights it is for.

  Args:
    trainable: the tree to check.
    targets: path to `Target`, whose `leaf` is the weight.
    extra: path to `(keys, leaf)` of the leaves trained whole.
  Raises:
    ValueError: listing every missing, unexpected and mis-shaped leaf.
  """
  weights, whole = adapter_weights(trainable), adapter_extra(trainable)
  problems = [f"missing: {path}" for path in targets if path not in weights]
  problems += [f"missing: {path}" for path in extra if path not in whole]
  problems += [f"unexpected: {path}" for path in weights if path not in targets]
  problems += [f"unexpected: {path}" for path in whole if path not in extra]
  for path, weight in weights.items():
    if path in targets:
      problems += _misshaped(path, weight, targets[path].leaf.shape)
  for path, leaf in whole.items():
    if path in extra and jnp.shape(leaf) != jnp.shape(extra[path][1]):
      expected = jnp.shape(extra[path][1])
      problems.append(f"mis-shaped: {path} is {jnp.shape(leaf)}, expected {expected}")
  if problems:
    raise ValueError(
      "the trainable tree is not for these params and this config:\n  " + "\n  ".join(problems)
    )


def _misshaped(path: str, weight: LoraWeight, shape: Sequence[int]) -> list[str]:
  axes = weight.axes
  if len(axes.batch) + len(axes.inputs) + len(axes.outputs) != len(shape):
    return [f"mis-shaped: {path} has {axes}, but the weight has shape {tuple(shape)}"]
  shape = stored_shape(shape, axes, weight.layers)
  rank = weight.lora_a.shape[-1]
  expected = {"lora_a": axes.a_shape(shape, rank), "lora_b": axes.b_shape(shape, rank)}
  got = {"lora_a": tuple(weight.lora_a.shape), "lora_b": tuple(weight.lora_b.shape)}
  return [
    f"mis-shaped: {path}/{name} is {got[name]}, expected {expected[name]}"
    for name in expected
    if got[name] != expected[name]
  ]
