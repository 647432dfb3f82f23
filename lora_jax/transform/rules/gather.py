"""The rule of integer indexing: `w[ids]` in all its modes, embeddings among them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from lora_jax.transform.errors import Unsupported
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor, Term, move_factor
from lora_jax.transform.products import Labels
from lora_jax.transform.rules.joining import vary_along


def gather(call, w, indices, *, dimension_numbers, slice_sizes, mode, fill_value=None, **_):
  """`w[ids]` in all its modes: each factor is indexed by the dimensions it has.

  Matrices that are looked up, one per index, stay factored; the interpreter materializes rows,
  which are an embedding's output.
  """
  if not isinstance(w, Factored):
    raise Unsupported("indexing by an adapted weight")
  dnums = dimension_numbers
  base = call(w.base, indices)
  uncut = {  # named among the indices, as a batched dynamic_slice does, but taken whole
    d
    for d in dnums.start_index_map
    if slice_sizes[d] == w.shape[d] and d not in dnums.collapsed_slice_dims
    if mode != lax.GatherScatterMode.FILL_OR_DROP
  }
  indexed = {*dnums.start_index_map, *dnums.operand_batching_dims} - uncut
  gone = {*dnums.collapsed_slice_dims, *dnums.operand_batching_dims}
  kept = [d for d in range(w.ndim) if d not in gone]
  offset = {d: (dnums.offset_dims[i],) if d in kept else () for i, d in enumerate(kept)}
  where: dict[int, Labels] = {d: offset.get(d, ()) for d in range(w.ndim)}
  batch = tuple(d for d in range(base.ndim) if d not in dnums.offset_dims)

  def look_up(factor: Factor) -> Factor:
    array = factor.array
    for axis, d in enumerate(factor.labels):  # a dimension cut without an index
      if d >= 0 and d not in indexed and slice_sizes[d] != w.shape[d]:
        array = lax.slice_in_dim(array, 0, slice_sizes[d], axis=axis)
    factor = replace(factor, array=array)
    if not set(factor.dims) & indexed:
      return move_factor(array, factor.labels, where)
    return _gather_factor(factor, indices, dnums, indexed, slice_sizes, mode, where, batch)

  if mode == lax.GatherScatterMode.FILL_OR_DROP:  # filled elements are zero in every term
    w = replace(w, terms=tuple(_vary_along_all(term, indexed, w.shape) for term in w.terms))
  looked_up = w.map_factors(look_up)
  if (
    looked_up.gain is not None and mode == lax.GatherScatterMode.FILL_OR_DROP
  ):  # and have a gain of 1
    dims = tuple(sorted(indexed))
    exists = look_up(Factor(jnp.ones([w.shape[d] for d in dims]), dims))
    looked_up = replace(looked_up, gain=_one_elsewhere(looked_up.gain, exists))
  lookup = {*batch, *(moved_dim for old in w.lookup for moved_dim in where[old])}
  return replace(looked_up, base=base, lookup=tuple(sorted(lookup)))


def _one_elsewhere(gain: Factor, exists: Factor) -> Factor:
  """Returns a gain that is 1 for filled elements, where `exists` is 0."""
  labels = (*exists.labels, *(label for label in gain.labels if label not in exists.labels))
  return Factor(jnp.where(exists.along(labels) > 0, gain.along(labels), 1.0), labels)


def _vary_along_all(term: Term, dims: Iterable[int], shape: Sequence[int]) -> Term:
  for dim in sorted(dims):
    term = vary_along(term, dim, shape[dim])
  return term


def _gather_factor(
  factor: Factor, indices, dnums, indexed, slice_sizes, mode, where, batch
) -> Factor:
  """Gathers one factor by the index columns of the indexed dimensions that it has."""
  array, labels = factor.array, factor.labels
  columns = [i for i, d in enumerate(dnums.start_index_map) if d in labels and d in indexed]
  batching = [
    (labels.index(d), i)
    for d, i in zip(dnums.operand_batching_dims, dnums.start_indices_batching_dims, strict=True)
    if d in labels
  ]
  collapsed = [labels.index(d) for d in dnums.collapsed_slice_dims if d in labels]
  gone = {*collapsed, *(axis for axis, _ in batching)}
  rest = [label for axis, label in enumerate(labels) if axis not in gone]
  if len(columns) < indices.shape[-1]:
    indices = jnp.stack([indices[..., i] for i in columns], -1) if columns else indices[..., :0]
  numbers = lax.GatherDimensionNumbers(
    offset_dims=tuple(range(len(batch), len(batch) + len(rest))),
    collapsed_slice_dims=tuple(sorted(collapsed)),
    start_index_map=tuple(labels.index(dnums.start_index_map[i]) for i in columns),
    operand_batching_dims=tuple(axis for axis, _ in batching),
    start_indices_batching_dims=tuple(i for _, i in batching),
  )
  sizes = [n if d < 0 else slice_sizes[d] for d, n in zip(labels, array.shape, strict=True)]
  fill_value = 0 if mode == lax.GatherScatterMode.FILL_OR_DROP else None
  out = lax.gather(array, indices, numbers, tuple(sizes), mode=mode, fill_value=fill_value)
  moved = [(label,) if label < 0 else where[label] for label in rest]
  return Factor(out, (*batch, *(label for labels in moved for label in labels)))
