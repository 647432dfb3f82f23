"""Structural rules: weights are split into pieces, or joined with others and with zeros."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from lora_jax.transform.errors import Unsupported
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor, Term
from lora_jax.transform.rules.moving import along_dims


def split(call, w, *, sizes, axis, **_):
  ends = np.cumsum(sizes)
  pieces = []
  for base, size, end in zip(call(w.base), sizes, ends, strict=True):

    def cut(array, i, dim, start=int(end - size), stop=int(end)):
      return lax.slice_in_dim(array, start, stop, axis=i) if dim == axis else array

    pieces.append(along_dims(w, base, cut))
  return pieces


def pad(call, w, value, *, padding_config, **_):
  padding = {
    d: (int(low), int(high), int(interior))
    for d, (low, high, interior) in enumerate(padding_config)
    if (low, high, interior) != (0, 0, 0)
  }
  terms = tuple(_padded(term, padding, w.shape) for term in w.terms)
  gain = None if w.gain is None else _padded_gain(w.gain, padding, value)
  return replace(w, base=call(w.base, value), terms=terms, gain=gain)


def _padded_gain(gain: Factor, padding: Mapping[int, tuple[int, int, int]], value: Any) -> Factor:
  """Pads a gain with ones, which leave the padding of the base unchanged."""
  config = [padding.get(label, (0, 0, 0)) for label in gain.labels]
  is_zero = not isinstance(value, Tracer) and not np.any(value)
  if not (is_zero or set(padding) <= set(gain.dims)):
    raise Unsupported("padding with other values than 0, which its gain would multiply")
  return Factor(lax.pad(gain.array, jnp.ones((), gain.array.dtype), config), gain.labels)


def _padded(term: Term, padding: Mapping[int, tuple[int, int, int]], sizes: Any) -> Term:
  """Pads every factor of a term of these `sizes` with zeros, by dimension."""
  for dim in padding:
    term = vary_along(term, dim, sizes[dim])

  def padded(factor: Factor) -> Factor:
    config = [padding.get(label, (0, 0, 0)) for label in factor.labels]
    zero = jnp.zeros((), factor.array.dtype)
    return Factor(lax.pad(factor.array, zero, config), factor.labels)

  return replace(term, factors=tuple(map(padded, term.factors)))


def concatenate(call, *operands, dimension):
  """Every piece keeps its own terms, padded with zeros along `dimension`."""
  base = call(*(w.base if isinstance(w, Factored) else w for w in operands))
  sizes = [w.shape[dimension] for w in operands]
  return _joined(base, operands, dimension, sizes)


def stack(call, *operands, axis):
  """Every piece keeps its own terms, which are zero for the other pieces."""
  base = call(*(w.base if isinstance(w, Factored) else w for w in operands))
  where = {d: (d + (d >= axis),) for d in range(base.ndim - 1)}

  def widen(w):
    return w.move(w.base, where) if isinstance(w, Factored) else w

  return _joined(base, [widen(w) for w in operands], axis, [1] * len(operands))


def _joined(base: Any, operands: Sequence[Any], dim: int, sizes: Sequence[int]) -> Factored:
  """Returns the pieces joined along `dim`, of these sizes; some of them are plain arrays."""
  terms: list[Term] = []
  start = 0
  for w, size in zip(operands, sizes, strict=True):
    if isinstance(w, Factored):
      padding = {dim: (start, base.shape[dim] - start - size, 0)}
      terms += [_padded(term, padding, {dim: size}) for term in w.terms]
    start += size
  weights = [w for w in operands if isinstance(w, Factored)]
  lookup = tuple(sorted({d for w in weights for d in w.lookup}))
  source = functools.reduce(operator.or_, (w.source for w in weights))
  gain = _joined_gain(base.shape, operands, dim, sizes)
  return Factored(base, source, tuple(terms), gain, lookup)


def _joined_gain(
  shape: Sequence[int], operands: Sequence[Any], dim: int, sizes: Sequence[int]
) -> Factor | None:
  """Returns the gains joined along `dim`, broadcast to the same axes; 1 for pieces without one."""
  gains = [w.gain if isinstance(w, Factored) else None for w in operands]
  present = [gain for gain in gains if gain is not None]
  if not present:
    return None
  labels = tuple(sorted({dim, *(label for gain in present for label in gain.labels)}))
  dtype = jnp.result_type(*(gain.array for gain in present))
  pieces = [
    jnp.broadcast_to(
      jnp.ones((), dtype) if gain is None else gain.along(labels),
      [size if label == dim else shape[label] for label in labels],
    )
    for gain, size in zip(gains, sizes, strict=True)
  ]
  return Factor(jnp.concatenate(pieces, labels.index(dim)), labels)


def vary_along(term: Term, dim: int, size: int) -> Term:
  """Adds an axis for `dim` to the first factor of a term that is constant along it."""
  first, *rest = term.factors
  if term.probe is not None or any(dim in f.dims for f in term.factors):
    return term
  array = jnp.broadcast_to(first.array, (size, *first.array.shape))
  return replace(term, factors=(Factor(array, (dim, *first.labels)), *rest))


def unstack(call, w, *, axis):
  where = {d: () if d == axis else (d - (d > axis),) for d in range(w.ndim)}

  def piece(base, i):
    def cut(factor):
      if axis not in factor.labels:
        return factor.array
      return lax.slice_in_dim(factor.array, i, i + 1, axis=factor.axis(axis))

    return w.move(base, where, cut)

  return [piece(base, i) for i, base in enumerate(call(w.base))]
