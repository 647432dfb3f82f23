"""The quantized leaf of a parameter tree.

    params["layers_0"]["mlp"]["up"]["kernel"] = Quantized(Q4_1, float32 of shape (576, 1536))
      arrays["d"]   float16 (1536, 18)        the scale of each block of 32 values
      arrays["m"]   float16 (1536, 18)        its minimum
      arrays["qs"]  uint8 (1536, 18, 16)      two codes of 4 bits each

The blocks run along one axis of the weight, `axis`, which is the last one as stored: the input axis
of a kernel, as in llama.cpp's files, whose weights are (out, in). A stack of layers has its axis
first in the weight and in every array, so that `scan` slices it.

A function that is adapted gets a floating-point array in its place. The engine dequantizes the
leaf where it is used, in the forward and again in the backward pass, and keeps no dequantized
weight.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.quantization.format import Format
from lora_jax.quantization.formats import FORMATS


@jax.tree_util.register_pytree_with_keys_class
class Quantized:
  """A weight as codes and scales: the arrays of a format.

  Attributes:
    arrays: by name.
    format: a name in `FORMATS`; static.
    axis: the weight's axis that the blocks run along, negative; static.
    dtype: of the dequantized weight; static.
  """

  arrays: dict[str, Any]
  format: str
  axis: int
  dtype: Any

  def __init__(
    self, arrays: Mapping[str, Any], format: str, axis: int = -2, dtype: Any = "float32"
  ):
    if format not in FORMATS:
      raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    if axis >= 0:
      raise ValueError(f"axis must be negative, counted from the last one, got {axis}")
    if set(arrays) != set(FORMATS[format].parts):
      names = ", ".join(FORMATS[format].parts)
      raise ValueError(f"{format} has the arrays {names}, got {', '.join(arrays)}")
    self.arrays = {name: arrays[name] for name in FORMATS[format].parts}
    self.format, self.axis, self.dtype = format, axis, jnp.dtype(dtype)

  @property
  def kind(self) -> Format:
    return FORMATS[self.format]

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """The weight's shape with the axis of the blocks last."""
    return self.kind.weight_shape(next(iter(self.arrays.values())).shape)

  @property
  def shape(self) -> tuple[int, ...]:
    *rest, size = self.stored_shape
    place = len(rest) + 1 + self.axis
    return (*rest[:place], size, *rest[place:])

  @property
  def ndim(self) -> int:
    return len(self.stored_shape)

  @property
  def size(self) -> int:
    """The number of weights."""
    count = 1
    for size in self.stored_shape:
      count *= size
    return count

  @property
  def nbytes(self) -> int:
    """The bytes of the codes and scales."""
    return sum(array.size * array.dtype.itemsize for array in self.arrays.values())

  def __repr__(self) -> str:
    return f"Quantized({self.format}, {self.dtype.name} of shape {self.shape})"

  def tree_flatten_with_keys(self):
    keys = [jax.tree_util.GetAttrKey(name) for name in self.arrays]
    return list(zip(keys, self.arrays.values(), strict=True)), self._static

  def tree_flatten(self):
    return list(self.arrays.values()), self._static

  @property
  def _static(self) -> Any:
    return tuple(self.arrays), self.format, self.axis, self.dtype

  @classmethod
  def tree_unflatten(cls, static, arrays):
    names, format_, axis, dtype = static
    leaf = cls.__new__(cls)
    leaf.arrays = dict(zip(names, arrays, strict=True))
    leaf.format, leaf.axis, leaf.dtype = format_, axis, dtype
    return leaf

  def dequantize(self) -> jax.Array:
    """Returns the weight as an array of `dtype`."""
    values = self.kind.dequantize(self.arrays)
    return jnp.moveaxis(values, -1, self.axis).astype(self.dtype)


def is_quantized(leaf: Any) -> bool:
  return isinstance(leaf, Quantized)


def dequantize(params: PyTree) -> PyTree:
  """Returns a tree with each quantized leaf as a floating-point array of its dtype."""
  return jax.tree.map(
    lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
  )
