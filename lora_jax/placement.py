"""The sharding of a leaf, and placing an array by it."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

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
  return jax.device_put(array, sharding)
