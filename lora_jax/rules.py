"""One rule per primitive: how an operation passes through a factored weight.

A rule is `rule(call, *operands, **params)`: `call` is the primitive itself, to be applied
to the base; the operands are arrays and `Factored` values; the params are the primitive's.

- A *structural* rule returns a `Factored`: the operation moved, cut or scaled the weight.
- A *consumer* returns an array: the operation used the weight on an input. It asks
  `Factored.use` (or `Factored.dot`) for the terms to add.

A rule that cannot do it raises `Unsupported` with the reason. Nothing here knows of jaxprs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.factored import RANK, Factor, Factored, Labels, Term, Unsupported, move_factor, plus

Rule = Callable[..., Any]


# ---- structural: the elements move, the values stay ------------------------------------


def transpose(call, w, *, permutation, **_):
  return w.move(call(w.base), {old: (new,) for new, old in enumerate(permutation)})


def broadcast_in_dim(call, w, *dynamic_shape, shape, broadcast_dimensions, **_):
  pairs = zip(w.shape, broadcast_dimensions, strict=True)
  where = {d: (new,) if size == shape[new] else () for d, (size, new) in enumerate(pairs)}
  return w.move(call(w.base, *dynamic_shape), where)


def squeeze(call, w, *, dimensions, **_):
  rest = [d for d in range(w.ndim) if d not in dimensions]
  where = {d: (rest.index(d),) if d in rest else () for d in range(w.ndim)}
  return w.move(call(w.base), where)


def reshape(call, w, *dynamic_shape, new_sizes, dimensions=None, **_):
  """Splits and merges dimensions, as long as each group of them lies on one side."""
  if dimensions is not None:
    raise Unsupported("reshape with a permutation of dimensions")
  groups = reshape_groups(w.shape, new_sizes)

  def reshaped(factor: Factor) -> Factor:
    sizes, labels, order = [], [], []
    for old, new in groups:
      carried = [d for d in old if d in factor.dims]
      wide = [d for d in old if w.shape[d] > 1]
      order += carried
      if not carried or (wide and not set(wide) & set(carried)):
        continue  # constant along this group, or only axes of size 1 in it
      if not set(wide) <= set(carried) and not w.probing:
        raise Unsupported(f"reshape from {w.shape} to {new_sizes} merges both factors' axes")
      sizes += [new_sizes[n] for n in new]
      labels += new
    labels = (*labels, RANK)
    if w.probing:  # labels matter here, values do not
      return Factor(jnp.zeros((*sizes, 1), factor.array.dtype), labels)
    array = lax.transpose(factor.array, [factor.axis(d) for d in (*order, RANK)])
    return Factor(lax.reshape(array, (*sizes, array.shape[-1])), labels)

  lookup = sorted(n for old, new in groups if set(old) & set(w.lookup) for n in new)
  return replace(w.map_factors(reshaped), base=call(w.base, *dynamic_shape), lookup=tuple(lookup))


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[Labels, Labels]]:
  """Pairs the dimensions of two shapes into the smallest groups of equal size.

  >>> reshape_groups((6, 5, 4), (2, 3, 20))
  [((0,), (0, 1)), ((1, 2), (2,))]
  """
  groups: list[tuple[Labels, Labels]] = []
  i = j = 0
  while i < len(old) or j < len(new):
    start_i, start_j = i, j
    i, j = min(i + 1, len(old)), min(j + 1, len(new))
    while math.prod(old[start_i:i]) != math.prod(new[start_j:j]):
      if math.prod(old[start_i:i]) < math.prod(new[start_j:j]):
        i += 1
      else:
        j += 1
    groups.append((tuple(range(start_i, i)), tuple(range(start_j, j))))
  return groups


def unchanged(call, w, *rest, **_):
  """What changes neither shape nor factors: a copy, a cast's base, a constraint's base."""
  return w.rebase(call(w.base, *rest))


def convert_element_type(call, w, *, new_dtype, **_):
  if not jnp.issubdtype(new_dtype, jnp.floating):
    raise Unsupported(f"a cast to {np.dtype(new_dtype).name}")
  return w.rebase(call(w.base))


def stop_gradient(call, w, **_):
  return w.rebase(call(w.base)).map_factors(lambda f: Factor(call(f.array), f.labels))


def optimization_barrier(call, *operands, **_):
  bases = call(*(w.base if isinstance(w, Factored) else w for w in operands))
  pairs = zip(operands, bases, strict=True)
  return [w.rebase(base) if isinstance(w, Factored) else base for w, base in pairs]


def sharding_constraint(call, w, *, sharding, **_):
  """Constrains the factors like the base: each axis as its dimension, rank replicated."""
  return _sharded(w, call(w.base), sharding, lax.with_sharding_constraint)


def reshard(call, w, *, dst_sharding, **_):
  """The same where sharding is part of the types."""
  return _sharded(w, call(w.base), dst_sharding, jax.sharding.reshard)


def _sharded(w: Factored, base, sharding, put: Callable[[Any, Any], Any]) -> Factored:
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return w.rebase(base)

  def moved(factor: Factor) -> Factor:
    spec = factor_spec(factor.labels, sharding.spec)
    return Factor(put(factor.array, sharding.update(spec=spec)), factor.labels)

  return w.rebase(base).map_factors(moved)


def factor_spec(labels: Labels, spec: Iterable[Any]) -> jax.sharding.PartitionSpec:
  """Returns a factor's PartitionSpec from its weight's: the rank axis is replicated."""
  axes = (*spec, *(None for _ in labels))  # a spec may be shorter than the shape
  return jax.sharding.PartitionSpec(*(None if d == RANK else axes[d] for d in labels))


# ---- structural: the weight is cut or extended -----------------------------------------


def along_dims(w: Factored, base: jax.Array, on_axis: Callable[[jax.Array, int, int], jax.Array]):
  """Applies `on_axis(array, axis, dim)` to every axis of every factor."""

  def cut(factor: Factor) -> jax.Array:
    array = factor.array
    for axis, dim in enumerate(factor.labels):
      array = array if dim == RANK else on_axis(array, axis, dim)
    return array

  return w.move(base, {d: (d,) for d in range(w.ndim)}, cut)


def slice_(call, w, *, start_indices, limit_indices, strides, **_):
  strides = strides or [1] * w.ndim

  def cut(array, axis, dim):
    return lax.slice_in_dim(array, start_indices[dim], limit_indices[dim], strides[dim], axis)

  return along_dims(w, call(w.base), cut)


def dynamic_slice(call, w, *starts, slice_sizes, **_):
  def cut(array, axis, dim):
    if slice_sizes[dim] == w.shape[dim]:
      return array
    return lax.dynamic_slice_in_dim(array, starts[dim], slice_sizes[dim], axis)

  return along_dims(w, call(w.base, *starts), cut)


def split(call, w, *, sizes, axis, **_):
  ends = np.cumsum(sizes)
  pieces = []
  for base, size, end in zip(call(w.base), sizes, ends, strict=True):

    def cut(array, i, dim, start=int(end - size), stop=int(end)):
      return lax.slice_in_dim(array, start, stop, axis=i) if dim == axis else array

    pieces.append(along_dims(w, base, cut))
  return pieces


def rev(call, w, *, dimensions, **_):
  def flip(array, axis, dim):
    return lax.rev(array, (axis,)) if dim in dimensions else array

  return along_dims(w, call(w.base), flip)


def pad(call, w, value, *, padding_config, **_):
  padded = {d for d, config in enumerate(padding_config) if tuple(config) != (0, 0, 0)}
  for term in w.terms:
    if not w.probing and padded and not any(padded & set(f.dims) for f in term.factors):
      raise Unsupported("padding along an axis that neither factor has")
  padding = {d: (int(lo), int(hi), int(inner)) for d, (lo, hi, inner) in enumerate(padding_config)}
  return replace(w.map_factors(lambda f: _pad(f, padding)), base=call(w.base, value))


def _pad(factor: Factor, padding: Mapping[int, tuple[int, int, int]]) -> Factor:
  """Pads a factor with zeros, which pads the product with zeros whatever the other one has."""
  config = [padding.get(label, (0, 0, 0)) for label in factor.labels]
  zero = jnp.zeros((), factor.array.dtype)
  return Factor(lax.pad(factor.array, zero, config), factor.labels)


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
      for term in w.terms:
        term = _vary_along(term, dim, size)
        terms.append(replace(term, factors=tuple(_pad(f, padding) for f in term.factors)))
    start += size
  lookup = {d for w in operands if isinstance(w, Factored) for d in w.lookup}
  return Factored(base, tuple(terms), tuple(sorted(lookup)))


def _vary_along(term: Term, dim: int, size: int) -> Term:
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


# ---- structural: the weight is scaled --------------------------------------------------


def neg(call, w, **_):
  return w.scale(call(w.base), -1)


def mul(call, x, y, **_):
  """By a scalar, or by an array that varies along the axes of one factor only."""
  if isinstance(x, Factored) and isinstance(y, Factored):
    raise Unsupported("the elementwise product of two adapted weights")
  w, by = (x, y) if isinstance(x, Factored) else (y, x)
  base = call(w.base, by) if w is x else call(by, w.base)
  return _scale_along(w, base, by)


def div(call, w, by, **_):
  if not isinstance(w, Factored) or isinstance(by, Factored):
    raise Unsupported("division by an adapted weight")
  return _scale_along(w, call(w.base, by), 1 / by)


def _scale_along(w: Factored, base: jax.Array, by: Any) -> Factored:
  shape = np.shape(by)
  dims = [d for d, size in enumerate(shape) if size > 1]
  if not dims:
    return w.scale(base, jnp.reshape(by, ()))
  if w.probing:
    return w.rebase(base)
  if base.shape != w.shape:
    raise Unsupported(f"an elementwise product that broadcasts the weight to {base.shape}")
  small = lax.squeeze(by, [d for d in range(w.ndim) if d not in dims])

  def scaled(factor: Factor) -> Factor:
    order = [dims.index(d) for d in factor.labels if d in dims]
    axes = [i for i, d in enumerate(factor.labels) if d in dims]
    factor_by = lax.transpose(small, order).astype(factor.array.dtype)
    array = factor.array * lax.broadcast_in_dim(factor_by, factor.array.shape, axes)
    return Factor(array, factor.labels)

  terms = []
  for term in w.terms:
    factors = list(term.factors)
    i = next((i for i, f in enumerate(factors) if set(dims) <= set(f.dims)), None)
    if i is None:
      raise Unsupported(f"an elementwise product with an array of shape {shape}, not per channel")
    factors[i] = scaled(factors[i])
    terms.append(replace(term, factors=tuple(factors)))
  return replace(w, base=base, terms=tuple(terms))


# ---- structural: rows are looked up ----------------------------------------------------


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


# ---- consumers -------------------------------------------------------------------------


def dot_general(call, lhs, rhs, *, dimension_numbers, precision, preferred_element_type, **_):
  """The weight on either side, any number of contracted and batch axes."""
  contracting, batch = dimension_numbers
  lhs = _settled(lhs, contracting[0], batch[0])
  rhs = _settled(rhs, contracting[1], batch[1])
  if isinstance(lhs, Factored) and isinstance(rhs, Factored):
    raise Unsupported("the product of two adapted weights")
  if isinstance(lhs, Factored):
    flipped = (contracting[1], contracting[0]), (batch[1], batch[0])
    low_rank = lhs.dot(rhs, *flipped, precision, preferred_element_type, weight_first=True)
    return plus(call(lhs.base, rhs), low_rank)
  if isinstance(rhs, Factored):
    low_rank = rhs.dot(lhs, contracting, batch, precision, preferred_element_type)
    return plus(call(lhs, rhs.base), low_rank)
  return call(lhs, rhs)


def _settled(w: Any, contracted: Sequence[int], batch: Sequence[int]) -> Any:
  """Forms a looked-up value, unless each index picks a whole matrix to multiply with."""
  if not isinstance(w, Factored) or not w.lookup:
    return w
  free = set(range(w.ndim)) - {*contracted, *batch, *w.lookup}
  per_index = set(w.lookup) <= set(batch) and free and contracted
  return w if per_index else w.look_up()


def ragged_dot_general(call, x, w, *rest, ragged_dot_dimension_numbers, precision, **_):
  """Experts: rows of `x` in groups, one matrix of `w` for each group."""
  dnums = ragged_dot_dimension_numbers
  (contracting, batch), groups = dnums.dot_dimension_numbers, tuple(dnums.rhs_group_dimensions)
  counts = (x.ndim, len(rest), len(groups), len(contracting[1]), len(batch[1]))
  if not isinstance(w, Factored) or isinstance(x, Factored) or counts != (2, 1, 1, 1, 0):
    raise Unsupported("a ragged product other than rows in groups times one matrix per group")
  out = call(x, w.base, *rest)
  for term in w.use(contracting[1], groups):
    if not any(groups[0] in f.dims for f in term.factors):
      raise Unsupported("factors without an axis for the groups of a ragged product")
    sides = sorted(term.factors, key=lambda f: contracting[1][0] not in f.dims)
    z = jnp.moveaxis(term.drop(x), contracting[0][0], -1)
    for factor, axis in zip(sides, (contracting[1][0], RANK), strict=True):
      z = _ragged(z, factor, axis, groups[0], rest[0], precision)
    out = plus(out, term.scaled(z))
  return out


def _ragged(x, factor: Factor, axis: int, group: int, group_sizes, precision) -> jax.Array:
  """Contracts x's last axis with `axis` of a factor, per group where the factor has groups."""
  array = factor.array.astype(x.dtype)
  if group not in factor.labels:
    return jnp.tensordot(x, array, ((1,), (factor.axis(axis),)), precision=precision)
  order = sorted(
    factor.labels, key=lambda label: (group, axis).index(label) if label in (group, axis) else 2
  )
  array = lax.transpose(array, [factor.axis(label) for label in order])
  return lax.ragged_dot(x, array, group_sizes, precision=precision)


def conv_general_dilated(call, x, w, *, dimension_numbers, feature_group_count, **params):
  """Any convolution by an adapted kernel: by A's `rank` channels first, then 1x1 by B."""
  if isinstance(x, Factored):
    raise Unsupported("an adapted weight as the input of a convolution")
  if params["batch_group_count"] != 1:
    raise Unsupported("a convolution with batch_group_count other than 1")
  _, rhs_spec, out_spec = dimension_numbers
  out_dim, in_dim, *window = rhs_spec
  out = call(x, w.base)
  groups = feature_group_count
  options = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
  for term in w.use((in_dim, *window)):
    kernel, mixer = sorted(term.factors, key=lambda f: out_dim in f.dims)
    if set(mixer.dims) != {out_dim} or out_dim in kernel.dims:
      raise Unsupported("a convolution whose output axis is not a side of its own")
    order = [RANK if d == out_dim else d for d in range(w.ndim)]
    a = lax.transpose(kernel.array.astype(x.dtype), [kernel.axis(d) for d in order])
    if groups > 1:  # every group of inputs meets the same `rank` kernels
      a = jnp.concatenate([a] * groups, axis=out_dim)
    z = lax.conv_general_dilated(
      term.drop(x),
      a,
      dimension_numbers=lax.ConvDimensionNumbers(*dimension_numbers),
      feature_group_count=groups,
      **{name: params[name] for name in options},
    )
    out = plus(out, _mix_channels(term.scaled(z), mixer, out_dim, out_spec[1], groups, out.shape))
  return out


def _mix_channels(z, mixer: Factor, out_dim: int, channel: int, groups: int, shape) -> jax.Array:
  """Multiplies the channels of z, (groups * rank), by B, (rank, groups * out)."""
  b = lax.transpose(mixer.array.astype(z.dtype), [mixer.axis(d) for d in (RANK, out_dim)])
  z = jnp.moveaxis(z, channel, -1)
  z = z.reshape(*z.shape[:-1], groups, -1)
  b = b.reshape(b.shape[0], groups, -1)
  out = jnp.einsum("...gr,rgo->...go", z, b)
  return jnp.moveaxis(out.reshape(*z.shape[:-2], -1), -1, channel)


STRUCTURAL: Mapping[str, Rule] = {
  "transpose": transpose,
  "broadcast_in_dim": broadcast_in_dim,
  "squeeze": squeeze,
  "reshape": reshape,
  "slice": slice_,
  "dynamic_slice": dynamic_slice,
  "split": split,
  "rev": rev,
  "pad": pad,
  "concatenate": concatenate,
  "stack": stack,
  "unstack": unstack,
  "gather": gather,
  "mul": mul,
  "div": div,
  "neg": neg,
  "convert_element_type": convert_element_type,
  "stop_gradient": stop_gradient,
  "copy": unchanged,
  "copy_p": unchanged,
  "name": unchanged,
  "optimization_barrier": optimization_barrier,
  "sharding_constraint": sharding_constraint,
  "reshard": reshard,
}

CONSUMERS: Mapping[str, Rule] = {
  "dot_general": dot_general,
  "ragged_dot_general": ragged_dot_general,
  "conv_general_dilated": conv_general_dilated,
}
