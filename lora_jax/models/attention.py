"""Attention: causal within a sequence, with a short backward pass, and over a cache.

    P = exp(Q K^T / sqrt(H) - max) / sum          of the keys that a query sees
    O = P V

`jax.nn.dot_product_attention` is the same in one call. Its derivative, however, goes back through
every operation of the softmax, which on CPUs takes longer than the products. Here, as in
FlashAttention (Dao et al. 2022, sec. 3 and app. B.2), sums over a row of P are taken from O.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.custom_vjp
def causal_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T N H"],
  value: Float[Array, "B T N H"],
  mask: Bool[Array, "#B 1 T T"] | None,
) -> Float[Array, "B T N H"]:
  """Returns the values' mean by the softmax of `query key^T / sqrt(H)`, over keys up to itself.

  The softmax is computed in float32. It has a reverse derivative only.

  Args:
    mask: True where a query also may see a key; each must see itself. None is everywhere.
  """
  return _forward(query, key, value, mask)[0]


def _forward(query, key, value, mask):
  length, width = query.shape[1], query.shape[-1]
  logits = _product("BTNH,BSNH->BNTS", query, key) * width**-0.5
  seen = jnp.tril(jnp.ones((1, 1, length, length), bool))
  seen = seen if mask is None else seen & mask
  logits = jnp.where(seen, logits, -jnp.inf)
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  total = jnp.moveaxis(weights.sum(axis=-1), 1, 2)[..., None]  # B T N 1
  weights = weights.astype(value.dtype)
  out = (_product("BNTS,BSNH->BTNH", weights, value) / total).astype(value.dtype)
  return out, (query, key, value, weights, total, out)


def _backward(saved, gradient):
  query, key, value, weights, total, out = saved
  gradient = gradient / total
  mean = jnp.sum(gradient * out, axis=-1)  # of a row's gradients, by P
  gradient = gradient.astype(value.dtype)
  to_logits = _product("BTNH,BSNH->BNTS", gradient, value) - jnp.moveaxis(mean, 1, 2)[..., None]
  to_logits = (weights * to_logits * query.shape[-1] ** -0.5).astype(query.dtype)
  to_query = _product("BNTS,BSNH->BTNH", to_logits, key)
  to_key = _product("BNTS,BTNH->BSNH", to_logits, query)
  to_value = _product("BNTS,BTNH->BSNH", weights, gradient)
  return (*(x.astype(query.dtype) for x in (to_query, to_key, to_value)), None)


def _product(axes: str, x: Array, y: Array) -> Array:
  return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


causal_attention.defvjp(_forward, _backward)


def write_cache(
  cache: tuple[Float[Array, "B N H S"], Float[Array, "B N S H"]],
  key: Float[Array, "B T N H"],
  value: Float[Array, "B T N H"],
  index: Int[Array, ""] | int,
) -> tuple[Float[Array, "B N H S"], Float[Array, "B N S H"]]:
  """Writes the keys and values of new tokens into the slots from `index` on."""
  keys, values = cache
  key = key.transpose(0, 2, 3, 1).astype(keys.dtype)
  value = value.transpose(0, 2, 1, 3).astype(values.dtype)
  return (
    jax.lax.dynamic_update_slice_in_dim(keys, key, index, axis=3),
    jax.lax.dynamic_update_slice_in_dim(values, value, index, axis=2),
  )


def cached_attention(
  query: Float[Array, "B T N H"],
  keys: Float[Array, "B N H S"],
  values: Float[Array, "B N S H"],
  mask: Bool[Array, "#B 1 T S"],
) -> Float[Array, "B T N H"]:
  """Returns the attention of new tokens over a cache, softmax in float32.

  Both products are plain ones of row-major matrices as the keys and values stand in the cache:
  XLA on CPUs is several times slower otherwise.

  Args:
    mask: True where a query sees a slot.
  """
  logits = jnp.einsum("BTNH,BNHS->BNTS", query, keys, preferred_element_type=jnp.float32)
  logits = jnp.where(mask, logits * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
  out = jnp.einsum("BNTS,BNSH->BNTH", weights, values)
  return jax.lax.optimization_barrier(out).swapaxes(1, 2)  # else XLA moves it into the product
