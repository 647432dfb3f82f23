"""Blocks of 32 values rounded to the nearest of 8 or 4 steps: w = d * code + m.

d and m, the minimum, are float16, so a weight takes 4 bits (`rtn3`) or 3 (`rtn2`) in all. GGUF
files do not have these formats: they follow Q4_1's rule with fewer bits, for comparison.
"""

import jax

from lora_jax.quantization.bits import groups, pack_groups, pack_planes, planes, trailing
from lora_jax.quantization.format import Arrays, Format, Part
from lora_jax.quantization.ggml_blocks import F16, quantize_with_minimum, with_minimum


def _codes2(arrays: Arrays) -> jax.Array:
  return trailing(planes(arrays["qs"], 2), 2)


def _codes3(arrays: Arrays) -> jax.Array:
  """Returns 3-bit codes; the third bits are in `qh`."""
  return _codes2(arrays) | (trailing(groups(arrays["qh"], 1, 8), 2) << 2)


def _pack2(codes: jax.Array) -> jax.Array:
  return pack_planes(trailing(codes & 3, 1, 4, 8), 2)


def _quantize2(x: jax.Array) -> dict[str, jax.Array]:
  scales, codes = quantize_with_minimum(x, 3)
  return {**scales, "qs": _pack2(codes)}


def _quantize3(x: jax.Array) -> dict[str, jax.Array]:
  scales, codes = quantize_with_minimum(x, 7)
  return {**scales, "qh": pack_groups(trailing(codes >> 2, 1, 4, 8), 1), "qs": _pack2(codes)}


_SCALES = {"d": F16, "m": F16}
_QS = {"qs": Part("uint8", (8,))}
RTN2 = Format("rtn2", 32, _SCALES | _QS, with_minimum(_codes2), _quantize2)
RTN3 = Format(
  "rtn3", 32, _SCALES | {"qh": Part("uint8", (4,))} | _QS, with_minimum(_codes3), _quantize3
)
