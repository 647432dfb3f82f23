"""The initial arrays of adapted weights, as their variants give them, checked and placed."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adapters.copies import is_float
from lora_jax.adapters.delta import (
  LoraWeight,
  Site,
  Table,
  largest_site,
  shared_path,
)
from lora_jax.adapters.shardings import array_sharding, replicated
from lora_jax.adapters.targets import Target, variant_of
from lora_jax.axes import INNER
from lora_jax.placement import leaf_sharding, place
from lora_jax.transform.tracing import is_array


def start_weight(key: PRNGKeyArray, target: Target, site: Site) -> LoraWeight:
  """Returns the initial arrays of one weight, float32, sharded as the weight."""
  variant, sharding = variant_of(target), leaf_sharding(target.leaf)
  arrays = _checked_arrays(variant.start(key, site), variant.table, site, variant.sizes(site))
  for spec in variant.table:
    where = array_sharding(sharding, spec.words, site.axes, site.layers)
    arrays[spec.name] = place(arrays[spec.name], where)
  node = LoraWeight.from_arrays(arrays, variant.table, site.axes, site.layers)
  return node.for_weight(site.leaf.shape)


def start_shared(
  key: PRNGKeyArray, targets: Mapping[str, Target], sites: Mapping[str, Site]
) -> list[tuple[tuple[str, ...], LoraWeight]]:
  """Returns the initial shared arrays of each variant that has some, replicated, with their keys.

  Raises:
    ValueError: if two variants with shared arrays have one name, and hence one place in the tree.
  """
  nodes, variants = [], {}
  for target in targets.values():
    variant = variant_of(target)
    if variant.shared is not None and variants.setdefault(variant.name, variant) != variant:
      raise ValueError(
        f"{target.path}: two variants with shared arrays have the name {variant.name!r}. Give "
        "these weights one variant"
      )
  for variant in variants.values():
    used_by = [site for path, site in sites.items() if variant_of(targets[path]) == variant]
    path, site = shared_path(variant.name), largest_site(used_by)
    start = variant.shared.start(fold_path(key, path), used_by)
    arrays = _checked_arrays(start, variant.shared_table, dataclasses.replace(site, path=path))
    sharding = replicated(leaf_sharding(used_by[0].leaf))
    placed = {name: place(array, sharding) for name, array in arrays.items()}
    node = LoraWeight.from_arrays(placed, variant.shared_table, site.axes, None)
    nodes.append((tuple(path.split("/")), node))
  return nodes


def _checked_arrays(
  arrays: Any, table: Table, site: Site, sizes: Mapping[str, int] | None = None
) -> dict[str, jax.Array]:
  """Returns the arrays that a `start` gave, float32, each in memory of its own.

  Args:
    arrays: by name.
    table: of the expected ones.
    site: of which they are the arrays.
    sizes: of further inner axes; None accepts any.
  Raises:
    ValueError: if they are not the expected ones, or one is not a float array of its shape.
  """
  if not isinstance(arrays, Mapping) or set(arrays) != {spec.name for spec in table}:
    got = ", ".join(sorted(arrays)) if isinstance(arrays, Mapping) else repr(arrays)
    raise ValueError(f"{site.path}: start of {table} gave {got:.100}, expected its arrays")
  checked, seen = {}, {id(site.leaf)}
  for spec in table:
    array, labels = arrays[spec.name], site.axes.labels(spec.words)
    if not is_array(array) or not is_float(array.dtype):
      raise ValueError(
        f"{site.path}: init gave {spec.name} {array!r:.100}, expected a floating-point array"
      )
    inner = sizes
    if inner is None:
      inner = {
        w: array.shape[labels.index(l)] for w, l in INNER.items() if l in labels[: array.ndim]
      }
    shape = site.array_shape(spec.words, **inner)
    if array.shape != shape:
      raise ValueError(f"{site.path}: init gave {spec.name} {array.shape}, expected {shape}")
    if id(array) in seen:
      array = jnp.copy(array)  # a step donates the trained arrays: no two may share a buffer
    seen.add(id(array))
    checked[spec.name] = array.astype(jnp.float32)
  return checked


def fold_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
  """Returns a key that depends on the path, and not on which other weights are adapted."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))
