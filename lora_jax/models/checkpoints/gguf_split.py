"""Splits a GGUF file into parts of a limited size, as llama-gguf-split does.

    python -m lora_jax.models.checkpoints.gguf_split model.gguf FOLDER [MEBIBYTES]

Each part is smaller than that size, by default 64 MiB: FOLDER/model-00001-of-00002.gguf and so on.
The first part has the metadata; load the model by its path.
"""

import sys
from pathlib import Path

from lora_jax.fields import Count, read_value
from lora_jax.models.checkpoints.gguf import open_gguf, write_gguf
from lora_jax.models.checkpoints.gguf_header import ALIGNMENT
from lora_jax.models.checkpoints.hub import new_folder

MEBIBYTE = 2**20
SPLIT_KEYS = 128  # bytes, at most, of the keys that parts have
PADDING = 32  # bytes, at most, after a tensor


def split_gguf(path: str | Path, folder: str | Path, limit: int = 64 * MEBIBYTE) -> list[Path]:
  """Writes the parts of a GGUF file into a new folder; returns their paths.

  Args:
    path: of the file, or of the first part of a split one.
    folder: to make.
    limit: the size that no part reaches, bytes.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if a tensor with the header is too large for a part; as `open_gguf`.
  """
  limit, file = read_value(Count, limit, "limit"), open_gguf(path)
  header = min((x.offset for x in file.tensors.values() if x.path == file.path), default=0)
  header += SPLIT_KEYS
  parts, size = [[]], header
  for name, tensor in file.tensors.items():
    if header + tensor.size + PADDING >= limit:
      raise ValueError(
        f"{file.path}: {name} has {tensor.size:,} bytes and the header {header:,}, which no part "
        f"of less than {limit:,} bytes can hold. Choose a larger size"
      )
    size += tensor.size + PADDING
    if size >= limit:
      parts.append([])
      size = header + tensor.size + PADDING
    parts[-1].append(name)
  names = [f"{file.path.stem}-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
  shared = {key: value for key, value in file.metadata.items() if key != ALIGNMENT}
  counts = {"split.count": len(parts), "split.tensors.count": len(file.tensors)}
  with new_folder(folder) as temporary:
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
      fields = {**({} if i else shared), **counts, "split.no": i}
      tensors = {tensor: file.blocks(tensor) for tensor in part}
      write_gguf(temporary / name, file.architecture, fields, tensors, file.kind)
  return [Path(folder) / name for name in names]


def main(path: str, folder: str, mebibytes: str = "64") -> None:
  """Splits a file, and prints the parts."""
  for part in split_gguf(path, folder, int(mebibytes) * MEBIBYTE):
    print(f"wrote {part}, {part.stat().st_size / MEBIBYTE:.1f} MiB")


if __name__ == "__main__":
  if len(sys.argv) not in (3, 4) or not all(size.isdecimal() for size in sys.argv[3:]):
    sys.exit("usage: python -m lora_jax.models.checkpoints.gguf_split FILE FOLDER [MEBIBYTES]")
  try:
    main(*sys.argv[1:])
  except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")
