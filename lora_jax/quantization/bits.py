"""Codes of a few bits, packed in integers of 8 to 32 bits."""

import math

import jax
import jax.numpy as jnp


def planes(packed: jax.Array, width: int) -> jax.Array:
  """Unpacks codes of `width` bits, (..., n) to (..., 8 / width, n), the low bits first."""
  return _unpacked(packed[..., None, :], width, 8 // width, -2)


def groups(packed: jax.Array, width: int, count: int) -> jax.Array:
  """Unpacks `count` codes of `width` bits of each integer, (..., n) to (..., n, count)."""
  return _unpacked(packed[..., None], width, count, -1)


def _unpacked(packed: jax.Array, width: int, count: int, axis: int) -> jax.Array:
  return (packed >> (along(jnp.arange(count), packed, axis) * width)) & (2**width - 1)


def along(numbers: jax.Array, like: jax.Array, axis: int) -> jax.Array:
  """Returns a vector as an array of the rank and dtype of `like`, along its `axis`, negative."""
  shape = [1] * like.ndim
  shape[axis] = numbers.size
  return numbers.astype(like.dtype).reshape(shape)


def pack_planes(codes: jax.Array, width: int) -> jax.Array:
  """Packs codes (..., 8 / width, n) to uint8 (..., n); the inverse of `planes`."""
  return _packed(codes, width, -2)


def pack_groups(codes: jax.Array, width: int) -> jax.Array:
  """Packs codes (..., n, count) to uint8 (..., n); the inverse of `groups`."""
  return _packed(codes, width, -1)


def _packed(codes: jax.Array, width: int, axis: int) -> jax.Array:
  moved = jnp.moveaxis(codes.astype(jnp.uint8), axis, 0)
  packed = moved[0]
  for i, plane in enumerate(moved[1:], 1):
    packed = packed | (plane << (i * width))
  return packed


def trailing(x: jax.Array, num_axes: int, *shape: int) -> jax.Array:
  """Reshapes the last `num_axes` axes; without a shape, joins them into one."""
  kept = x.shape[: x.ndim - num_axes]
  return x.reshape(*kept, *(shape or (math.prod(x.shape[x.ndim - num_axes :]),)))


def lookup(table: jax.Array, codes: jax.Array) -> jax.Array:
  """Returns `table[codes]`; every code must have an entry."""
  return table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
