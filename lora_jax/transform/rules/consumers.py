"""Consumers: products and convolutions, where the weight meets the layer's input."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform.factored import RANK, Factor, Factored, Unsupported
from lora_jax.transform.products import plus


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
    z = jnp.moveaxis(term.drop(w.input(x)), contracting[0][0], -1)
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
  x = w.input(x)
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
    out = plus(out, _mix_channels(term.scaled(z), mixer, out_dim, out_spec[1], groups))
  return out


def _mix_channels(z, mixer: Factor, out_dim: int, channel: int, groups: int) -> jax.Array:
  """Multiplies the channels of z, (groups * rank), by B, (rank, groups * out)."""
  b = lax.transpose(mixer.array.astype(z.dtype), [mixer.axis(d) for d in (RANK, out_dim)])
  z = jnp.moveaxis(z, channel, -1)
  z = z.reshape(*z.shape[:-1], groups, -1)
  b = b.reshape(b.shape[0], groups, -1)
  out = jnp.einsum("...gr,rgo->...go", z, b)
  return jnp.moveaxis(out.reshape(*z.shape[:-2], -1), -1, channel)
