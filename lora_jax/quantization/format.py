"""A format of quantized weights: the arrays that hold a block of values, and what they mean."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

Arrays = Mapping[str, Any]


class Part(NamedTuple):
  """One array of a format, as each block of values has it.

  Attributes:
    dtype: by NumPy's name.
    shape: per block; `()` is one number.
  """

  dtype: str
  shape: tuple[int, ...] = ()


class Format(NamedTuple):
  """How blocks of values along the last axis of a weight are stored.

  For a weight (..., n) the array of a part is (..., n / block, *part.shape).

  Attributes:
    name: `Q4_1`, `int8`, `nf4`.
    block: the number of values in a block; None is the whole axis, and then the first part, the
      codes, has the weight's shape (..., n).
    parts: the arrays of a block by name. Parts other than the first may have other shapes, if
      `by_row` is given.
    dequantize: from arrays by name to values, float32 (..., n).
    quantize: from values, float32 (..., n), to arrays; None if the format is only read.
    by_row: from the arrays to those whose leading axes are all those of the weight, (..., *), so
      that some of its rows can be taken from each; None if the arrays are so already.
    dequantize_rows: as `dequantize`, for the arrays of `by_row`.
  """

  name: str
  block: int | None
  parts: Mapping[str, Part]
  dequantize: Callable[[Arrays], jax.Array]
  quantize: Callable[[jax.Array], dict[str, jax.Array]] | None = None
  by_row: Callable[[Arrays], dict[str, jax.Array]] | None = None
  dequantize_rows: Callable[[Arrays], jax.Array] | None = None

  def weight_shape(self, codes_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape (..., n) of a weight, from that of its first part."""
    if self.block is None:
      return tuple(codes_shape)
    first = next(iter(self.parts.values()))
    *rest, num_blocks = codes_shape[: len(codes_shape) - len(first.shape)]
    return (*rest, num_blocks * self.block)
