"""The trainable tree: an adapted weight's node, its checks, and its form on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.axes import LoraAxes
from lora_jax.transform.factored import RANK, Factor
from lora_jax.trees import leaves_with_path


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["lora_a", "lora_b"],
  meta_fields=["axes", "layers"],
)
@dataclass(frozen=True)
class LoraWeight:
  """The trained factors of one weight; stands where the weight stands in `params`.

  Attributes:
    lora_a: (batch..., in..., rank), float32.
    lora_b: (batch..., rank, out...), float32.
    axes: which axes of the weight these are; static.
    layers: of a stacked weight, the layers that are adapted, None for all; static.
  """

  lora_a: Any
  lora_b: Any
  axes: LoraAxes
  layers: tuple[int, ...] | None = None

  @property
  def rank(self) -> int:
    return self.lora_a.shape[-1]


def is_lora_weight(node: Any) -> bool:
  return isinstance(node, LoraWeight)


def adapter_weights(trainable: PyTree) -> dict[str, LoraWeight]:
  """Returns the adapted weights of a trainable tree by path."""
  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  return {path: node for path, node in nodes if is_lora_weight(node)}


def adapter_extra(trainable: PyTree) -> dict[str, Any]:
  """Returns the leaves of a trainable tree that are trained whole, by path."""
  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  return {path: node for path, node in nodes if not is_lora_weight(node)}


def copied(name: str, leaf: Any) -> jax.Array:
  """Returns a copy of a leaf that is trained whole, which has to be an array."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError(f"{name} is copied by init and needs a real array, got {leaf}")
  return jnp.copy(leaf)


def stored_shape(shape: Sequence[int], axes: LoraAxes, layers: Sequence[int] | None):
  """Returns the weight's shape with the layer axis cut to the adapted layers."""
  shape = list(shape)
  if layers is not None:
    shape[axes.batch[0]] = len(layers)
  return tuple(shape)


def weight_factors(weight: LoraWeight, shape: Sequence[int]) -> tuple[Factor, Factor]:
  """Returns A and B with labelled axes, for a weight of `shape`.

  Layers of a stack that are not adapted get zeros: the small factors are padded, the stack
  itself is left as it is.
  """
  a, b = weight.lora_a, weight.lora_b
  axes = weight.axes
  if weight.layers is not None:
    a, b = (_among_zeros(x, weight.layers, shape[axes.batch[0]]) for x in (a, b))
  return (
    Factor(a, (*axes.batch, *axes.inputs, RANK)),
    Factor(b, (*axes.batch, RANK, *axes.outputs)),
  )


def _among_zeros(x: Any, layers: Sequence[int], count: int) -> jax.Array:
  """Returns `count` layers: those of x in the places `layers`, zeros elsewhere."""
  zero = jnp.zeros_like(x[:1])  # of x's sharding
  place = {layer: i for i, layer in enumerate(layers)}
  pieces = [x[place[i] : place[i] + 1] if i in place else zero for i in range(count)]
  return jnp.concatenate(pieces)


# ---- on disk: plain arrays, and the axes as JSON beside them ---------------------------
