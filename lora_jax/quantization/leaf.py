"""The quantized leaf of a parameter tree.

    params["layers_0"]["mlp"]["up"]["kernel"] = Quantized(Q4_1, float32 of shape (576, 1536))
      arrays["d"]   float16 (1536, 18)        the scale of each block of 32 values
      arrays["m"]   float16 (1536, 18)        its minimum
      arrays["qs"]  uint8 (1536, 18, 16)      two codes of 4 bits each

The blocks run along one axis of the weight, `axis`, which is the last one as stored: the input axis
of a kernel, as in llama.cpp's files, whose weights are (out, in). A stack of layers has its axis
first in the weight and in every array, so that `scan` slices it.

An adapted function sees a floating-point array in its place. The engine dequantizes the leaf where
it is used, in the forward pass and again in the backward pass, and keeps no dequantized weight.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

from lora_jax.quantization.format import Format
from lora_jax.quantization.formats import FORMATS


@jax.tree_util.register_pytree_with_keys_class
class Quantized:
  """A weight as codes and scales: the arrays of a format.

  Attributes:
    arrays: the arrays of the format, by name.
    format: a name in `FORMATS`; static.
    axis: the weight's axis that the blocks run along, negative; static.
    dtype: the dtype of the dequantized weight; static.
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
    return math.prod(self.stored_shape)

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
    """Returns the weight as an array of `dtype`, sharded as its arrays."""

    def values(arrays: Mapping[str, Any]) -> jax.Array:
      return jnp.moveaxis(self.kind.dequantize(arrays), -1, self.axis).astype(self.dtype)

    sharding = self.explicit_sharding
    if sharding is None:
      return values(self.arrays)
    on_auto_axes: Any = jax.sharding.auto_axes(values, out_sharding=sharding)
    return on_auto_axes(self.arrays)

  @property
  def explicit_sharding(self) -> Any:
    """The weight's sharding, if it is on a mesh with explicit axes."""
    first: Any = jax.typeof(next(iter(self.arrays.values()))).sharding
    return self.weight_sharding(first) if first.mesh.explicit_axes else None

  def rows(self, take: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns rows of a weight whose blocks run along its last axis, float32.

    Args:
      take: takes rows of an array by its leading axes, which are the weight's; it keeps all later
        axes.
    """
    kind, arrays = self.kind, self.arrays
    arrays = arrays if kind.by_row is None else kind.by_row(arrays)
    dequantize = kind.dequantize_rows or kind.dequantize
    return dequantize({name: take(array) for name, array in arrays.items()})

  def weight_sharding(self, first: NamedSharding | PartitionSpec) -> NamedSharding | PartitionSpec:
    """Returns the sharding of the weight, given that of its first array."""
    spec = first.spec if isinstance(first, NamedSharding) else first
    array = next(iter(self.arrays.values()))
    ndim = self.ndim if hasattr(array, "shape") else len(spec)  # a leaf of shardings
    *rest, last = (*spec, *(None for _ in range(ndim)))[:ndim]
    place = ndim + self.axis
    spec = PartitionSpec(*rest[:place], last, *rest[place:])
    return first.update(spec=spec) if isinstance(first, NamedSharding) else spec

  def shardings(
    self, sharding: NamedSharding | PartitionSpec | SingleDeviceSharding
  ) -> "Quantized":
    """Returns the shardings of its arrays, given that of the weight.

    Axes within a block are replicated, as is an axis that the mesh does not divide.

    Raises:
      ValueError: if the sharding has no axes by name and is not of a single device.
    """
    if isinstance(sharding, SingleDeviceSharding):
      return jax.tree.map(lambda _: sharding, self)
    if not isinstance(sharding, NamedSharding | PartitionSpec):
      raise ValueError(
        f"a weight in {self.format} has several arrays, which {type(sharding).__name__} does not "
        "say how to shard. Give NamedSharding(mesh, PartitionSpec(...)), by the weight's axes"
      )
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    spec = (*spec, *(None for _ in range(self.ndim)))[: self.ndim]
    place = self.ndim + self.axis
    stored = (*spec[:place], *spec[place + 1 :], spec[place])

    def of_array(array: Any) -> Any:
      named = stored[: array.ndim]
      if isinstance(sharding, NamedSharding):
        sizes = [_num_shards(sharding.mesh, names) for names in named]
        named = [
          names if array.shape[axis] % size == 0 else None
          for axis, (names, size) in enumerate(zip(named, sizes, strict=True))
        ]
        return sharding.update(spec=PartitionSpec(*named))
      return PartitionSpec(*named)

    return jax.tree.map(of_array, self)


def _num_shards(mesh: Any, names: Any) -> int:
  names = () if names is None else (names,) if isinstance(names, str) else names
  return math.prod(mesh.shape[name] for name in names)


def is_quantized(leaf: Any) -> bool:
  return isinstance(leaf, Quantized)


def dequantize(params: PyTree) -> PyTree:
  """Returns a tree with each quantized leaf as a floating-point array of its dtype."""
  return jax.tree.map(
    lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
  )
