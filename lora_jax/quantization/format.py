"""A format of quantized weights: the arrays of a block of values, and their dequantization."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

Arrays = Mapping[str, Any]


class Part(NamedTuple):
  """One array of a format, described for one block of values.

  Attributes:
    dtype: NumPy's name of its dtype.
    shape: its shape per block; `()` is one number.
  """

  dtype: str
  shape: tuple[int, ...] = ()


class Format(NamedTuple):
  """How blocks of values along the last axis of a weight are stored.

  For a weight (..., n) the array of a part is (..., n / block, *part.shape).

  Attributes:
    name: `Q4_1`, `int8`, `nf4`.
    block: the number of values in a block; None is the whole axis, where the first part, the
      codes, has the weight's shape (..., n).
    parts: the arrays of a block by name. Parts other than the first may have other shapes, if
      `by_row` is given.
    dequantize: from arrays by name to values, float32 (..., n).
    quantize: from values, float32 (..., n), to arrays; None if the format is only read.
    by_row: converts the arrays to ones that start with the weight's leading axes, so that rows can
      be taken from each of them; None if they already do.
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
