"""The sharding of a leaf, rules for those of a tree, and placing an array by its sharding."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lora_jax.quantization.leaf import is_quantized
from lora_jax.trees import closest_names, leaves_with_path, matches, select

Rules = Sequence[tuple[str, PartitionSpec]]


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


def params_shardings(mesh: Mesh, shapes: PyTree, rules: Rules) -> PyTree:
  """Returns the sharding of every leaf, by the first rule whose pattern matches its path.

  A rule's spec is for the last axes of a leaf: stacked layers have one more before them.

  Args:
    mesh: as `make_mesh` returns it.
    shapes: the parameters, arrays or `ShapeDtypeStruct`s.
    rules: `(pattern, PartitionSpec)`, in order of precedence.
  Raises:
    ValueError: if a pattern matches nothing, a leaf has no rule, or an axis cannot be split.
  """
  leaves = leaves_with_path(shapes)
  select([pattern for pattern, _ in rules], [path for path, _ in leaves], "sharding rule")

  def sharding_of_leaf(path: str, leaf: Any) -> NamedSharding:
    spec = next((spec for pattern, spec in rules if matches(pattern, path)), None)
    if spec is None:
      patterns = ", ".join(closest_names(path, [pattern for pattern, _ in rules]))
      raise ValueError(f"no sharding rule for {path}; did you mean {patterns}?")
    full = (None,) * (len(leaf.shape) - len(spec)) + tuple(spec)
    for size, axis in zip(leaf.shape, full, strict=True):
      if size % (parts := num_parts(mesh, axis)):
        names = axis if isinstance(axis, str) else ", ".join(axis or ())
        raise ValueError(
          f"{path} {leaf.shape}: an axis of {size} cannot be split over {parts} devices "
          f"({names}). Choose another mesh"
        )
    return NamedSharding(mesh, PartitionSpec(*full))

  return jax.tree.unflatten(
    jax.tree.structure(shapes), [sharding_of_leaf(*item) for item in leaves]
  )


def num_parts(mesh: Mesh, names: str | Sequence[str] | None) -> int:
  """Returns the number of parts of an axis that is split over some of the mesh's axes."""
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(mesh.shape[name] for name in names)


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
