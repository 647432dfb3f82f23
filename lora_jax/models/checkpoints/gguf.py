"""Opens and writes GGUF files, llama.cpp's format: metadata and tensors in one file.

file = open_gguf("model.gguf")
file.metadata["llama.block_count"]        30
file.tensors["blk.0.attn_q.weight"]       shape (576, 576), type Q4_1
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.extras import require
from lora_jax.files import new_path, regular_file
from lora_jax.models.checkpoints.gguf_header import GGUFTensor, read_header

ARCHITECTURE, KIND = "general.architecture", "general.type"
SPLIT_TYPES = {"split.no": "UINT16", "split.count": "UINT16", "split.tensors.count": "INT32"}
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Blocks(NamedTuple):
  """A tensor as a GGUF file stores it.

  Attributes:
    type: by the package's name for it, such as `Q4_1` or `BF16`.
    data: uint8, (*shape[:-1], bytes of a row).
  """

  type: str
  data: np.ndarray


class GGUF(NamedTuple):
  """The contents of a GGUF file, or of all parts of a split one.

  Attributes:
    path: of the file, or of the first part.
    metadata: values by key, as Python's.
    tensors: by name.
  """

  path: Path
  metadata: Mapping[str, Any]
  tensors: Mapping[str, GGUFTensor]

  @property
  def architecture(self) -> str:
    """Of the model, such as `llama`; of an adapter, its base model's."""
    return self.metadata[ARCHITECTURE]

  @property
  def kind(self) -> str:
    """`model`, `adapter`, `mmproj`, `imatrix` or `vocab`."""
    return self.metadata.get(KIND, "model")

  def blocks(self, name: str) -> Blocks:
    """Returns a tensor as it is stored, mapped from the file."""
    return Blocks(self.tensors[name].type, self.tensors[name].bytes())

  def __repr__(self) -> str:
    return f"GGUF({self.path}, {self.kind} of {self.architecture}, {len(self.tensors)} tensors)"


def is_gguf(path: str | Path) -> bool:
  """Returns whether a path is a GGUF file, by its name or its first bytes."""
  path = Path(path)
  if path.name.lower().endswith(".gguf"):
    return not path.is_dir()
  if not path.is_file():
    return False
  with path.open("rb") as file:
    return file.read(4) == b"GGUF"


def open_gguf(path: str | Path) -> GGUF:
  """Opens a GGUF file, or all parts of a split one, given the first.

  Raises:
    FileNotFoundError: if there is no such file, or a part is missing.
    ValueError: if it is not a GGUF file, has another version or byte order, or is truncated or
      damaged; or if its parts do not fit together.
  """
  require("gguf")
  path = regular_file(path)
  metadata, tensors = read_header(path)
  if type(metadata.get("split.count", 1)) is not int or metadata.get("split.count", 1) > 1:
    tensors = _all_parts(path, metadata, tensors)
  for key in (ARCHITECTURE, KIND):
    value = metadata.get(key, "model" if key == KIND else None)
    if not isinstance(value, str):
      raise ValueError(f"{path}: {key} is {_shown(value)}, expected a string")
  return GGUF(path, metadata, tensors)


def _all_parts(
  path: Path, metadata: Mapping[str, Any], tensors: dict[str, GGUFTensor]
) -> dict[str, GGUFTensor]:
  """Returns the tensors of all parts of a split model, given those of its first part."""
  count = metadata["split.count"]
  match = PART.fullmatch(path.name)
  if match is None or type(count) is not int or int(match[3]) != count:
    raise ValueError(
      f"{path} is one of {_shown(count)} parts, as split.count says. Expected the name that "
      f"llama-gguf-split gave it, *-00001-of-{count if type(count) is int else 0:05}.gguf"
    )
  parts = [path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
  if metadata.get("split.no") != 0 or path != parts[0]:
    raise ValueError(f"{path} is not the first part; give {parts[0]}, which has the metadata")
  if missing := [part for part in parts if not part.is_file()]:
    names = ", ".join(part.name for part in missing[:5])
    raise FileNotFoundError(
      f"{missing[0]} does not exist: of the {count} parts of {path}, {len(missing)} are missing "
      f"({names}). Copy or download them into the same folder"
    )
  for i, part in enumerate(parts[1:], 1):
    fields, more = read_header(part)
    if (fields.get("split.no"), fields.get("split.count")) != (i, count):
      raise ValueError(
        f"{part}: split.no {_shown(fields.get('split.no'))} and split.count "
        f"{_shown(fields.get('split.count'))} are not {i} and {count}: it is a part of another file"
      )
    if twice := tensors.keys() & more.keys():
      raise ValueError(f"{part}: {min(twice)[:100]} is in another part of the model too")
    tensors = tensors | more
  if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
    raise ValueError(
      f"{path}: its parts have {len(tensors)} tensors, expected split.tensors.count = "
      f"{_shown(metadata['split.tensors.count'])}: they are not of one model"
    )
  return tensors


def write_gguf(
  path: str | Path,
  architecture: str,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray | Blocks],
  kind: str = "model",
) -> None:
  """Writes a new GGUF file, completely or not at all.

  Args:
    path: of the file.
    architecture: llama.cpp's name of the model's, such as `llama`.
    metadata: values by key: strings, booleans, integers (uint32, or the next type that holds them),
      floats (float32), and lists of one of these, whose integers are int32. Keys of split files
      have llama.cpp's types. `general.architecture`
      and `general.type`, as of a copied file, are left out.
    tensors: by name, in the order of NumPy, such as (out, in): float32, float16 or `Blocks`.
    kind: `model` or `adapter`.
  Raises:
    FileExistsError: if there is such a file.
    ValueError: if a value or an array is of another type.
    OSError: if it cannot be written, such as on a full disk; nothing is left behind.
  """
  require("gguf")
  from gguf import GGMLQuantizationType, GGUFWriter

  with new_path(path) as temporary:
    writer = GGUFWriter(temporary, architecture)
    writer.add_type(kind)
    for key in [key for key in metadata if key not in (ARCHITECTURE, KIND)]:
      writer.add_key_value(key, metadata[key], *_value_type(key, metadata[key]))
    for name, array in tensors.items():
      if isinstance(array, Blocks):
        data = np.ascontiguousarray(array.data)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[array.type])
      elif array.dtype in (np.float32, np.float16):
        writer.add_tensor(name, np.ascontiguousarray(array))
      else:
        raise ValueError(f"{name} is of {array.dtype}, expected float32, float16 or Blocks")
    try:
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_tensors_to_file()
    finally:
      writer.close()


def _value_type(key: str, value: Any) -> tuple[Any, ...]:
  """Returns the type of a value in the file, and of its items if it is a list."""
  from gguf import GGUFValueType

  if key in SPLIT_TYPES:  # llama.cpp accepts no others
    return (GGUFValueType[SPLIT_TYPES[key]],)
  if isinstance(value, str):
    return (GGUFValueType.STRING,)
  if isinstance(value, bool):
    return (GGUFValueType.BOOL,)
  if isinstance(value, int):
    if value < 0:
      return (GGUFValueType.INT32 if value >= -(2**31) else GGUFValueType.INT64,)
    return (GGUFValueType.UINT32 if value < 2**32 else GGUFValueType.UINT64,)
  if isinstance(value, float):
    return (GGUFValueType.FLOAT32,)
  if isinstance(value, Sequence) and value:
    for kind, name in ((str, "STRING"), (bool, "BOOL"), (int, "INT32"), (float, "FLOAT32")):
      if all(type(item) is kind for item in value):
        return GGUFValueType.ARRAY, GGUFValueType[name]
  raise ValueError(
    f"{key} is {_shown(value)}, expected a string, a boolean, a number, or a list of one type"
  )


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 100 else f"{text[:100]}..."
