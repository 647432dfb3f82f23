"""Some layers of a stack: the small arrays are sliced or padded, and the stack is not touched."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import LoraAxes
from lora_jax.transform.deferred import Base, Deferred, evaluate
from lora_jax.transform.factors import Factor, Term
from lora_jax.transform.formed import Formed, is_formed


def stored_shape(
  shape: Sequence[int], axes: LoraAxes, layers: Sequence[int] | None
) -> tuple[int, ...]:
  """Returns the weight's shape, its layer axis reduced to the adapted layers."""
  sizes = list(shape)
  if layers is not None:
    sizes[axes.batch[0]] = len(layers)
  return tuple(sizes)


def adapted_layers(w: jax.Array, axes: LoraAxes, layers: Sequence[int] | None) -> jax.Array:
  """Returns a copy of the adapted layers of a weight; the weight itself if all are."""
  return w if layers is None else jnp.take(w, jnp.asarray(layers), axis=axes.batch[0])


def spread_layers(
  factor: Factor, dim: int, layers: tuple[int, ...], count: int, fill: float
) -> Factor:
  """Returns a factor of `count` layers: the given ones at the indices `layers`, else `fill`."""
  x, axis = factor.array, factor.axis(dim)
  rest = jnp.full_like(lax.slice_in_dim(x, 0, 1, axis=axis), fill)  # sharded as x
  position = {layer: i for i, layer in enumerate(layers)}
  pieces = [
    lax.slice_in_dim(x, position[i], position[i] + 1, axis=axis) if i in position else rest
    for i in range(count)
  ]
  return dataclasses.replace(factor, array=jnp.concatenate(pieces, axis=axis))


def spread_term(term: Term, dim: int, layers: tuple[int, ...], count: int) -> Term:
  """Returns a term that is zero in the layers that are not adapted."""
  factors = [
    spread_layers(f, dim, layers, count, 0.0) if dim in f.dims else f for f in term.factors
  ]
  if not any(dim in factor.dims for factor in term.factors):  # one factor for all the layers
    ones = Factor(jnp.ones((len(layers),), jnp.float32), (dim,))
    factors[0] = factors[0] * spread_layers(ones, dim, layers, count, 0.0)
  return dataclasses.replace(term, factors=tuple(factors))


def spread_update(base: Base, dim: int, layers: tuple[int, ...], count: int) -> Base:
  """Returns a base whose update, if it has one, is zero in the layers that are not adapted."""
  if not (isinstance(base, Deferred) and is_formed(base.operands[0])):
    return base
  leaf: Formed = base.operands[0]
  if not any(dim in factor.dims for factor in leaf.factors):
    raise ValueError("the update of some layers of a stack needs a factor with the stack's axis")

  def spread(factor: Factor) -> Factor:
    return spread_layers(factor, dim, layers, count, 0.0) if dim in factor.dims else factor

  return Deferred((leaf.map(lambda w: w, spread),))


def sum_with_weight(
  w: jax.Array, factor: Factor, labels: Sequence[int], dim: int | None, layers: tuple[int, ...]
) -> Factor:
  """Returns a factor of the adapted layers times the weight, summed over `labels`; in float32.

  The factor is padded with zeros and the result is sliced: no layer of the weight is copied.

  Args:
    w: the whole weight; dequantized here if it is quantized.
    factor: of the adapted layers; it is cast to the weight's dtype.
    labels: the summed dimensions, which both have.
    dim: the layer axis; None if all layers are adapted.
    layers: the adapted layers.
  """
  dtype = w.dtype if w.dtype.itemsize > 1 else jnp.bfloat16  # JAX does not promote float8
  base = Factor(evaluate(w).astype(dtype), tuple(range(w.ndim)), frozen=True)
  factor = dataclasses.replace(factor, array=factor.array.astype(dtype))
  if dim is None:
    return factor.sum_over(base, labels)
  whole = spread_layers(factor, dim, layers, w.shape[dim], 0.0).sum_over(base, labels)
  part = jnp.take(whole.array, jnp.asarray(layers), axis=whole.axis(dim))
  return dataclasses.replace(whole, array=part)
