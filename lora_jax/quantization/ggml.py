"""llama.cpp's block formats, as GGUF files store them; the reference is the package `gguf`.

The bytes of a block are split into arrays, one for each field of the C struct, so that scales,
minima and codes are aligned; together they have the size of the file's blocks.
"""

import jax
import jax.numpy as jnp

from lora_jax.quantization.format import Arrays, Format, Part


def _halves(codes: jax.Array) -> jax.Array:
  """Returns 4-bit codes (..., 16) as (..., 32): the low ones first, then the high ones."""
  return jnp.concatenate([codes & 15, codes >> 4], axis=-1)


def _values(blocks: jax.Array) -> jax.Array:
  return blocks.reshape(*blocks.shape[:-2], -1)


def _q4_1(arrays: Arrays) -> jax.Array:
  """w = d * q + m."""
  d, m = (arrays[name].astype(jnp.float32)[..., None] for name in ("d", "m"))
  return _values(d * _halves(arrays["qs"]).astype(jnp.float32) + m)


Q4_1 = Format(
  "Q4_1",
  32,
  {"d": Part("float16"), "m": Part("float16"), "qs": Part("uint8", (16,))},
  _q4_1,
)
GGML = (Q4_1,)
