"""Consumers: dot products and convolutions, where the weight meets the layer's input."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform.errors import Unsupported
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import RANK, Factor
from lora_jax.transform.products import plus


def dot_general(call, lhs, rhs, *, dimension_numbers, precision, preferred_element_type, **_):
  """The weight as either operand, with any number of contracted and batch axes."""
  contracting, batch = dimension_numbers
  lhs = _settled(lhs, contracting[0], batch[0])
  rhs = _settled(rhs, contracting[1], batch[1])
  options = precision, preferred_element_type
  if isinstance(lhs, Factored) and isinstance(rhs, Factored):
    raise Unsupported("the matmul of two adapted weights")
  if isinstance(lhs, Factored):
    flipped = (contracting[1], contracting[0]), (batch[1], batch[0])
    return lhs.dot(rhs, *flipped, *options, weight_first=True, base=lambda x: call(lhs.base, x))
  if isinstance(rhs, Factored):
    return rhs.dot(lhs, contracting, batch, *options, base=lambda x: call(x, rhs.base))
  return call(lhs, rhs)


def _settled(w: Any, contracted: Sequence[int], batch: Sequence[int]) -> Any:
  """Materializes a lookup, unless each index picks a whole matrix to multiply with."""
  if not isinstance(w, Factored) or not w.lookup:
    return w
  free = set(range(w.ndim)) - {*contracted, *batch, *w.lookup}
  per_index = set(w.lookup) <= set(batch) and free and contracted
  return w if per_index else w.look_up()


def ragged_dot_general(call, x, w, *rest, ragged_dot_dimension_numbers, precision, **_):
  """Experts: rows of `x` in groups, one matrix of `w` for each group."""
  dnums = ragged_dot_dimension_numbers
  contracting, batch = dnums.dot_dimension_numbers
  if isinstance(x, Factored) or not isinstance(w, Factored):
    raise Unsupported("an adapted weight as the rows of a ragged matmul")
  one_matrix_per_group = (
    x.ndim == 2
    and len(rest) == 1  # the group sizes
    and len(dnums.rhs_group_dimensions) == 1
    and len(contracting[1]) == 1
    and not batch[1]
  )
  if not one_matrix_per_group:
    raise Unsupported("a ragged matmul other than rows in groups times one matrix per group")
  (group,), (in_dim,), (group_sizes,) = dnums.rhs_group_dimensions, contracting[1], rest
  (out_dim,) = set(range(w.ndim)) - {group, in_dim}
  row_axis = 1 - contracting[0][0]
  row = w.ndim  # the label of the rows
  w = _gain_per_row(w, group, row, group_sizes, x.shape[row_axis])

  def output(x, terms):
    out = call(x, w.base, group_sizes)
    for term in terms:
      if not any(group in f.dims for f in term.factors):
        raise Unsupported("factors without an axis for the groups of a ragged matmul")
      z = jnp.moveaxis(term.drop(w.input(x)), row_axis, 0)
      a, b = sorted(term.factors, key=lambda f: in_dim not in f.dims)
      z = term.between(_ragged(z, a, in_dim, group, group_sizes, precision), -1)
      out = plus(out, _ragged(z, b, RANK, group, group_sizes, precision))
    return out

  x_labels = (row, in_dim) if row_axis == 0 else (in_dim, row)
  return w.consume(x, x_labels, (row, out_dim), (in_dim,), (group,), output)


def _gain_per_row(w: Factored, group: int, row: int, group_sizes, num_rows: int) -> Factored:
  """Repeats a gain that differs between groups for the rows of each, under the label `row`."""
  if w.gain is None or group not in w.gain.dims:
    return w
  array = jnp.moveaxis(w.gain.array, w.gain.axis(group), 0)
  array = jnp.repeat(array, group_sizes, axis=0, total_repeat_length=num_rows)
  labels = (row, *(label for label in w.gain.labels if label != group))
  return dataclasses.replace(w, gain=Factor(array, labels))


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
  in_spec, kernel_spec, out_spec = dimension_numbers
  out_dim, in_dim, *window = kernel_spec
  groups = feature_group_count
  names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
  options = {name: params[name] for name in names}

  def output(x, terms):
    out = call(x, w.base)
    for term in terms:
      wide = term.drop(w.input(x))
      kernel, mixer = sorted(term.factors, key=lambda f: out_dim in f.dims)
      if set(mixer.dims) != {out_dim} or out_dim in kernel.dims:
        raise Unsupported("a convolution with other output axes than its channels")
      a = kernel.along(tuple(RANK if d == out_dim else d for d in range(w.ndim)))
      sizes = [a.shape[out_dim] if d == out_dim else size for d, size in enumerate(w.shape)]
      a = jnp.broadcast_to(a.astype(wide.dtype), sizes)  # a kernel may be a matrix with added axes
      if groups > 1:  # every group of inputs meets the same `rank` kernels
        a = jnp.concatenate([a] * groups, axis=out_dim)
      z = lax.conv_general_dilated(
        wide,
        a,
        dimension_numbers=lax.ConvDimensionNumbers(*dimension_numbers),
        feature_group_count=groups,
        **options,
      )
      out = plus(
        out, _mix_channels(term.between(z, out_spec[1]), mixer, out_dim, out_spec[1], groups)
      )
    return out

  unshared = w.ndim  # the label of axes that the kernel does not have
  channels = in_dim if groups == 1 else unshared
  x_labels = tuple(channels if axis == in_spec[1] else unshared for axis in range(x.ndim))
  out_labels = tuple(out_dim if axis == out_spec[1] else unshared for axis in range(x.ndim))
  return w.consume(x, x_labels, out_labels, (in_dim, *window), (), output)


def _mix_channels(z, mixer: Factor, out_dim: int, channel: int, groups: int) -> jax.Array:
  """Multiplies the channels of z, (groups * rank), by B, (rank, groups * out)."""
  b = lax.transpose(mixer.array.astype(z.dtype), [mixer.axis(d) for d in (RANK, out_dim)])
  z = jnp.moveaxis(z, channel, -1)
  z = z.reshape(*z.shape[:-1], groups, -1)
  b = b.reshape(b.shape[0], groups, -1)
  out = jnp.einsum("...gr,rgo->...go", z, b)
  return jnp.moveaxis(out.reshape(*z.shape[:-2], -1), -1, channel)
