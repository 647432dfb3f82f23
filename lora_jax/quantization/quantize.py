"""Quantizes the weights of a frozen base model."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from lora_jax.quantization.format import Format
from lora_jax.quantization.formats import FORMATS
from lora_jax.quantization.leaf import Quantized, is_quantized
from lora_jax.trees import closest_names, replace_leaves, select, weights_with_path


def quantize(
  params: PyTree, format: str, target: str | Iterable[str] = r".*/kernel", axis: int = -2
) -> PyTree:
  """Returns params with some weights quantized, one compiled call for each.

  >>> import jax.numpy as jnp
  >>> params = {"mlp": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
  >>> quantize(params, "nf4")["mlp"]["kernel"]
  Quantized(nf4, float32 of shape (64, 8))

  Args:
    params: the base model's parameters; leaves that no pattern matches are unchanged.
    format: a name in `FORMATS` with a quantizer, such as `nf4`, `int8`, `Q4_1` or `Q8_0`.
    target: patterns for whole paths.
    axis: the weight's axis that blocks run along, negative: the input axis of a kernel; for
      `int8`, the axis that shares a scale. Use -1 for an embedding whose rows are looked up.
  Raises:
    ValueError: naming the leaf, if a pattern matches nothing, or a matched leaf is quantized
      already, is not a floating-point array, lacks the axis, is not a whole number of blocks along
      it, or has values that are not finite; naming the format, if it is unknown or read-only.
  """
  kind = _kind(format)
  leaves = dict(weights_with_path(params))
  paths = select(target, leaves, "target")
  for path in paths:
    _check(path, leaves[path], kind, axis)
  return replace_leaves(params, {path: _leaf(path, leaves[path], format, axis) for path in paths})


def _kind(format: str) -> Format:
  writable = [name for name, kind in FORMATS.items() if kind.quantize]
  if format not in FORMATS:
    near = closest_names(str(format), writable, 1)[0]
    raise ValueError(
      f"unknown format {format!r}, did you mean {near}? There are {', '.join(writable)}"
    )
  if format not in writable:
    raise ValueError(
      f"weights stored as {format} can be read but not made; format must be one of "
      f"{', '.join(writable)}"
    )
  return FORMATS[format]


def _check(path: str, leaf: Any, kind: Format, axis: int) -> None:
  if is_quantized(leaf):
    raise ValueError(
      f"{path} is quantized already, as {leaf.format}; lora_jax.dequantize gives its values"
    )
  dtype = getattr(leaf, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
      f"{path}: only floating-point arrays are quantized, got {dtype or leaf!r:.100}"
    )
  if not isinstance(axis, int) or not -leaf.ndim <= axis < 0:
    raise ValueError(
      f"{path}: axis must be an axis of the weight, counted from the last one, -1, down to "
      f"{-leaf.ndim}, got {axis!r} for the shape {leaf.shape}"
    )
  size = leaf.shape[axis]
  if not leaf.size or size % (kind.block or 1):
    raise ValueError(
      f"{path}: blocks of {kind.name} have {kind.block or size} values, which must divide the axis "
      f"{axis} of its shape {leaf.shape}, of size {size}. Choose another axis or format, or leave "
      "it out of target"
    )


def _leaf(path: str, leaf: Any, format: str, axis: int) -> Quantized:
  arrays, is_finite = _quantized(jnp.asarray(leaf), format, axis)
  if not isinstance(is_finite, Tracer) and not is_finite:
    raise ValueError(f"{path} has values that are infinite or NaN, which cannot be quantized")
  return Quantized(arrays, format, axis, leaf.dtype)


@functools.partial(jax.jit, static_argnames=("format", "axis"))
def _quantized(weight: jax.Array, format: str, axis: int) -> tuple[dict[str, jax.Array], jax.Array]:
  quantizer = FORMATS[format].quantize
  assert quantizer is not None
  values = jnp.moveaxis(weight, axis, -1).astype(jnp.float32)
  return quantizer(values), jnp.all(jnp.isfinite(values))
