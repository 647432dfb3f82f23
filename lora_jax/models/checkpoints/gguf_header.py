"""Parses the header of a GGUF file strictly.

The package `gguf` has a reader too, which trusts every count in the file and makes an array of each
string: 3 s for a vocabulary of 49,152 tokens, and hours for a damaged one.

    GGUF | version | number of tensors | number of keys
    each key:     its name, the type of its value, the value
    each tensor:  its name, shape (innermost axis first), type, offset in the data
    padding, then the data
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.files import regular_file
from lora_jax.models.checkpoints.recognize import describe_file

VERSIONS = (2, 3)  # 3 added big-endian files
ALIGNMENT = "general.alignment"
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1"}
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_FLOAT, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_MAX_AXES = 4
_SMALLEST_KEY = 8 + 4 + 1  # bytes: the length of an empty name, a type, a value
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


class GGUFTensor(NamedTuple):
  """A tensor of a GGUF file.

  Attributes:
    shape: in the order of NumPy, such as (out, in).
    type: by the package's name for it, such as `Q4_1` or `F32`.
    path: of its file, one part of a split model.
    offset: of its data in the file, bytes.
    size: of its data, bytes.
  """

  shape: tuple[int, ...]
  type: str
  path: Path
  offset: int
  size: int

  @property
  def row_size(self) -> int:
    """The bytes of the values along the last axis."""
    return self.size // math.prod(self.shape[:-1])

  def bytes(self) -> np.ndarray:
    """Returns its data, uint8 (*shape[:-1], row_size), mapped until the array is deleted."""
    shape = (*self.shape[:-1], self.row_size)
    return np.asarray(np.memmap(self.path, np.uint8, "r", self.offset, shape))


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
  """Returns the metadata and the tensors of one file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not a GGUF file of this version and byte order, or it is truncated or
      damaged.
  """
  with regular_file(path).open("rb") as file:
    start = file.read(4)
    if start != b"GGUF":
      kind = describe_file(path)
      raise ValueError(
        f"{path} is not a GGUF file: it begins with {start!r}"
        f"{f'; it is {kind}' if kind else ', expected GGUF'}"
      )
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      return _Header(path, data).read()


class _Header:
  """A position in the bytes of a file."""

  def __init__(self, path: Path, data: mmap.mmap):
    self._path, self._data, self._position = path, data, 4

  def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    self._check_version(self._number("<u4"))
    num_tensors, num_keys = self._number("<u8"), self._number("<u8")
    self._check_count(num_tensors, _SMALLEST_TENSOR, "tensors")
    self._check_count(num_keys, _SMALLEST_KEY, "metadata")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
      name = self._text("the name of a key")
      if name in metadata:
        raise self._damaged(f"it has the key {name[:100]!r} twice")
      metadata[name] = self._value(self._number("<u4"), name)
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
      name = self._text("the name of a tensor")
      if name in infos:
        raise self._damaged(f"it has the tensor {name[:100]!r} twice")
      num_axes = self._number("<u4")
      if not 1 <= num_axes <= _MAX_AXES:
        raise self._damaged(f"{name[:100]!r} has {num_axes} axes, expected 1 to {_MAX_AXES}")
      shape = tuple(self._number("<u8") for _ in range(num_axes))[::-1]
      infos[name] = shape, self._number("<u4"), self._number("<u8")
    return metadata, self._placed(infos, self._alignment(metadata))

  def _placed(
    self, infos: dict[str, tuple[tuple[int, ...], int, int]], alignment: int
  ) -> dict[str, GGUFTensor]:
    """Returns the tensors with the places of their data, which may not overlap."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    start, end = -(-self._position // alignment) * alignment, len(self._data)
    tensors = {}
    for name, (shape, number, offset) in infos.items():
      if number not in set(GGMLQuantizationType):
        raise ValueError(
          f"{self._path}: {name[:100]} is of type {number}, which the package gguf does not know. "
          "Install its newest version, or convert the file to another type by llama-quantize"
        )
      kind = GGMLQuantizationType(number)
      block, block_size = GGML_QUANT_SIZES[kind]
      if not all(shape) or shape[-1] % block or offset % alignment:
        raise self._damaged(
          f"{name[:100]!r} has shape {shape} and offset {offset}; expected no empty axis, a last "
          f"axis divisible by {block}, for {kind.name}, and an offset by {alignment}"
        )
      size = math.prod(shape) // block * block_size
      if start + offset + size > end:
        raise ValueError(
          f"{self._path} is truncated: the data of {name[:100]} end at byte "
          f"{start + offset + size}, the file at {end}. Copy or download it again"
        )
      tensors[name] = GGUFTensor(shape, kind.name, self._path, start + offset, size)
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
      if tensor.offset < position:
        raise self._damaged(f"the data of {name[:100]!r} overlap those of another tensor")
      position = tensor.offset + tensor.size
    return tensors

  def _check_version(self, version: int) -> None:
    if version in VERSIONS:
      return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
      raise ValueError(
        f"{self._path} is a big-endian GGUF file, expected little-endian. Convert it by "
        "gguf-convert-endian FILE little, of the package gguf"
      )
    raise ValueError(
      f"{self._path} has version {version} of GGUF, expected {' or '.join(map(str, VERSIONS))}. "
      "Convert the model again by a current llama.cpp"
    )

  def _alignment(self, metadata: dict[str, Any]) -> int:
    alignment = metadata.get(ALIGNMENT, 32)
    if type(alignment) is not int or alignment < 1 or alignment.bit_count() != 1:
      raise self._damaged(f"{ALIGNMENT} is {str(alignment)[:50]!r}, expected a power of two")
    return alignment

  def _value(self, kind: int, name: str) -> Any:
    """Returns a value as Python's; a float32 as the shortest decimal that rounds to it."""
    if kind == _STRING:
      return self._text(name)
    if kind == _ARRAY:
      return self._array(self._number("<u4"), name)
    if kind not in _NUMBERS:
      raise self._damaged(f"{name[:100]!r} has a value of type {kind}, expected one from 0 to 12")
    value = self._number(_NUMBERS[kind])
    if kind == _FLOAT:
      return float(str(np.float32(value)))
    return self._as_bools([value], name)[0] if kind == _BOOL else value

  def _array(self, kind: int, name: str) -> list[Any]:
    count = self._number("<u8")
    if kind == _STRING:
      self._check_count(count, 8, name)
      return [self._text(name) for _ in range(count)]
    if kind not in _NUMBERS:
      raise self._damaged(
        f"{name[:100]!r} is a list of values of type {kind}; expected strings, numbers or booleans"
      )
    dtype = np.dtype(_NUMBERS[kind])
    self._check_count(count, dtype.itemsize, name)
    values = np.frombuffer(self._take(count * dtype.itemsize, name), dtype).tolist()
    return self._as_bools(values, name) if kind == _BOOL else values

  def _as_bools(self, values: list[int], name: str) -> list[bool]:
    if any(value > 1 for value in values):
      raise self._damaged(f"{name[:100]!r} is a boolean of value {max(values)}, expected 0 or 1")
    return [bool(value) for value in values]

  def _number(self, dtype: str) -> Any:
    size = int(dtype[-1])
    return np.frombuffer(self._take(size, "a number"), dtype)[0].item()

  def _text(self, what: str) -> str:
    (size,) = struct.unpack("<Q", self._take(8, what))
    try:
      return self._take(size, what).decode("utf-8")
    except UnicodeDecodeError as error:
      raise self._damaged(f"{what[:100]!r} is not text in UTF-8: {error.reason}") from None

  def _take(self, size: int, what: str) -> bytes:
    self._check_count(size, 1, what)
    self._position += size
    return self._data[self._position - size : self._position]

  def _check_count(self, count: int, size: int, what: str) -> None:
    """Raises ValueError if this many items of at least `size` bytes are more than the file has."""
    rest = len(self._data) - self._position
    if count * size > rest:
      raise ValueError(
        f"{self._path} is truncated or damaged: {what[:100]} needs {count * size} bytes at byte "
        f"{self._position} of its header, and {rest} are left. Copy or download it again"
      )

  def _damaged(self, fault: str) -> ValueError:
    return ValueError(f"{self._path} is damaged: {fault}. Copy, download or convert it again")
