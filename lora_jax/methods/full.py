"""Full fine-tuning: every leaf of floating-point numbers is trained."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.copies import (
  in_dtypes_of,
  is_float,
  merged_leaves,
  trained_copy,
  wide_dtype,
)
from lora_jax.adapters.delta import adapter_extra
from lora_jax.adapters.targets import array_leaves
from lora_jax.quantization.leaf import is_quantized
from lora_jax.trees import nest, replace_leaves


def full_finetuning(fn: Callable[..., Any]) -> Adaptation:
  """Returns full fine-tuning of `fn(params, *args, **kwargs)` as an `Adaptation`.

  If every leaf is float32 or wider, the trainable tree *is* `params`, not a copy, which would hold
  the weights twice: a step that donates it deletes the original, and `apply` and `merge` take None
  in place of each leaf of `params`.

  Otherwise it holds float32 copies of the floating-point leaves, and `params` stays in memory: a
  bfloat16 base model takes 2 + 4 bytes a parameter, and Adam 8 more. `fn` gets the leaves in the
  dtypes of `params`. Integers and booleans are not trained.
  """

  def floats(params: PyTree) -> dict[str, Any]:
    leaves = array_leaves(params)
    return {path: leaves[path] for path in leaves if is_float(leaves[path][1].dtype)}

  def init(key, params, *args, **kwargs):
    del key, args, kwargs
    if _is_wide(params):
      return params
    return nest((keys, _copy(path, leaf)) for path, (keys, leaf) in floats(params).items())

  def trained(params, trainable, cast):
    if _is_wide(params):  # or has no leaves: a train step passes none if trainable is params
      return trainable
    leaves = floats(params)
    check_adapter(trainable, {}, leaves)
    return replace_leaves(params, cast(leaves, adapter_extra(trainable)))

  def apply(params, trainable, *args, lora_key=None, scaling=None, dropout_rate=None, **kwargs):
    del lora_key, scaling, dropout_rate
    return fn(trained(params, trainable, in_dtypes_of), *args, **kwargs)

  def merge(params, trainable):
    return trained(params, trainable, merged_leaves)

  return Adaptation(init, apply, merge)


def _is_wide(params: PyTree) -> bool:
  """Returns whether every leaf is a JAX array of float32 or a wider dtype."""
  return all(
    isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    and is_float(leaf.dtype)
    and leaf.dtype == wide_dtype(leaf.dtype)
    for leaf in jax.tree.leaves(params, is_leaf=is_quantized)
  )


def _copy(path: str, leaf: Any) -> Any:
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf.update(dtype=wide_dtype(leaf.dtype))
  return trained_copy(path, leaf)
