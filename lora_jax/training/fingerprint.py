"""A short name for the contents of a tree of arrays."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped, UInt32

from lora_jax.quantization.leaf import is_quantized
from lora_jax.trees import leaves_with_path, weights_with_path


def fingerprint(tree: PyTree) -> str:
  """Returns 16 hexadecimal digits that depend on every path, shape, dtype and bit of a tree.

  That of quantized weights depends on their format, too.

  It does not depend on how the arrays are sharded: the sums are of integers, made on the devices
  that hold the arrays. It finds damage and mistakes; it does not protect against malice.

  Raises:
    ValueError: if a leaf is neither an array nor a number.
  """
  leaves = [(path, _as_array(path, leaf)) for path, leaf in leaves_with_path(tree)]
  sums = jax.device_get(_all_sums([leaf for _, leaf in leaves]))
  digest = hashlib.sha256()
  for (path, leaf), pair in zip(leaves, sums, strict=True):
    digest.update(f"{path} {leaf.shape} {leaf.dtype} {pair.tolist()}\n".encode())
  for path, leaf in weights_with_path(tree):
    if is_quantized(leaf):  # its codes mean other weights in another format
      digest.update(f"{path} {leaf.format} {leaf.axis} {leaf.dtype}\n".encode())
  return digest.hexdigest()[:16]


def _as_array(path: str, leaf: Any) -> jax.Array:
  try:
    return jnp.asarray(leaf)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f"{path}: expected an array or a number, got {leaf!r:.100}") from error


@jax.jit
def _all_sums(arrays: list[jax.Array]) -> list[jax.Array]:
  return [_sums(x) for x in arrays]


def _sums(x: Shaped[Array, "..."]) -> UInt32[Array, " 2"]:
  """Returns two sums of the elements' bits, each weighted by the element's position."""
  bits = _bits(x)
  place = jnp.zeros((), jnp.uint32)
  for axis, length in enumerate(bits.shape):
    place = place * length + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  weights = [place * jnp.uint32(factor) + jnp.uint32(1) for factor in (2654435762, 2246822520)]
  mixed = bits ^ (bits >> 15)
  return jnp.stack([jnp.sum((mixed + i) * w, dtype=jnp.uint32) for i, w in enumerate(weights)])


def _bits(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
  """Returns the bits of each element; elements of 64 bits or more get a last axis."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    x = jnp.stack([x.real, x.imag], axis=-1)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  size = jax.dtypes.itemsize_bits(x.dtype)
  integers = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}
  return jax.lax.bitcast_convert_type(x, integers.get(size, jnp.uint32)).astype(jnp.uint32)
