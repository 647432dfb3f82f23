"""Where adapters lie: A as its weight's inputs, B as its outputs, rank replicated."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lora_jax.adapters.delta import LoraWeight, is_lora_weight
from lora_jax.axes import LoraAxes
from lora_jax.placement import leaf_sharding
from lora_jax.trees import leaves_with_path


def shardings(trainable: PyTree, params: PyTree) -> PyTree:
  """Returns the shardings of a trainable tree that follow from those of its params.

  For `jax.jit(..., out_shardings=...)`, `lora_jax.freeze(..., shardings=...)` and restoring
  checkpoints. XLA's own choice would often replicate gradients and optimizer state.

  Args:
    trainable: as `init` returns it, of arrays or `ShapeDtypeStruct`s.
    params: a tree of arrays, of `NamedSharding`s, or of `PartitionSpec`s (then the result is
      `PartitionSpec`s). Leaves with neither leave their factors' places None.
  Raises:
    ValueError: if `trainable` has a leaf that `params` has not.
  """
  given = dict(leaves_with_path(params))

  def of(path: str, node: Any) -> Any:
    if path not in given:
      raise ValueError(f"params have no leaf {path!r}, which the trainable tree adapts")
    sharding = leaf_sharding(given[path])
    if not is_lora_weight(node):
      return sharding
    a, b = factor_shardings(sharding, node.axes, node.layers)
    return LoraWeight(a, b, node.axes, node.layers)

  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  structure = jax.tree.structure(trainable, is_leaf=is_lora_weight)
  return jax.tree.unflatten(structure, [of(path, node) for path, node in nodes])


def factor_shardings(
  sharding: NamedSharding | PartitionSpec | None, axes: LoraAxes, layers: Sequence[int] | None
) -> tuple[Any, Any]:
  """Returns the shardings of `lora_a` and `lora_b` for a weight's."""
  if sharding is None:
    return None, None
  spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
  names = [*spec, *(None for _ in range(sum(map(len, axes))))]
  if layers is not None:  # some layers of a stack: their number need not divide the mesh
    names[axes.batch[0]] = None
  batch, inputs, outputs = ([names[d] for d in dims] for dims in axes)
  specs = PartitionSpec(*batch, *inputs, None), PartitionSpec(*batch, None, *outputs)
  if isinstance(sharding, NamedSharding):
    return sharding.update(spec=specs[0]), sharding.update(spec=specs[1])
  return specs
