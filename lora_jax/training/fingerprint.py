"""A short name for the contents of a tree of arrays."""

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped, UInt32

from lora_jax.trees import leaves_with_path


def fingerprint(tree: PyTree) -> str:
  """Returns 16 hexadecimal digits that depend on every path, shape, dtype and bit of a tree.

  The sums are of integers, so that they do not depend on how the arrays are sharded, and they
  are made where the arrays lie. It finds damage and mistakes; it is no protection from malice.
  """
  leaves = leaves_with_path(tree)
  sums = jax.device_get(_all_sums([leaf for _, leaf in leaves]))
  digest = hashlib.sha256()
  for (path, leaf), pair in zip(leaves, sums, strict=True):
    digest.update(f"{path} {leaf.shape} {leaf.dtype} {pair.tolist()}\n".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _all_sums(arrays: list[jax.Array]) -> list[jax.Array]:
  return [_sums(x) for x in arrays]


def _sums(x: Shaped[Array, "..."]) -> UInt32[Array, " 2"]:
  """Returns two sums of the elements' bits, each weighted by the element's place."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  size = x.dtype.itemsize
  bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
  bits = bits.astype(jnp.uint32)
  place = jnp.zeros((), jnp.uint32)
  for axis, length in enumerate(bits.shape):
    place = place * length + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  weights = [place * jnp.uint32(factor) + jnp.uint32(1) for factor in (2654435762, 2246822520)]
  mixed = bits ^ (bits >> 15)
  return jnp.stack([jnp.sum((mixed + i) * w, dtype=jnp.uint32) for i, w in enumerate(weights)])
