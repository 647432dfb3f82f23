"""Shardings of adapters: each axis is sharded as the weight's axis, inner axes are replicated."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lora_jax.adapters.delta import is_lora_weight, is_shared
from lora_jax.adapters.parts import has_parts, is_added
from lora_jax.axes import LoraAxes
from lora_jax.placement import leaf_sharding
from lora_jax.trees import leaves_with_path, weights_with_path


def shardings(trainable: PyTree, params: PyTree) -> PyTree:
  """Returns the shardings of a trainable tree that follow from those of its params.

  For `jax.jit(..., out_shardings=...)`, `lora_jax.freeze(..., shardings=...)` and restoring
  checkpoints. XLA's own choice would often replicate gradients and optimizer state. Arrays that all
  adapted weights share are replicated, and so are those that stand for no leaf of `params`.

  Args:
    trainable: as `init` returns it, of arrays or `ShapeDtypeStruct`s.
    params: a tree of arrays, of `NamedSharding`s, or of `PartitionSpec`s (then the result is
      `PartitionSpec`s). A leaf with neither gives None for each of its arrays.
  Raises:
    ValueError: if `trainable` has a leaf that `params` lacks.
  """
  if has_parts(trainable):
    return {name: shardings(part, params) for name, part in trainable.items()}
  leaves = dict(weights_with_path(params))
  known = (leaf_sharding(leaf) for leaf in leaves.values())
  of_shared = replicated(next((sharding for sharding in known if sharding is not None), None))

  def node_shardings(path: str, node: Any) -> Any:
    if is_lora_weight(node) and is_shared(path):
      return node.replace(**dict.fromkeys(node.arrays, of_shared))
    if is_added(path):
      return of_shared
    if path not in leaves:
      raise ValueError(f"params have no leaf {path!r}, which the trainable tree adapts")
    sharding = leaf_sharding(leaves[path])
    if not is_lora_weight(node):
      return sharding
    arrays = {
      spec.name: array_sharding(sharding, spec.words, node.axes, node.layers) for spec in node.table
    }
    return node.replace(**arrays)

  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  structure = jax.tree.structure(trainable, is_leaf=is_lora_weight)
  return jax.tree.unflatten(structure, [node_shardings(path, node) for path, node in nodes])


def replicated(
  sharding: NamedSharding | PartitionSpec | None,
) -> NamedSharding | PartitionSpec | None:
  """Returns a replicated sharding over the mesh of another one."""
  if isinstance(sharding, NamedSharding):
    return sharding.update(spec=PartitionSpec())
  return sharding if sharding is None else PartitionSpec()


def array_sharding(
  sharding: NamedSharding | PartitionSpec | None,
  words: str,
  axes: LoraAxes,
  layers: Sequence[int] | None,
) -> NamedSharding | PartitionSpec | None:
  """Returns the sharding of one of an adapter's arrays: that of the weight's axes, if it has them.

  Args:
    sharding: of the weight.
    words: the array's axes, in the words of `LoraAxes`.
    axes: of the weight.
    layers: the adapted layers of a stacked weight; None is all.
  """
  if sharding is None:
    return None
  spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
  names = [*spec, *(None for _ in range(sum(map(len, axes))))]
  if layers is not None:  # some layers of a stack: their number need not divide the mesh
    names[axes.batch[0]] = None
  array_spec = PartitionSpec(*(None if l < 0 else names[l] for l in axes.labels(words)))
  return sharding.update(spec=array_spec) if isinstance(sharding, NamedSharding) else array_spec
