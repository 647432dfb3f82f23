"""Eight bits and one scale per output channel: w = scale * codes (LLM.int8, arXiv 2208.07339)."""

import jax
import jax.numpy as jnp

from lora_jax.quantization.format import Arrays, Format, Part


def dequantize(arrays: Arrays) -> jax.Array:
  """Returns `codes` (..., n) times `scale` (...), float32."""
  return arrays["codes"].astype(jnp.float32) * arrays["scale"][..., None]


def quantize(values: jax.Array) -> dict[str, jax.Array]:
  """Rounds values (..., n) to 255 steps between minus and plus their largest magnitude."""
  largest = jnp.max(jnp.abs(values), axis=-1)
  scale = jnp.where(largest == 0, 1.0, largest / 127.0)
  return {"codes": jnp.round(values / scale[..., None]).astype(jnp.int8), "scale": scale}


INT8 = Format("int8", None, {"codes": Part("int8"), "scale": Part("float32")}, dequantize, quantize)
