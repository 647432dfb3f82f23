"""llama.cpp's formats with blocks of 256 values, most with small scales for 16 or 32 of them.

The ternary formats (TQ1_0, TQ2_0) have one scale. TQ1_0 packs five codes in a byte, as the base-3
digits of byte / 256.
"""

import jax
import jax.numpy as jnp

from lora_jax.quantization.bits import along, groups, lookup, pack_planes, planes, trailing
from lora_jax.quantization.format import Arrays, Format, Part
from lora_jax.quantization.ggml_blocks import (
  F16,
  NONLINEAR,
  blocks_of,
  bytes_,
  inverse,
  round_away,
  scale,
  values,
)


def _floats(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32)


def _rows(qs: jax.Array, size: int, width: int, *shape: int) -> jax.Array:
  """Unpacks bytes (..., n) in rows of `size`, all low codes of a row first, to (..., *shape)."""
  num_rows = qs.shape[-1] // size
  return trailing(planes(trailing(qs, 1, num_rows, size), width), 3, *shape)


def _q2_k(arrays: Arrays) -> jax.Array:
  low, high = (_floats(x) for x in (arrays["scales"] & 15, arrays["scales"] >> 4))
  codes = _rows(arrays["qs"], 32, 2, 16, 16)
  d, m = scale(arrays, "d") * low, scale(arrays, "dmin") * high
  return trailing(d[..., None] * _floats(codes) - m[..., None], 3)


def _q3_k(arrays: Arrays) -> jax.Array:
  low = trailing(planes(arrays["scales"][..., :8], 4), 2)
  high = trailing(planes(arrays["scales"][..., 8:], 2), 2)
  d = scale(arrays, "d") * (_floats(low | (high << 4)) - 32)
  high_bit = trailing(planes(arrays["hmask"], 1), 2, 16, 16)
  codes = _floats(_rows(arrays["qs"], 32, 2, 16, 16)) - 4 * (1 - _floats(high_bit))
  return trailing(d[..., None] * codes, 3)


def _six_bits(scales: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the 8 scales and 8 minima of 6 bits that 12 bytes hold, float32.

  The first 4 of each are the low bits of bytes 0-3 and 4-7, the last 4 have their low bits in
  bytes 8-11, their high ones in the high bits of bytes 0-7.
  """
  first, second, third = (scales[..., i : i + 4] for i in (0, 4, 8))
  d = jnp.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=-1)
  m = jnp.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=-1)
  return _floats(d), _floats(m)


def _with_six_bits(arrays: Arrays, codes: jax.Array) -> jax.Array:
  d, m = _six_bits(arrays["scales"])
  d, m = scale(arrays, "d") * d, scale(arrays, "dmin") * m
  return trailing(d[..., None] * _floats(codes) - m[..., None], 3)


def _q4_k(arrays: Arrays) -> jax.Array:
  return _with_six_bits(arrays, _rows(arrays["qs"], 32, 4, 8, 32))


def _q5_k(arrays: Arrays) -> jax.Array:
  return _with_six_bits(arrays, _rows(arrays["qs"], 32, 4, 8, 32) | (planes(arrays["qh"], 1) << 4))


def _q6_k(arrays: Arrays) -> jax.Array:
  low, high = _rows(arrays["ql"], 64, 4, 16, 16), _rows(arrays["qh"], 32, 2, 16, 16)
  d = scale(arrays, "d") * _floats(arrays["scales"])
  return trailing(d[..., None] * (_floats(low | (high << 4)) - 32), 3)


def _iq4_xs(arrays: Arrays) -> jax.Array:
  low = trailing(groups(arrays["scales_l"], 4, 2), 2)
  high = groups(arrays["scales_h"], 2, 8).astype(jnp.uint8)
  d = scale(arrays, "d") * (_floats(low | (high << 4)) - 32)
  codes = lookup(jnp.asarray(NONLINEAR, jnp.int8), _rows(arrays["qs"], 16, 4, 8, 32))
  return trailing(d[..., None] * _floats(codes), 3)


def _digits(packed: jax.Array, count: int) -> jax.Array:
  """Returns the first `count` digits in base 3 of each byte / 256, (..., n) to (..., count * n)."""
  packed = packed[..., None, :]
  remainder = packed * along(3 ** jnp.arange(count), packed, -2)  # modulo 256
  return trailing((remainder.astype(jnp.uint16) * 3) >> 8, 2)


def _tq1_0(arrays: Arrays) -> jax.Array:
  qs = arrays["qs"]
  digits = [_digits(qs[..., :32], 5), _digits(qs[..., 32:], 5), _digits(arrays["qh"], 4)]
  return values(scale(arrays, "d") * (_floats(jnp.concatenate(digits, axis=-1)) - 1))


def _tq2_0(arrays: Arrays) -> jax.Array:
  return values(scale(arrays, "d") * (_floats(_rows(arrays["qs"], 32, 2, 256)) - 1))


def _ternary(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the largest magnitude of each block, and codes 0, 1, 2 for minus it, 0 and it."""
  blocks = blocks_of(x, 256)
  d = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
  codes = round_away(blocks * inverse(d)) + 1
  return d[..., 0].astype(jnp.float16), codes.astype(jnp.uint8)


def _pack_digits(codes: jax.Array, count: int) -> jax.Array:
  """The inverse of `_digits`, (..., count * n) to (..., n): rounds up in units of 1/256."""
  digits = trailing(codes, 1, count, codes.shape[-1] // count).astype(jnp.uint16)
  powers = along(3 ** (4 - jnp.arange(count)), digits, -2)
  number = jnp.sum(digits * powers, axis=-2, dtype=jnp.uint16).astype(jnp.uint32)
  return ((number * 256 + 242) // 243).astype(jnp.uint8)


def _quantize_tq1_0(x: jax.Array) -> dict[str, jax.Array]:
  d, codes = _ternary(x)
  qs = [_pack_digits(codes[..., :160], 5), _pack_digits(codes[..., 160:240], 5)]
  qh = _pack_digits(codes[..., 240:], 4)
  return {"qs": jnp.concatenate(qs, axis=-1), "qh": qh, "d": d}


def _quantize_tq2_0(x: jax.Array) -> dict[str, jax.Array]:
  d, codes = _ternary(x)
  return {"qs": trailing(pack_planes(trailing(codes, 1, 2, 4, 32), 2), 2), "d": d}


Q2_K = Format("Q2_K", 256, {"scales": bytes_(16), "qs": bytes_(64), "d": F16, "dmin": F16}, _q2_k)
Q3_K = Format(
  "Q3_K", 256, {"hmask": bytes_(32), "qs": bytes_(64), "scales": bytes_(12), "d": F16}, _q3_k
)
Q4_K = Format("Q4_K", 256, {"d": F16, "dmin": F16, "scales": bytes_(12), "qs": bytes_(128)}, _q4_k)
Q5_K = Format(
  "Q5_K",
  256,
  {"d": F16, "dmin": F16, "scales": bytes_(12), "qh": bytes_(32), "qs": bytes_(128)},
  _q5_k,
)
Q6_K = Format(
  "Q6_K",
  256,
  {"ql": bytes_(128), "qh": bytes_(64), "scales": Part("int8", (16,)), "d": F16},
  _q6_k,
)
TQ1_0 = Format("TQ1_0", 256, {"qs": bytes_(48), "qh": bytes_(4), "d": F16}, _tq1_0, _quantize_tq1_0)
TQ2_0 = Format("TQ2_0", 256, {"qs": bytes_(64), "d": F16}, _tq2_0, _quantize_tq2_0)
IQ4_XS = Format(
  "IQ4_XS",
  256,
  {"d": F16, "scales_h": Part("uint16"), "scales_l": bytes_(4), "qs": bytes_(128)},
  _iq4_xs,
)
