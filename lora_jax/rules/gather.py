"""The rule of integer indexing: `w[ids]` in all its modes, embeddings among them."""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from lora_jax.factored import RANK, Factor, Factored, Unsupported, move_factor
from lora_jax.products import Labels


def gather(call, w, indices, *, dimension_numbers, slice_sizes, mode, **_):
  """`w[ids]` in all its modes: each factor is indexed by the dimensions it has.

  Rows that are looked up are an embedding's output, formed here: they have the size of an
  activation. Matrices that are looked up, one per index, stay factored.
  """
  if not isinstance(w, Factored):
    raise Unsupported("indexing by an adapted weight")
  dnums = dimension_numbers
  base = call(w.base, indices)
  indexed = {*dnums.start_index_map, *dnums.operand_batching_dims}
  gone = {*dnums.collapsed_slice_dims, *dnums.operand_batching_dims}
  kept = [d for d in range(w.ndim) if d not in gone]
  offset = {d: (dnums.offset_dims[i],) if d in kept else () for i, d in enumerate(kept)}
  where: dict[int, Labels] = {d: offset.get(d, ()) for d in range(w.ndim)}
  batch = tuple(d for d in range(base.ndim) if d not in dnums.offset_dims)

  def looked_up(factor: Factor) -> Factor:
    array = factor.array
    for axis, d in enumerate(factor.labels):  # a dimension cut without an index
      if d != RANK and d not in indexed and slice_sizes[d] != w.shape[d]:
        array = lax.slice_in_dim(array, 0, slice_sizes[d], axis=axis)
    if not set(factor.dims) & indexed:
      return move_factor(array, factor.labels, where)
    return _gather_factor(array, factor.labels, indices, dnums, slice_sizes, mode, where, batch)

  lookup = {*batch, *(new for old in w.lookup for new in where[old])}
  view = replace(w.map_factors(looked_up), base=base, lookup=tuple(sorted(lookup)))
  per_index = view.ndim >= len(lookup) + 2  # each index picks a matrix, not a row
  return view if per_index or not lookup else view.look_up()


def _gather_factor(array, labels, indices, dnums, slice_sizes, mode, where, batch) -> Factor:
  """Gathers one factor by the index columns of the dimensions that it has."""
  columns = [i for i, d in enumerate(dnums.start_index_map) if d in labels]
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
  own = lax.GatherDimensionNumbers(
    offset_dims=tuple(range(len(batch), len(batch) + len(rest))),
    collapsed_slice_dims=tuple(sorted(collapsed)),
    start_index_map=tuple(labels.index(dnums.start_index_map[i]) for i in columns),
    operand_batching_dims=tuple(axis for axis, _ in batching),
    start_indices_batching_dims=tuple(i for _, i in batching),
  )
  sizes = [n if d == RANK else slice_sizes[d] for d, n in zip(labels, array.shape, strict=True)]
  fill = 0 if mode == lax.GatherScatterMode.FILL_OR_DROP else None
  out = lax.gather(array, indices, own, tuple(sizes), mode=mode, fill_value=fill)
  new = [(RANK,) if label == RANK else where[label] for label in rest]
  return Factor(out, (*batch, *(label for labels in new for label in labels)))
