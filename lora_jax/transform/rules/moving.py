"""Structural rules: the weight's elements are moved or sliced; their values stay."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.transform.deferred import Base
from lora_jax.transform.errors import Unsupported
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor, factor_spec
from lora_jax.transform.products import Labels


def transpose(call, w, *, permutation, **_):
  return w.move(call(w.base), {old: (moved,) for moved, old in enumerate(permutation)})


def broadcast_in_dim(call, w, *dynamic_shape, shape, broadcast_dimensions, **_):
  pairs = zip(w.shape, map(int, broadcast_dimensions), strict=True)  # vmap gives NumPy's
  where = {d: (moved,) if size == shape[moved] else () for d, (size, moved) in enumerate(pairs)}
  return w.move(call(w.base, *dynamic_shape), where)


def squeeze(call, w, *, dimensions, **_):
  rest = [d for d in range(w.ndim) if d not in dimensions]
  where = {d: (rest.index(d),) if d in rest else () for d in range(w.ndim)}
  return w.move(call(w.base), where)


def reshape(call, w, *dynamic_shape, new_sizes, dimensions=None, **_):
  """Splits and merges dimensions, as long as each group of them belongs to one factor."""
  if dimensions is not None:
    raise Unsupported("reshape with a permutation of dimensions")
  if 0 in w.shape:
    raise Unsupported("reshape of an empty array")
  groups = reshape_groups(w.shape, new_sizes)

  def reshaped(factor: Factor) -> Factor:
    sizes, labels, order = [], [], []
    for old, moved in groups:
      carried = [d for d in old if d in factor.dims]
      wide = [d for d in old if w.shape[d] > 1]
      order += carried
      if not carried or (wide and not set(wide) & set(carried)):
        continue  # constant along this group, or only axes of size 1 in it
      if not set(wide) <= set(carried) and not w.probing:
        raise Unsupported(f"reshape from {w.shape} to {new_sizes} merges both factors' axes")
      sizes += [new_sizes[n] for n in moved]
      labels += moved
    inner = factor.inner
    labels = (*labels, *inner)
    if w.probing:  # labels matter here, values do not
      return Factor(jnp.zeros((*sizes, *(1 for _ in inner)), factor.array.dtype), labels)
    array = lax.transpose(factor.array, [factor.axis(d) for d in (*order, *inner)])
    return Factor(lax.reshape(array, (*sizes, *array.shape[len(order) :])), labels)

  lookup = sorted(n for old, moved in groups if set(old) & set(w.lookup) for n in moved)
  return replace(w.map_factors(reshaped), base=call(w.base, *dynamic_shape), lookup=tuple(lookup))


def reshape_groups(old: Sequence[int], moved: Sequence[int]) -> list[tuple[Labels, Labels]]:
  """Pairs the dimensions of two shapes into the smallest groups of equal size.

  >>> reshape_groups((6, 5, 4), (2, 3, 20))
  [((0,), (0, 1)), ((1, 2), (2,))]
  """
  groups: list[tuple[Labels, Labels]] = []
  i = j = 0
  while i < len(old) or j < len(moved):
    start_i, start_j = i, j
    i, j = min(i + 1, len(old)), min(j + 1, len(moved))
    while math.prod(old[start_i:i]) != math.prod(moved[start_j:j]):
      if math.prod(old[start_i:i]) < math.prod(moved[start_j:j]):
        i += 1
      else:
        j += 1
    groups.append((tuple(range(start_i, i)), tuple(range(start_j, j))))
  return groups


def unchanged(call, w, *rest, **_):
  """An operation that changes neither shape nor factors, such as a copy."""
  return w.rebase(call(w.base, *rest))


def convert_element_type(call, w, *, new_dtype, **_):
  if not jnp.issubdtype(new_dtype, jnp.floating):
    raise Unsupported(f"a cast to {np.dtype(new_dtype).name}")
  return w.rebase(call(w.base))


def each_array(call, w, **_):
  """An operation that is the same for arrays of every shape."""
  return w.rebase(call(w.base)).map_factors(lambda f: Factor(call(f.array), f.labels))


def optimization_barrier(call, *operands, **_):
  bases = call(*(w.base if isinstance(w, Factored) else w for w in operands))
  pairs = zip(operands, bases, strict=True)
  return [w.rebase(base) if isinstance(w, Factored) else base for w, base in pairs]


def sharding_constraint(call, w, *, sharding, **_):
  """Constrains the factors like the base: each axis like its dimension, rank replicated."""
  return _sharded(w, call(w.base), sharding, lax.with_sharding_constraint)


def reshard(call, w, *, dst_sharding, **_):
  """The same on a mesh with explicit axes."""
  return _sharded(w, call(w.base), dst_sharding, jax.sharding.reshard)


def _sharded(w: Factored, base, sharding, put: Callable[[Any, Any], Any]) -> Factored:
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return w.rebase(base)

  def moved(factor: Factor) -> Factor:
    spec = factor_spec(factor.labels, sharding.spec)
    return Factor(put(factor.array, sharding.update(spec=spec)), factor.labels)

  return w.rebase(base).map_factors(moved)


def all_gather(call, w, *, all_gather_dimension, axis_name, axis_index_groups, tiled, **_):
  """Gathers a weight from its shards, as fully sharded layers do inside `shard_map`."""
  if not tiled or axis_index_groups is not None:
    raise Unsupported("all_gather into a new axis, or in groups")

  def gathered(array, axis, dim):
    if dim != all_gather_dimension:
      return array
    return lax.all_gather(array, axis_name, axis=axis, tiled=True)

  return along_dims(w, call(w.base), gathered)


def along_dims(w: Factored, base: Base, on_axis: Callable[[jax.Array, int, int], jax.Array]):
  """Applies `on_axis(array, axis, dim)` to every axis of every factor."""

  def cut(factor: Factor) -> jax.Array:
    array = factor.array
    for axis, dim in enumerate(factor.labels):
      array = array if dim < 0 else on_axis(array, axis, dim)
    return array

  return w.move(base, {d: (d,) for d in range(w.ndim)}, cut)


def slice_(call, w, *, start_indices, limit_indices, strides, **_):
  strides = strides or [1] * w.ndim

  def cut(array, axis, dim):
    return lax.slice_in_dim(array, start_indices[dim], limit_indices[dim], strides[dim], axis)

  return along_dims(w, call(w.base), cut)


def dynamic_slice(call, w, *starts, slice_sizes, **_):
  def cut(array, axis, dim):
    if slice_sizes[dim] == w.shape[dim]:
      return array
    size = slice_sizes[dim]
    return lax.dynamic_slice_in_dim(array, starts[dim], size, axis, allow_negative_indices=False)

  return along_dims(w, call(w.base, *starts), cut)


def rev(call, w, *, dimensions, **_):
  def flip(array, axis, dim):
    return lax.rev(array, (axis,)) if dim in dimensions else array

  return along_dims(w, call(w.base), flip)
