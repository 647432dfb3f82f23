"""The sharding of a leaf, and placing an array by it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lora_jax.quantization.leaf import is_quantized


def leaf_sharding(leaf: Any) -> NamedSharding | PartitionSpec | None:
  """Returns the sharding of a leaf, or the leaf if it is a sharding, or None."""
  if isinstance(leaf, NamedSharding | PartitionSpec) or leaf is None:
    return leaf
  if is_quantized(leaf):
    first = leaf_sharding(next(iter(leaf.arrays.values())))
    return None if first is None else leaf.weight_sharding(first)
  if isinstance(leaf, Tracer):
    sharding = jax.typeof(leaf).sharding  # defined on meshes with explicit axes
    return None if sharding.mesh.empty or sharding.mesh.are_all_axes_auto else sharding
  sharding = getattr(leaf, "sharding", None)
  return sharding if isinstance(sharding, NamedSharding) else None


def place(array: Any, sharding: NamedSharding | PartitionSpec | None) -> Any:
  """Places an array, or its shape, by `sharding`, inside or outside `jit`; None leaves it."""
  if sharding is None:
    return array
  if isinstance(array, Tracer):
    mesh = (
      sharding.mesh if isinstance(sharding, NamedSharding) else jax.sharding.get_abstract_mesh()
    )
    if mesh.are_all_axes_explicit:
      return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)
  if isinstance(array, jax.ShapeDtypeStruct):
    return array.update(sharding=sharding)
  is_global = isinstance(array, jax.Array) and not array.is_fully_addressable
  if is_global or not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  return _place_in_all(array, sharding)


def host_copy(array: Any) -> np.ndarray:
  """Returns the whole of an array, of which each of several processes may have a part.

  All processes call it together.
  """
  if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gathered(tree: PyTree) -> PyTree:
  """Returns a tree of whole arrays, as `host_copy`; in a single process the tree itself."""
  return tree if jax.process_count() == 1 else jax.tree.map(host_copy, tree)


def _place_in_all(array: Any, sharding: NamedSharding) -> jax.Array:
  """Places an array that every process has, on the devices of all of them."""
  if jnp.issubdtype(jnp.result_type(array), jax.dtypes.prng_key):
    data = _place_in_all(jax.random.key_data(array), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
  copy = np.asarray(array)
  return jax.make_array_from_callback(copy.shape, sharding, lambda index: copy[index])
