"""Structural rules: weights are split into pieces, or joined with others and with zeros."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.transform.factored import Factor, Factored, Term, move_factor
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
  return replace(w, base=call(w.base, value), terms=terms)


def _padded(term: Term, padding: Mapping[int, tuple[int, int, int]], sizes: Any) -> Term:
  """Pads a term of these `sizes` by dimension with zeros.

  Where one is zero the product is, whatever the other has.
  """
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
  return _side_by_side(base, operands, dimension, sizes)


def stack(call, *operands, axis):
  """Every piece keeps its own terms, which are zero in the other pieces' places."""
  base = call(*(w.base if isinstance(w, Factored) else w for w in operands))
  where = {d: (d + (d >= axis),) for d in range(base.ndim - 1)}

  def widened(w):
    if not isinstance(w, Factored):
      return w
    lookup = tuple(where[d][0] for d in w.lookup)
    moved = w.map_factors(lambda f: move_factor(f.array, f.labels, where))
    return replace(moved, lookup=lookup)

  return _side_by_side(base, [widened(w) for w in operands], axis, [1] * len(operands))


def _side_by_side(base, operands, dim: int, sizes: Sequence[int]) -> Factored:
  terms: list[Term] = []
  start = 0
  for w, size in zip(operands, sizes, strict=True):
    if isinstance(w, Factored):
      padding = {dim: (start, base.shape[dim] - start - size, 0)}
      terms += [_padded(term, padding, {dim: size}) for term in w.terms]
    start += size
  lookup = {d for w in operands if isinstance(w, Factored) for d in w.lookup}
  return Factored(base, tuple(terms), tuple(sorted(lookup)))


def vary_along(term: Term, dim: int, size: int) -> Term:
  """Gives a term whose factors are constant along `dim` an axis for it in its first one."""
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
