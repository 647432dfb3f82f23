"""Terms that add zero, and whose gradients are statistics of the inputs of a layer.

A tap is a term A B like LoRA's, so that every rule moves it with its weight. A has the weight's
inputs, B, (1, outputs), its outputs. Instead of x A, its branch is zero; and in the backward pass
the gradient of the branch is replaced by a function of x A. The gradient of A is then

    A = [I, 0]:  sum over tokens of x [x, 1]^T
    A = 1 / n:   the number of tokens                 `Tap(counts=True)`, of an input of ones

in the axes of the original weight, however it is sliced, stacked or scanned on its way, and summed
over its uses. Only tokens whose output has a gradient count: not padding. B is of random numbers,
so that the gradient of the branch is zero only for a token whose output has none.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform.errors import Unsupported
from lora_jax.transform.factors import Term


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["factors", "scaling", "dropout_rate", "key"],
  meta_fields=["probe", "num_inputs", "counts"],
)
@dataclasses.dataclass(frozen=True)
class Tap(Term):
  """A term that adds zero.

  Attributes:
    num_inputs: of the weight.
    counts: whether it counts tokens.
  """

  num_inputs: int = 0
  counts: bool = False

  @property
  def _width(self) -> int:
    return 1 if self.counts else self.num_inputs + 1

  def drop(self, x: jax.Array) -> jax.Array:
    """Returns the input of the branch, in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.ones_like(x) if self.counts else x

  def between(self, z: jax.Array, rank_axis: int) -> jax.Array:
    """Returns a branch of zeros; `z` is the input of the layer in the original axes."""
    a, b = self.factors
    if z.shape[rank_axis] != self._width:
      raise Unsupported(
        "its statistics are those of its inputs, and here its outputs are contracted, or its "
        "inputs and outputs are in groups"
      )
    inputs = [a.size(label) for label in a.dims if label not in b.dims]
    in_shards = bool(jax.sharding.get_abstract_mesh().manual_axes)
    if in_shards and math.prod(inputs) < self.num_inputs:
      raise Unsupported(
        "its statistics need whole inputs, and here each device has a part of them (shard_map)"
      )
    return _tapped(z, rank_axis % z.ndim, self.counts)

  def product(self, shape: Any, dtype: Any) -> jax.Array:
    del shape, dtype
    raise Unsupported("its rows are looked up, or it is materialized, so that it has no inputs")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _tapped(z: jax.Array, rank_axis: int, counts: bool) -> jax.Array:
  del counts
  return 0 * lax.slice_in_dim(z, 0, 1, axis=rank_axis)  # varies along the mesh as z does


def _forward(z: jax.Array, rank_axis: int, counts: bool) -> tuple[jax.Array, jax.Array]:
  return _tapped(z, rank_axis, counts), z


def _backward(rank_axis: int, counts: bool, z: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
  if counts:
    result = jnp.where(z == 0, 0.0, 1 / jnp.where(z == 0, 1.0, z))
  else:
    last = lax.broadcasted_iota(jnp.int32, z.shape, rank_axis) == z.shape[rank_axis] - 1
    result = jnp.where(last, 1.0, z)
  return (jnp.where(gradient == 0, 0.0, result),)


_tapped.defvjp(_forward, _backward)
