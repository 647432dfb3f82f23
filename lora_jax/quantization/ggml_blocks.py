"""llama.cpp's formats with one scale for each block of 32 values, or of 16 (NVFP4)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.quantization.bits import (
  along,
  groups,
  lookup,
  pack_groups,
  pack_planes,
  planes,
  trailing,
)
from lora_jax.quantization.format import Arrays, Format, Part

F16 = Part("float16")
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FLOAT4_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # the magnitudes, doubled; the fourth bit is the sign


Codes = Callable[[Arrays], jax.Array]


def bytes_(count: int) -> Part:
  return Part("uint8", (count,))


def scale(arrays: Arrays, name: str) -> jax.Array:
  """Returns an array of one number per block as float32, with an axis for the block's values."""
  return arrays[name].astype(jnp.float32)[..., None]


def values(blocks: jax.Array) -> jax.Array:
  """Joins the blocks and the values of each."""
  return trailing(blocks, 2)


def codes4(qs: jax.Array) -> jax.Array:
  """Returns 4-bit codes, (..., 16) to (..., 32)."""
  return trailing(planes(qs, 4), 2)


def codes5(arrays: Arrays) -> jax.Array:
  """Returns 5-bit codes, (..., 32): four bits of `qs`, the fifth of `qh`."""
  return codes4(arrays["qs"]) | (trailing(groups(arrays["qh"], 1, 8), 2) << 4)


def _pack4(codes: jax.Array) -> jax.Array:
  return pack_planes(trailing(codes & 15, 1, 2, 16), 4)


def _pack5(codes: jax.Array) -> dict[str, jax.Array]:
  return {"qh": pack_groups(trailing(codes >> 4, 1, 4, 8), 1), "qs": _pack4(codes)}


def _symmetric(offset: int, codes: Codes) -> Codes:
  def dequantize(arrays: Arrays) -> jax.Array:
    return values(scale(arrays, "d") * (codes(arrays).astype(jnp.float32) - offset))

  return dequantize


def with_minimum(codes: Codes) -> Codes:
  def dequantize(arrays: Arrays) -> jax.Array:
    return values(scale(arrays, "d") * codes(arrays).astype(jnp.float32) + scale(arrays, "m"))

  return dequantize


def blocks_of(x: jax.Array, size: int) -> jax.Array:
  return trailing(x, 1, x.shape[-1] // size, size)


def divided(x: jax.Array, divisor: float) -> jax.Array:
  """Returns x / divisor, rounded once.

  By a constant XLA would multiply by its reciprocal; the divisor is 1 where x is 0.
  """
  return x / jnp.where(x == 0, 1.0, divisor)


def inverse(d: jax.Array) -> jax.Array:
  """Returns 1 / d, and 0 for 0."""
  return jnp.where(d == 0, 0.0, 1 / jnp.where(d == 0, 1.0, d))


def rounded(x: jax.Array, steps: jax.Array, offset: float) -> jax.Array:
  """Returns the whole part of `x * steps + offset`, for products between -256 and 256.

  The minimum, which changes nothing, keeps the product from being fused with the sum, which would
  be rounded once instead of twice.
  """
  return jnp.trunc(jnp.minimum(x * steps, 256.0) + offset)


def round_away(x: jax.Array) -> jax.Array:
  """Rounds to the nearest integer, halves away from 0."""
  magnitude = jnp.abs(x)
  whole = jnp.floor(magnitude)
  return jnp.sign(x) * (whole + jnp.floor(2 * (magnitude - whole)))


def _quantize_symmetric(x: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
  """Returns scales and codes: -half is the value of the largest magnitude."""
  blocks = blocks_of(x, 32)
  place = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
  d = jnp.take_along_axis(blocks, place, axis=-1) / -half
  codes = jnp.clip(rounded(blocks, inverse(d), half + 0.5), 0, 2 * half - 1)
  return d[..., 0].astype(jnp.float16), codes.astype(jnp.uint8)


def quantize_with_minimum(x: jax.Array, largest: int) -> tuple[dict[str, jax.Array], jax.Array]:
  """Returns scales and minima, and codes: 0 is the minimum, `largest` the maximum."""
  blocks = blocks_of(x, 32)
  low = jnp.min(blocks, axis=-1, keepdims=True)
  d = divided(jnp.max(blocks, axis=-1, keepdims=True) - low, largest)
  codes = jnp.clip(rounded(blocks - low, inverse(d), 0.5), 0, largest)
  scales = {"d": d[..., 0].astype(jnp.float16), "m": low[..., 0].astype(jnp.float16)}
  return scales, codes.astype(jnp.uint8)


def _quantize_q4_0(x: jax.Array) -> dict[str, jax.Array]:
  d, codes = _quantize_symmetric(x, 8)
  return {"d": d, "qs": _pack4(codes)}


def _quantize_q5_0(x: jax.Array) -> dict[str, jax.Array]:
  d, codes = _quantize_symmetric(x, 16)
  return {"d": d, **_pack5(codes)}


def _quantize_q4_1(x: jax.Array) -> dict[str, jax.Array]:
  scales, codes = quantize_with_minimum(x, 15)
  return {**scales, "qs": _pack4(codes)}


def _quantize_q5_1(x: jax.Array) -> dict[str, jax.Array]:
  scales, codes = quantize_with_minimum(x, 31)
  return {**scales, **_pack5(codes)}


def _quantize_q8_0(x: jax.Array) -> dict[str, jax.Array]:
  blocks = blocks_of(x, 32)
  d = divided(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), 127.0)
  codes = round_away(jnp.clip(blocks * inverse(d), -128, 127)).astype(jnp.int8)
  return {"d": d[..., 0].astype(jnp.float16), "qs": codes}


def _float4() -> jax.Array:
  """Returns the sixteen values of a 4-bit float (E2M1), doubled."""
  return jnp.asarray((*FLOAT4_E2M1, *(-magnitude for magnitude in FLOAT4_E2M1)), jnp.int8)


def _power_of_two(exponent: jax.Array) -> jax.Array:
  """Returns 2**(exponent - 127) for exponents of 1 to 254, exactly."""
  return lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


def _mxfp4_scale(e: jax.Array) -> jax.Array:
  """Returns 2**(e - 128): half of a scale of eight exponent bits (E8M0)."""
  wide = e.astype(jnp.uint32)
  small = jnp.uint32(0x200000) << jnp.minimum(wide, 1)
  return lax.bitcast_convert_type(jnp.where(wide < 2, small, (wide - 1) << 23), jnp.float32)


def _floor_log2(x: jax.Array) -> jax.Array:
  """Returns the whole part of log2(x) in float32, rounded up just below a power of two."""
  mantissa, exponent = jnp.frexp(x)
  exponent = exponent.astype(jnp.float32)
  return exponent - (exponent + jnp.log1p(mantissa - 1) / math.log(2) < exponent)


def _quantize_mxfp4(x: jax.Array) -> dict[str, jax.Array]:
  """Rounds to the nearest of 15 values; the largest magnitude of a block is 4 to 8 times 1."""
  blocks = blocks_of(x, 32)
  largest = jnp.max(jnp.abs(blocks), axis=-1)
  e = jnp.where(largest > 0, _floor_log2(largest) - 2 + 127, 0).astype(jnp.uint8)
  levels = along(_float4().astype(jnp.float32), blocks, -1) * _mxfp4_scale(e)[..., None]
  distances = jnp.abs(levels[..., None, :] - blocks[..., None])
  return {"e": e, "qs": _pack4(jnp.argmin(distances, axis=-1).astype(jnp.uint8))}


def _mxfp4(arrays: Arrays) -> jax.Array:
  codes = lookup(_float4(), codes4(arrays["qs"])).astype(jnp.float32)
  return values(_mxfp4_scale(arrays["e"])[..., None] * codes)


def _nvfp4(arrays: Arrays) -> jax.Array:
  """Each 16 of the 64 values have a scale of 4 exponent and 3 mantissa bits (E4M3), halved."""
  d = arrays["d"]
  exponent = (d >> 3) & 15
  mantissa = (d & 7) + jnp.where(exponent == 0, 0, 8).astype(jnp.uint8)
  # The mantissa has three bits after the point; the exponent is biased by 7, or 1 where it is 0.
  power = _power_of_two(jnp.maximum(exponent, 1) + (127 - 7 - 3 - 1))
  scales = jnp.where((d == 0) | (d == 127), 0.0, mantissa.astype(jnp.float32) * power)
  codes = lookup(_float4(), trailing(planes(trailing(arrays["qs"], 1, 4, 8), 4), 2))
  return trailing(scales[..., None] * codes.astype(jnp.float32), 3)


def _iq4_nl(arrays: Arrays) -> jax.Array:
  codes = lookup(jnp.asarray(NONLINEAR, jnp.int8), codes4(arrays["qs"]))
  return values(scale(arrays, "d") * codes.astype(jnp.float32))


def _four_bits(arrays: Arrays) -> jax.Array:
  return codes4(arrays["qs"])


def _eight_bits(arrays: Arrays) -> jax.Array:
  return arrays["qs"]


Q4_0 = Format("Q4_0", 32, {"d": F16, "qs": bytes_(16)}, _symmetric(8, _four_bits), _quantize_q4_0)
Q4_1 = Format(
  "Q4_1", 32, {"d": F16, "m": F16, "qs": bytes_(16)}, with_minimum(_four_bits), _quantize_q4_1
)
Q5_0 = Format(
  "Q5_0", 32, {"d": F16, "qh": bytes_(4), "qs": bytes_(16)}, _symmetric(16, codes5), _quantize_q5_0
)
Q5_1 = Format(
  "Q5_1",
  32,
  {"d": F16, "m": F16, "qh": bytes_(4), "qs": bytes_(16)},
  with_minimum(codes5),
  _quantize_q5_1,
)
Q8_0 = Format(
  "Q8_0", 32, {"d": F16, "qs": Part("int8", (32,))}, _symmetric(0, _eight_bits), _quantize_q8_0
)
IQ4_NL = Format("IQ4_NL", 32, {"d": F16, "qs": bytes_(16)}, _iq4_nl)
MXFP4 = Format("MXFP4", 32, {"e": Part("uint8"), "qs": bytes_(16)}, _mxfp4, _quantize_mxfp4)
NVFP4 = Format("NVFP4", 64, {"d": bytes_(4), "qs": bytes_(32)}, _nvfp4)
