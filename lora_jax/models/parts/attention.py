"""Causal attention with a short backward pass, and attention over a cache.

    P = exp(Q K^T / sqrt(H) - max) / sum          of the keys that a query sees
    O = P V

`jax.nn.dot_product_attention` computes the same. Its derivative, however, goes back through every
operation of the softmax, which on CPUs takes longer than the matmuls. Here, as in FlashAttention
(Dao et al. 2022, sec. 3 and app. B.2), sums over a row of P are taken from O, and a block of
queries is not multiplied with the keys that come after all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK_SIZE = 128
MAX_BLOCKS = 8  # each is compiled separately


@jax.custom_vjp
def causal_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  mask: Bool[Array, "#B 1 T S"] | None,
) -> Float[Array, "B T N H"]:
  """Returns the mean of the values, weighted by the causal softmax of `query key^T / sqrt(H)`.

  The softmax is computed in float32. N / K query heads share one head of the keys and values. There
  is only a reverse-mode derivative.

  Args:
    mask: True where a query may also see a key; each must see itself. None is everywhere. With
      fewer queries than keys, T < S, only the mask says what they see.
  """
  return _forward(query, key, value, mask)[0]


def _forward(query, key, value, mask):
  query, key, value = map(_swap_heads, (query, key, value))
  heads, groups = query.shape[1], key.shape[1]
  weights, totals, outs = [], [], []
  for start, stop, end in _blocks(query.shape[2], key.shape[2]):
    block = _regroup(query[:, :, start:stop], groups)
    logits = _regroup(_einsum("BKTH,BKSH->BKTS", block, key[:, :, :end]), heads)
    visible = None if mask is None else mask[:, :, start:stop, :end]
    if stop == end:
      causal = (jnp.arange(start, stop)[:, None] >= jnp.arange(end)[None])[None, None]
      visible = causal if visible is None else visible & causal
    assert visible is not None, "fewer queries than keys need a mask"
    logits = jnp.where(visible, logits * query.shape[-1] ** -0.5, -jnp.inf)
    unscaled = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    totals.append(unscaled.sum(axis=-1, keepdims=True))
    weights.append(unscaled.astype(value.dtype))
    shared = _regroup(weights[-1], groups)
    out = _regroup(_einsum("BKTS,BKSH->BKTH", shared, value[:, :, :end]), heads) / totals[-1]
    outs.append(out.astype(value.dtype))
  out = jnp.concatenate(outs, axis=2)
  return _swap_heads(out), (query, key, value, weights, totals, out)


def _backward(saved, gradient):
  query, key, value, all_weights, totals, out = saved
  heads, groups = query.shape[1], key.shape[1]
  gradient, (length, num_keys) = _swap_heads(gradient), (query.shape[2], key.shape[2])
  to_query, to_key, to_value = [], [], []
  blocks = _blocks(length, num_keys)
  for (start, stop, end), weights, total in zip(blocks, all_weights, totals, strict=True):
    block = gradient[:, :, start:stop] / total
    mean = jnp.sum(block * out[:, :, start:stop], axis=-1, keepdims=True)  # of a row, weighted by P
    block = _regroup(block.astype(value.dtype), groups)
    to_logits = _regroup(_einsum("BKTH,BKSH->BKTS", block, value[:, :, :end]), heads) - mean
    to_logits = (weights * to_logits * query.shape[-1] ** -0.5).astype(query.dtype)
    to_logits, weights = _regroup(to_logits, groups), _regroup(weights, groups)
    to_query.append(_regroup(_einsum("BKTS,BKSH->BKTH", to_logits, key[:, :, :end]), heads))
    rest = ((0, 0), (0, 0), (0, num_keys - end), (0, 0))
    block_query = _regroup(query[:, :, start:stop], groups)
    to_key.append(jnp.pad(_einsum("BKTS,BKTH->BKSH", to_logits, block_query), rest))
    to_value.append(jnp.pad(_einsum("BKTS,BKTH->BKSH", weights, block), rest))
  gradients = (jnp.concatenate(to_query, axis=2), *map(_sum, (to_key, to_value)))
  return (*(_swap_heads(x.astype(query.dtype)) for x in gradients), None)


def _regroup(x: Float[Array, "B N T H"], heads: int) -> Float[Array, "B K X H"]:
  """Returns `x` with another number of heads: heads that share keys become tokens of one head.

  The matmuls are larger and fewer, and neither keys and values nor their gradients are repeated.
  """
  return x.reshape(x.shape[0], heads, x.shape[1] * x.shape[2] // heads, x.shape[3])


def _blocks(length: int, num_keys: int) -> list[tuple[int, int, int]]:
  """Returns the blocks of queries: start, stop, and the end of their keys."""
  if length < num_keys:
    return [(0, length, num_keys)]
  size = max(BLOCK_SIZE, -(-length // MAX_BLOCKS))
  stops = (min(start + size, length) for start in range(0, length, size))
  return [(start, stop, stop) for start, stop in zip(range(0, length, size), stops, strict=True)]


def _sum(parts: list[Array]) -> Array:
  return sum(parts[1:], parts[0])


def _einsum(axes: str, x: Array, y: Array) -> Array:
  return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _swap_heads(x: Array) -> Array:
  """Swaps the axes of tokens and heads.

  The barrier keeps XLA from moving the transpose into a matmul, which is slow on CPUs.
  """
  return jax.lax.optimization_barrier(x.swapaxes(1, 2))


causal_attention.defvjp(_forward, _backward)


def write_cache(
  cache: tuple[Float[Array, "B N H S"], Float[Array, "B N S H"]],
  key: Float[Array, "B T N H"],
  value: Float[Array, "B T N H"],
  index: Int[Array, ""] | int,
) -> tuple[Float[Array, "B N H S"], Float[Array, "B N S H"]]:
  """Writes the keys and values of new tokens into the slots starting at `index`."""
  keys, values = cache
  key = key.transpose(0, 2, 3, 1).astype(keys.dtype)
  value = value.transpose(0, 2, 1, 3).astype(values.dtype)
  return _write_key(keys, key, index), _write_value(values, value, index)


def _slot_writer(axis: int) -> Callable[[Array, Array, Int[Array, ""] | int], Array]:
  """Returns `lax.dynamic_update_slice_in_dim` along an axis, which `vmap` leaves in place.

  Mapped over rows, JAX would make it a scatter, and XLA on CPUs copies the cache for each. Here the
  axis of rows is joined with the inputs'.
  """

  def plain(cache: Array, tokens: Array, index: Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, tokens, index, axis)

  def mapped(rows: int, is_mapped: list[bool], cache: Array, tokens: Array, index: Any) -> Any:
    if is_mapped != [True, True, False]:
      return jax.vmap(plain, [0 if each else None for each in is_mapped])(
        cache, tokens, index
      ), True
    joined, written = (x.reshape(-1, *x.shape[2:]) for x in (cache, tokens))
    return write(joined, written, index).reshape(cache.shape), True

  inner = jax.custom_batching.custom_vmap(plain)
  inner.def_vmap(mapped)
  write = jax.custom_vjp(inner)
  write.defvjp(lambda *args: jax.vjp(plain, *args), lambda pullback, gradient: pullback(gradient))
  return write


_write_key, _write_value = _slot_writer(axis=3), _slot_writer(axis=2)


def cached_attention(
  query: Float[Array, "B T N H"],
  keys: Float[Array, "B K H S"],
  values: Float[Array, "B K S H"],
  mask: Bool[Array, "#B 1 T S"],
) -> Float[Array, "B T N H"]:
  """Returns the attention of new tokens over a cache, softmax in float32.

  N / K query heads share one head of the cache. Both matmuls use the keys and values in the
  cache's own layout, row-major: any other is several times slower with XLA on CPUs.

  Args:
    mask: True where a query sees a slot.
  """
  (batch, length, heads, size), groups = query.shape, keys.shape[1]
  if heads != groups:  # heads that share keys become tokens of one head
    query = query.reshape(batch, length, groups, -1, size).swapaxes(2, 3)
    out = cached_attention(
      query.reshape(batch, -1, groups, size), keys, values, jnp.repeat(mask, heads // groups, 2)
    )
    out = out.reshape(batch, length, -1, groups, size).swapaxes(2, 3)
    return out.reshape(batch, length, heads, size)
  logits = jnp.einsum("BTNH,BNHS->BNTS", query, keys, preferred_element_type=jnp.float32)
  logits = jnp.where(mask, logits * size**-0.5, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
  return _swap_heads(jnp.einsum("BNTS,BNSH->BNTH", weights, values))
