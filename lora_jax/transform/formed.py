"""A weight plus an update without low-rank factors, which is computed where the weight is used.

    base + scaling * update(base, *factors)        HiRA: update = base * (A B)

It takes the place of the base in a `Factored`, as a leaf of a `Deferred`: the operation that uses
the weight computes the update in both passes, from the small factors, and neither pass keeps it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.factors import ArrayLike, Factor, factor_spec, next_slice, stacked_arrays
from lora_jax.transform.products import Labels, aligned, wide_dtype

Update = Callable[..., Factor]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["base", "factors", "scaling"],
  meta_fields=["update", "dims"],
)
@dataclasses.dataclass(frozen=True)
class Formed:
  """A base weight and its update.

  Attributes:
    base: an array, or a quantized weight.
    factors: the small arrays that the update is computed from.
    scaling: alpha / rank.
    update: `update(w, *factors) -> Factor`, with w the base in float32 or wider; a function of a
      module, since it is static.
    dims: the dimensions along which a slice of the update is the update of slices.
  """

  base: Any
  factors: tuple[Factor, ...]
  scaling: ArrayLike
  update: Update
  dims: Labels

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  @property
  def explicit_sharding(self) -> Any:
    """The weight's sharding, if it is on a mesh with explicit axes."""
    if is_quantized(self.base):
      return self.base.explicit_sharding
    sharding = jax.typeof(self.base).sharding
    return sharding if sharding.mesh.explicit_axes else None

  def base_array(self) -> jax.Array:
    return self.base.dequantize() if is_quantized(self.base) else self.base

  def update_array(self, dtype: Any) -> jax.Array:
    """Returns `scaling * update`, computed in float32 or wider."""
    base = self.base_array()
    base, dims = base.astype(wide_dtype(base.dtype)), tuple(range(self.ndim))
    update = self.update(Factor(base, dims, frozen=True), *self.factors).along(dims)
    update = jnp.asarray(self.scaling).astype(base.dtype) * update.astype(base.dtype)
    return aligned(jnp.broadcast_to(update, self.shape), base).astype(dtype)

  def dequantize(self) -> jax.Array:
    """Returns the sum, rounded once to the base's dtype."""
    base = self.base_array()
    wide = wide_dtype(base.dtype)
    return (base.astype(wide) + self.update_array(wide)).astype(base.dtype)

  def map(self, on_base: Callable[[Any], Any], on_factor: Callable[[Factor], Factor]) -> "Formed":
    factors = tuple(map(on_factor, self.factors))
    return dataclasses.replace(self, base=on_base(self.base), factors=factors)

  def unstacked(self) -> tuple[Any, Callable[[Any], "Formed"]]:
    """Returns the arrays that `scan` slices, and a function from a slice to the layer's weight."""

    def of_slice(slice_: Any) -> "Formed":
      base, slices = slice_
      arrays: Iterator[Any] = iter(slices)
      layer = self.map(lambda _: base, lambda factor: next_slice(factor, arrays))
      return dataclasses.replace(layer, dims=tuple(d - 1 for d in self.dims if d > 0))

    return (self.base, stacked_arrays(self.factors)), of_slice

  def shardings(self, spec: Any) -> "Formed":
    """Returns the specs of its arrays, given that of the weight, for `shard_map`."""

    def of_factor(factor: Factor) -> Factor:
      return dataclasses.replace(factor, array=factor_spec(factor.labels, spec))

    specs = self.map(lambda w: w.shardings(spec) if is_quantized(w) else spec, of_factor)
    return dataclasses.replace(specs, scaling=PartitionSpec())


def is_formed(leaf: Any) -> bool:
  return isinstance(leaf, Formed)


def is_sliceable(leaf: Any, dim: int) -> bool:
  """Whether slices of a leaf's arrays along a dimension are the arrays of the weight's slice."""
  if is_formed(leaf):
    return dim in leaf.dims and (not is_quantized(leaf.base) or is_sliceable(leaf.base, dim))
  return dim < min(leaf.ndim - 2, leaf.ndim + leaf.axis)
