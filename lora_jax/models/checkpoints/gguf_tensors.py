"""Reads the tensors of a GGUF file as floats, or as the blocks that are stored."""

import re
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from lora_jax.models.checkpoints.gguf import GGUF
from lora_jax.models.checkpoints.hub import FLOATS, Index
from lora_jax.models.checkpoints.recognize import Stored, first_match
from lora_jax.quantization.ggml import GGML

READABLE = (*FLOATS, *(kind.name for kind in GGML))
_CHUNK = 2**22  # values that are dequantized at once


class GGUFTensors:
  """The tensors of a GGUF file by name, as `Tensors` are those of a folder."""

  readable: Collection[str] = READABLE
  described_by = "metadata"

  def __init__(self, file: GGUF, expected: Mapping[str, tuple[int, ...]]):
    """Opens a file, whose tensors lack leading axes of length 1 that are expected."""
    self._file, self._expected = file, expected

  def __iter__(self) -> Iterator[str]:
    return iter(self._file.tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    shape, expected = self._file.tensors[name].shape, self._expected.get(name, ())
    missing = len(expected) - len(shape)
    return expected if (1,) * missing + shape == expected else shape

  def dtype(self, name: str) -> str:
    """Returns the type by the package's name for it, such as `F32` or `Q4_1`."""
    return self._file.tensors[name].type

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """Returns a tensor, or a part of it: a view of stored floats, or dequantized to float32."""
    shape, kind = self.shape(name), self.dtype(name)
    index = index or (slice(None),) * len(shape)
    raw = self._bytes(name)
    if kind in FLOATS:
      return raw.view(FLOATS[kind]).reshape(shape)[index]
    return dequantized(raw[index[:-1]], kind)[..., index[-1]]

  def blocks(self, name: str, rows: Index) -> np.ndarray:
    """Returns the blocks of some rows, uint8 (*rows, bytes of a row), a view of the file."""
    return self._bytes(name)[rows]

  def explain(self, stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Returns why tensors are not the expected ones, and the remedy; empty if unknown."""
    if not stored:
      return "the file has a vocabulary only, without tensors: give a model's file"
    if first_match(r"\.ffn_(gate|up|down)\.\d+\.weight$", stored):
      return (
        "each expert has tensors of its own, as in files of 2023: convert the model again by a "
        "current llama.cpp"
      )
    layers = {int(m[1]) for name in stored if (m := re.match(r"blk\.(\d{1,9})\.", name))}
    wanted = {int(m[1]) for name in expected if (m := re.match(r"blk\.(\d{1,9})\.", name))}
    if layers != wanted:
      return f"it has {len(layers)} layers, and block_count says {len(wanted)}"
    return ""

  def _bytes(self, name: str) -> np.ndarray:
    return self._file.tensors[name].bytes().reshape(*self.shape(name)[:-1], -1)


def dequantized(rows: np.ndarray, kind: str) -> np.ndarray:
  """Returns the values of blocks, uint8 (..., bytes of a row), as float32.

  By the package `gguf`, a chunk at a time: it needs several times the memory of the values.
  """
  from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
  from gguf.quants import dequantize

  type_ = GGMLQuantizationType[kind]
  block, block_size = GGML_QUANT_SIZES[type_]
  flat = rows.reshape(-1, rows.shape[-1])
  width = flat.shape[-1] // block_size * block
  values = np.empty((len(flat), width), np.float32)
  step = max(_CHUNK // width, 1)
  with np.errstate(all="ignore"):  # the scales of a file may be infinite
    for start in range(0, len(flat), step):
      values[start : start + step] = dequantize(flat[start : start + step], type_)
  return values.reshape(*rows.shape[:-1], width)
