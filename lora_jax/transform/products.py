"""Contractions of arrays with labelled axes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Labels = tuple[int, ...]


def contract(
  x: jax.Array,
  x_labels: Labels,
  y: jax.Array,
  y_labels: Labels,
  keep: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> tuple[jax.Array, Labels]:
  """Contracts two labelled arrays over the shared labels that are not in `keep`.

  Shared labels in `keep` become batch axes. Also returns the result's labels: batch, then the
  rest of x, then the rest of y.
  """
  shared = [label for label in x_labels if label in y_labels]
  summed = [label for label in shared if label not in keep]
  batch = [label for label in shared if label in keep]
  rest = [[l for l in labels if l not in shared] for labels in (x_labels, y_labels)]
  labels = (*batch, *rest[0], *rest[1])
  dimension_numbers = (
    ([x_labels.index(l) for l in summed], [y_labels.index(l) for l in summed]),
    ([x_labels.index(l) for l in batch], [y_labels.index(l) for l in batch]),
  )
  out_sharding = _product_sharding(x, x_labels, y, y_labels, labels)
  out = lax.dot_general(
    x,
    y,
    dimension_numbers,
    precision=precision,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  return out, labels


def _product_sharding(x, x_labels, y, y_labels, labels) -> jax.sharding.NamedSharding | None:
  """Returns the sharding of an explicit mesh: each axis keeps its spec, a summed one has none."""
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.are_all_axes_explicit:
    return None
  specs = dict(zip(y_labels, jax.typeof(y).sharding.spec, strict=True))
  specs.update(zip(x_labels, sharding.spec, strict=True))
  seen: set[Any] = set()
  spec = []
  for label in labels:
    names = specs[label]
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    spec.append(tuple(name for name in names if name not in seen) or None)
    seen.update(names)
  return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


def wide_dtype(dtype: Any) -> Any:
  """Returns float32 for a narrower floating-point dtype, and others unchanged."""
  return dtype if dtype.itemsize > 2 else jnp.float32


def resharded(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns `x` sharded like `like`, on a mesh with explicit axes."""
  sharding = jax.typeof(like).sharding
  if sharding.mesh.are_all_axes_explicit and jax.typeof(x).sharding != sharding:
    return jax.sharding.reshard(x, sharding)
  return x


def aligned(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns `x` with the sharding and dtype of `like`."""
  return resharded(x, like).astype(like.dtype)


def spread(array: jax.Array, labels: Labels, out_labels: Labels, shape: Sequence[int]) -> jax.Array:
  """Puts axes in the order of `out_labels`; a missing dimension is broadcast."""
  present = tuple(label for label in out_labels if label in labels)
  order = tuple(labels.index(label) for label in present)
  if order != tuple(range(array.ndim)):
    array = lax.transpose(array, order)
  if len(present) == len(out_labels):
    return array
  full = [array.shape[present.index(l)] if l in present else shape[l] for l in out_labels]
  return lax.broadcast_in_dim(array, full, [out_labels.index(label) for label in present])


def plus(base_out: jax.Array, low_rank: jax.Array) -> jax.Array:
  """Adds the low-rank part to the base model's output, in the output's dtype."""
  return base_out + aligned(low_rank, base_out)
