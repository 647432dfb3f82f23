"""Fully trained leaves: float32 copies, which the function sees in the base model's dtype.

In bfloat16, with 8 bits of precision, a step of less than 1/256 of a value changes nothing. Trained
leaves are therefore float32, 4 bytes a parameter, as are their gradients and optimizer state.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.quantization.leaf import is_quantized


def is_float(dtype: Any) -> bool:
  """Returns whether a dtype is floating-point or complex, and can be trained."""
  return jnp.issubdtype(dtype, jnp.inexact)


def wide_dtype(dtype: Any) -> Any:
  """Returns float32 for a narrower floating-point dtype; a wider one as JAX has it."""
  dtype = jax.dtypes.canonicalize_dtype(dtype)
  return jnp.dtype("float32") if dtype.itemsize < 4 else dtype


def trained_copy(name: str, leaf: Any) -> jax.Array:
  """Returns a copy of a leaf to train, float32 or wider.

  Raises:
    ValueError: if the leaf is a shape only, or not of floating-point numbers.
  """
  if is_quantized(leaf):
    raise ValueError(
      f"{name} is quantized ({leaf.format}) and cannot be fully trained. Adapt it by a low-rank "
      "method, or dequantize it: lora_jax.dequantize(params), or load the model with "
      "param_dtype='float32'"
    )
  if not is_float(leaf.dtype):
    raise ValueError(
      f"{name} is {leaf.dtype} of shape {leaf.shape}, which has no gradient; expected floating-"
      "point numbers. Narrow the pattern"
    )
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError(f"{name} is copied by init and needs a real array, got {leaf}")
  return jnp.array(leaf, wide_dtype(leaf.dtype), copy=True)


def in_dtypes_of(
  leaves: Mapping[str, tuple[tuple[str, ...], Any]], trained: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Returns trained leaves in the base model's dtypes, as the function computes with them.

  A float8 leaf is rounded to float8 and returned as bfloat16, since JAX computes a leaf's gradient
  in the leaf's dtype, and most gradients are zero in float8.

  Args:
    leaves: path to `(keys, leaf)` of the base model's leaves.
    trained: path to trained leaf.
  """
  return {path: _visible(leaf, leaves[path][1].dtype) for path, leaf in trained.items()}


def merged_leaves(
  leaves: Mapping[str, tuple[tuple[str, ...], Any]], trained: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Returns trained leaves rounded to the base model's dtypes; arguments as `in_dtypes_of`."""
  return {path: _cast(leaf, leaves[path][1].dtype) for path, leaf in trained.items()}


def _visible(leaf: jax.Array, dtype: Any) -> jax.Array:
  if jnp.dtype(dtype).itemsize > 1:
    return _cast(leaf, dtype)
  rounded = leaf.astype(dtype).astype(leaf.dtype)
  return (leaf + lax.stop_gradient(rounded - leaf)).astype(jnp.bfloat16)


def _cast(leaf: jax.Array, dtype: Any) -> jax.Array:
  dtype = jax.dtypes.canonicalize_dtype(dtype)
  return leaf if leaf.dtype == dtype else leaf.astype(dtype)
