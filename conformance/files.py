"""Reads and writes safetensors files in NumPy, the same arrays to the same bytes."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

DTYPES = {"F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "BOOL": np.dtype("?")}


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
  """Writes arrays, ordered by name, with a header of sorted keys."""
  header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
  pieces, offset = [], 0
  for name, tensor in sorted(tensors.items()):
    code = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
    data = np.ascontiguousarray(tensor).tobytes()
    end = offset + len(data)
    header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [offset, end]}
    pieces.append(data)
    offset = end
  text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the arrays of a vector file by name, and its metadata.

  Raises:
    ValueError: if it is damaged, or not such a file, naming it.
  """
  content, tensors = path.read_bytes(), {}
  start = 8 + int.from_bytes(content[:8], "little")
  try:
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__")
    for name, entry in header.items():
      first, last = entry["data_offsets"]
      values = np.frombuffer(content[start + first : start + last], DTYPES[entry["dtype"]])
      tensors[name] = values.reshape(entry["shape"])
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is damaged, or not a vector: {error}. Copy it again") from error
  return tensors, metadata
