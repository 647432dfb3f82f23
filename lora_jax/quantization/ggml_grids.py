"""llama.cpp's formats of 1 to 3 bits: codes are indices of a grid of 4 or 8 values.

The grids are tables in the package `gguf`, read when one of these formats is first dequantized.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.extras import require
from lora_jax.quantization.bits import along, groups, lookup, trailing
from lora_jax.quantization.format import Arrays, Format, Part
from lora_jax.quantization.ggml_blocks import F16, bytes_, scale


@functools.cache
def _grid(name: str) -> np.ndarray:
  """Returns the grid of a format, int8 (number of codes, 4 or 8)."""
  require("gguf")
  from gguf import quants

  table = getattr(quants, name)
  table.init_grid()
  grid = table.grid
  return grid.reshape(grid.shape[-2:]).astype(np.int8)


def _grid_values(name: str, codes: jax.Array) -> jax.Array:
  """Returns the values of codes (..., n), float32 (..., n, 4 or 8)."""
  return lookup(jnp.asarray(_grid(name)), codes).astype(jnp.float32)


def _signs(bits: jax.Array) -> jax.Array:
  """Returns -1 for each bit that is set and 1 for the others, (..., n) to (..., 8 n)."""
  return 1.0 - 2.0 * trailing(groups(bits, 1, 8), 2).astype(jnp.float32)


def _seven_signs(words: jax.Array) -> jax.Array:
  """Returns the signs of 7-bit codes; the eighth makes the number of minus signs even."""
  return _signs(words | ((lax.population_count(words) & 1) << 7))


def _scaled(d: jax.Array, grid: jax.Array, signs: jax.Array | float = 1.0) -> jax.Array:
  """Multiplies a block's values (..., n) by scales (..., k), each for n / k of them, and signs."""
  flat = trailing(grid, 2) * signs
  blocks = d[..., None] * trailing(flat, 1, d.shape[-1], flat.shape[-1] // d.shape[-1])
  return trailing(blocks, 3)


def _nibbles(scales: jax.Array) -> jax.Array:
  return trailing(groups(scales, 4, 2), 2).astype(jnp.float32)


def _high(qs: jax.Array, bits: jax.Array) -> jax.Array:
  """Returns codes of more than 8 bits: the low ones, and those above."""
  return qs.astype(jnp.uint16) | (bits.astype(jnp.uint16) << 8)


def _iq2_xxs(arrays: Arrays) -> jax.Array:
  codes, words = arrays["qs"][..., 0], arrays["qs"][..., 1]
  d = scale(arrays, "d") * (0.5 + (words >> 28).astype(jnp.float32)) * 0.25
  signs = _seven_signs(trailing(groups(words, 7, 4), 2))
  return _scaled(d, _grid_values("IQ2_XXS", trailing(groups(codes, 8, 4), 2)), signs)


def _iq2_xs(arrays: Arrays) -> jax.Array:
  d = scale(arrays, "d") * (0.5 + _nibbles(arrays["scales"])) * 0.25
  qs = arrays["qs"]
  return _scaled(d, _grid_values("IQ2_XS", qs & 511), _seven_signs(qs >> 9))


def _iq2_s(arrays: Arrays) -> jax.Array:
  d = scale(arrays, "d") * (0.5 + _nibbles(arrays["scales"])) * 0.25
  codes = _high(arrays["qs"], trailing(groups(arrays["qh"], 2, 4), 2))
  return _scaled(d, _grid_values("IQ2_S", codes), _signs(arrays["signs"]))


def _iq3_xxs(arrays: Arrays) -> jax.Array:
  words = arrays["scales"]
  d = scale(arrays, "d") * (0.5 + (words >> 28).astype(jnp.float32)) * 0.5
  signs = _seven_signs(trailing(groups(words, 7, 4), 2))
  return _scaled(d, _grid_values("IQ3_XXS", arrays["qs"]), signs)


def _iq3_s(arrays: Arrays) -> jax.Array:
  d = scale(arrays, "d") * (1 + 2 * _nibbles(arrays["scales"]))
  codes = _high(arrays["qs"], trailing(groups(arrays["qh"], 1, 8), 2))
  return _scaled(d, _grid_values("IQ3_S", codes), _signs(arrays["signs"]))


def _shifted(grid: jax.Array, is_minus: jax.Array) -> jax.Array:
  """Adds 1/8 or -1/8 to the values of a grid (..., n, 8), by bits (..., n)."""
  return grid + jnp.where(is_minus == 0, 0.125, -0.125)[..., None]


def _iq1_s(arrays: Arrays) -> jax.Array:
  qh = arrays["qh"]
  d = scale(arrays, "d") * (2 * ((qh >> 12) & 7) + 1).astype(jnp.float32)
  codes = _high(arrays["qs"], trailing(groups(qh, 3, 4), 2))
  is_minus = jnp.repeat(qh >> 15, 4, axis=-1)
  return _scaled(d, _shifted(_grid_values("IQ1_S", codes), is_minus))


def _iq1_m(arrays: Arrays) -> jax.Array:
  """The top four bits of the four words of scales are the float16 scale of all."""
  words = arrays["scales"]
  digits = (words >> 12).astype(jnp.uint16) << along(4 * jnp.arange(4), words, -1)
  bits = jnp.sum(digits, axis=-1, dtype=jnp.uint16)
  d = lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)[..., None]
  d = d * (2 * trailing(groups(words, 3, 4), 2) + 1).astype(jnp.float32)
  high = trailing(groups(arrays["qh"], 4, 2), 2)
  grid = _grid_values("IQ1_M", _high(arrays["qs"], high & 7))
  return _scaled(d, _shifted(grid, high & 8))


IQ2_XXS = Format("IQ2_XXS", 256, {"d": F16, "qs": Part("uint32", (8, 2))}, _iq2_xxs)
IQ2_XS = Format(
  "IQ2_XS", 256, {"d": F16, "qs": Part("uint16", (32,)), "scales": bytes_(8)}, _iq2_xs
)
IQ2_S = Format(
  "IQ2_S",
  256,
  {"d": F16, "qs": bytes_(32), "signs": bytes_(32), "qh": bytes_(8), "scales": bytes_(8)},
  _iq2_s,
)
IQ3_XXS = Format(
  "IQ3_XXS", 256, {"d": F16, "qs": bytes_(64), "scales": Part("uint32", (8,))}, _iq3_xxs
)
IQ3_S = Format(
  "IQ3_S",
  256,
  {"d": F16, "qs": bytes_(64), "qh": bytes_(8), "signs": bytes_(32), "scales": bytes_(4)},
  _iq3_s,
)
IQ1_S = Format("IQ1_S", 256, {"d": F16, "qs": bytes_(32), "qh": Part("uint16", (8,))}, _iq1_s)
IQ1_M = Format(
  "IQ1_M", 256, {"qs": bytes_(32), "qh": bytes_(16), "scales": Part("uint16", (4,))}, _iq1_m
)
