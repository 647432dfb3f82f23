"""NormalFloat 4 with double quantization (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, sec. 3).

A weight is a level times the largest magnitude of its block of 64:

    w = absmax * LEVELS[code]            absmax = mean + scale * absmax_code

The 16 levels are quantiles of the normal distribution, scaled to [-1, 1] (appendix E). The absmax
of a block is an 8-bit integer in steps of `scale`, one for each 256 blocks, from the mean of all.
(The paper uses 8-bit floats; integers around the mean take the same space and are more precise.)

    4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight

Groups of 256 blocks run along the last two axes of the stored weight, row after row, so that each
matrix of a stack has its own groups and mean.
"""

import itertools
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp

from lora_jax.quantization.bits import lookup, pack_planes, planes, trailing
from lora_jax.quantization.format import Arrays, Format, Part
from lora_jax.quantization.ggml_blocks import blocks_of, divided, inverse

BLOCK = 64
GROUP = 256
"""Blocks that share the scale of their absmax."""


def levels() -> tuple[float, ...]:
  """Returns the sixteen levels in ascending order; one of them is 0 (appendix E).

  The 8 positive and 7 negative levels are quantiles at evenly spaced probabilities from `offset` to
  1/2, divided by the largest.
  """
  offset = 1 - (1 / 32 + 1 / 30) / 2
  quantile = NormalDist().inv_cdf
  positive, negative = (
    [quantile(offset + (0.5 - offset) * i / count) for i in range(count)] for count in (8, 7)
  )
  return tuple(x / positive[0] for x in (*(-x for x in negative), 0.0, *reversed(positive)))


LEVELS = levels()


def absmax(arrays: Arrays) -> jax.Array:
  """Returns the largest magnitude of each block, float32 (..., n / 64)."""
  codes = arrays["absmax"].astype(jnp.float32)
  num_axes = min(codes.ndim, 2)
  flat = trailing(codes, num_axes)
  scale = jnp.repeat(arrays["scale"], GROUP, axis=-1)[..., : flat.shape[-1]]
  largest = arrays["mean"][..., None] + scale * flat
  return largest.reshape(codes.shape)


def by_row(arrays: Arrays) -> dict[str, jax.Array]:
  """Returns the codes, and the absmax of each block as a number."""
  return {"codes": arrays["codes"], "absmax": absmax(arrays)}


def dequantize_rows(arrays: Arrays) -> jax.Array:
  """Returns `absmax * LEVELS[codes]`, float32 (..., n), for the arrays of `by_row`."""
  codes = trailing(planes(arrays["codes"], 4), 2)
  values = lookup(jnp.asarray(LEVELS, jnp.float32), codes)
  return trailing(arrays["absmax"][..., None] * values, 2)


def dequantize(arrays: Arrays) -> jax.Array:
  """Returns the weight, float32 (..., n)."""
  return dequantize_rows(by_row(arrays))


def quantize(values: jax.Array) -> dict[str, jax.Array]:
  """Rounds values (..., n) to the nearest level of their block."""
  blocks = blocks_of(values, BLOCK)
  largest = jnp.max(jnp.abs(blocks), axis=-1)
  scaled = blocks * inverse(largest)[..., None]
  codes = jnp.zeros(scaled.shape, jnp.uint8)
  for low, high in itertools.pairwise(LEVELS):
    codes += scaled > (low + high) / 2
  packed = pack_planes(trailing(codes, 1, 2, BLOCK // 2), 4)
  return {"codes": packed, **_quantize_absmax(largest)}


def _quantize_absmax(largest: jax.Array) -> dict[str, jax.Array]:
  flat = trailing(largest, min(largest.ndim, 2))
  mean = jnp.mean(flat, axis=-1)
  count = flat.shape[-1]
  num_groups = math.ceil(count / GROUP)
  padding = [(0, 0)] * mean.ndim + [(0, num_groups * GROUP - count)]
  groups = blocks_of(jnp.pad(flat - mean[..., None], padding), GROUP)
  scale = divided(jnp.max(jnp.abs(groups), axis=-1), 127.0)
  codes = jnp.round(groups * inverse(scale)[..., None]).astype(jnp.int8)
  codes = trailing(codes, 2)[..., :count].reshape(largest.shape)
  return {"absmax": codes, "scale": scale, "mean": mean}


NF4 = Format(
  "nf4",
  BLOCK,
  {
    "codes": Part("uint8", (BLOCK // 2,)),
    "absmax": Part("int8"),
    "scale": Part("float32"),
    "mean": Part("float32"),
  },
  dequantize,
  quantize,
  by_row,
  dequantize_rows,
)
