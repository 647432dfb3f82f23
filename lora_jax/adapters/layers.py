"""Some layers of a stack: the small arrays are sliced or padded, and the stack is not touched."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import LoraAxes
from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.deferred import Base, Deferred, evaluate
from lora_jax.transform.factors import Factor, Term
from lora_jax.transform.formed import Formed, is_formed, is_sliceable


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
  w: Base, factor: Factor, labels: Sequence[int], dim: int | None, layers: tuple[int, ...]
) -> Factor:
  """Returns a factor of the adapted layers times the weight, summed over `labels`; in float32.

  The factor is padded with zeros and the result is sliced: no layer of the weight is copied. A
  quantized stack is dequantized one layer at a time.

  Args:
    w: the whole weight.
    factor: of the adapted layers; it is cast to the weight's dtype.
    labels: the summed dimensions, which both have.
    dim: the layer axis; None if all layers are adapted.
    layers: the adapted layers.
  """
  dtype = w.dtype if w.dtype.itemsize > 1 else jnp.bfloat16  # JAX does not promote float8
  factor = dataclasses.replace(factor, array=factor.array.astype(dtype))
  stack = _quantized_stack(w)
  if stack is not None and 0 in factor.labels and 0 not in labels:
    return _sum_by_layer(stack, factor, labels, range(w.shape[0]) if dim is None else layers)
  base = Factor(evaluate(w).astype(dtype), tuple(range(w.ndim)), frozen=True)
  if dim is None:
    return factor.sum_over(base, labels)
  whole = spread_layers(factor, dim, layers, w.shape[dim], 0.0).sum_over(base, labels)
  part = jnp.take(whole.array, jnp.asarray(layers), axis=whole.axis(dim))
  return dataclasses.replace(whole, array=part)


def _quantized_stack(w: Base) -> Deferred | None:
  """Returns a weight if it is quantized layers, whose codes can be sliced; otherwise None."""
  if not isinstance(w, Deferred):
    return None
  leaf = w.pointwise_leaf
  is_stack = is_quantized(leaf) and leaf.explicit_sharding is None and is_sliceable(leaf, 0)
  return w if is_stack else None


def _sum_by_layer(
  w: Deferred, factor: Factor, labels: Sequence[int], layers: Sequence[int]
) -> Factor:
  """Returns `sum_with_weight` of some layers of a quantized stack, in a loop over these."""
  rest = tuple(label for label in factor.labels if label != 0)
  order = tuple(sorted({*rest, *range(1, w.ndim)} - set(labels)))

  @jax.checkpoint
  def of_layer(x: tuple[jax.Array, jax.Array]) -> jax.Array:
    i, part = x
    leaf = jax.tree.map(lambda codes: lax.dynamic_index_in_dim(codes, i, keepdims=False), w)
    base = Factor(evaluate(leaf).astype(part.dtype), tuple(range(1, w.ndim)), frozen=True)
    return Factor(part, rest).sum_over(base, labels).along(order)

  parts = jnp.moveaxis(factor.array, factor.axis(0), 0)
  arrays = lax.map(of_layer, (jnp.asarray(layers), parts))
  return dataclasses.replace(factor, array=arrays, labels=(0, *order))
