"""llama.cpp's block formats, as GGUF files store them; the reference is the package `gguf`.

The bytes of a block are split into arrays, one for each field of the C struct and in its order, so
that scales, minima and codes are aligned. Together the arrays have the size of the file's blocks.

A product of a scale, a sub-scale and a code has at most 24 significant bits, so that no compiler
can round it otherwise: values equal the reference's, bit for bit, eager and under `jit`. Where a
scale is infinite or NaN, so are the values; the bits of a NaN may differ. XLA on CPUs flushes
numbers below 2**-126 to 0: MXFP4's blocks whose scale byte is 0 or 1.
"""

import itertools
import math

import numpy as np

from lora_jax.quantization.format import Arrays, Format, Part
from lora_jax.quantization.ggml_blocks import IQ4_NL, MXFP4, NVFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from lora_jax.quantization.ggml_grids import (
  IQ1_M,
  IQ1_S,
  IQ2_S,
  IQ2_XS,
  IQ2_XXS,
  IQ3_S,
  IQ3_XXS,
)
from lora_jax.quantization.ggml_superblocks import (
  IQ4_XS,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K,
  TQ1_0,
  TQ2_0,
)

GGML = (
  *(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4, NVFP4),
  *(Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, TQ1_0, TQ2_0, IQ4_XS),
  *(IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S),
)


def block_bytes(kind: Format) -> int:
  """Returns the bytes of one block in a file.

  >>> block_bytes(Q4_1)
  20
  """
  return sum(_part_bytes(part) for part in kind.parts.values())


def split(kind: Format, raw: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the arrays of a format from the blocks of a file.

  Args:
    kind: a format in `GGML`.
    raw: uint8 (..., num_blocks * block_bytes).
  Returns:
    By name, (..., num_blocks, *part.shape); copies.
  Raises:
    ValueError: if the last axis is not a whole number of blocks.
  """
  return {name: np.array(field(kind, name, raw), order="C") for name in kind.parts}


def field(kind: Format, name: str, raw: np.ndarray) -> np.ndarray:
  """Returns one array of `split`, with the same other arguments and errors.

  It is a view of `raw` on little-endian machines, and may not be aligned.
  """
  size = block_bytes(kind)
  if raw.dtype != np.uint8 or not raw.ndim or raw.shape[-1] % size:
    raise ValueError(
      f"{kind.name} has blocks of {size} bytes, expected uint8 (..., a multiple of {size}), got "
      f"{raw.dtype} {raw.shape}"
    )
  blocks = raw.reshape(*raw.shape[:-1], -1, size)
  before = itertools.takewhile(lambda part: part != name, kind.parts)
  start = sum(_part_bytes(kind.parts[part]) for part in before)
  part = kind.parts[name]
  values = blocks[..., start : start + _part_bytes(part)]
  values = values.view(np.dtype(part.dtype).newbyteorder("<"))
  return values.reshape(*blocks.shape[:-1], *part.shape).astype(part.dtype, copy=False)


def _part_bytes(part: Part) -> int:
  return np.dtype(part.dtype).itemsize * math.prod(part.shape)


def join(kind: Format, arrays: Arrays) -> np.ndarray:
  """Returns the blocks of a file, uint8 (..., num_blocks * block_bytes); the inverse of `split`."""
  fields = []
  for name, part in kind.parts.items():
    array = np.asarray(arrays[name])
    lead = array.shape[: array.ndim - len(part.shape)]
    little = np.ascontiguousarray(array.reshape(*lead, -1), np.dtype(part.dtype).newbyteorder("<"))
    fields.append(little.view(np.uint8))
  blocks = np.concatenate(fields, axis=-1)
  return blocks.reshape(*blocks.shape[:-2], -1)
