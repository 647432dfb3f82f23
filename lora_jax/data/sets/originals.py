"""Checks of data sets that are read from a folder of their original files."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.files import local_path

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def find_file(
  folder: str | os.PathLike[str], names: Sequence[str], title: str, source: str
) -> Path:
  """Returns the path of the first of these files that exists in a folder.

  Args:
    folder: a local folder.
    names: the file's possible names.
    title: of the data set.
    source: where its files can be got.
  Raises:
    FileNotFoundError: if none exists.
  """
  root = local_path(os.fspath(folder))
  for name in names:
    if (root / name).exists():
      return root / name
  raise FileNotFoundError(
    f"expected the {title} file {' or '.join(names)} in the folder {root}; there is none. "
    f"Put it there from {source}"
  )


def check_split(title: str, split: str, splits: Iterable[str]) -> None:
  """Raises ValueError if a data set has no such split."""
  if split not in splits:
    raise ValueError(f"split of {title} must be one of {', '.join(splits)}, got {split!r}")


def check_count(path: Path, count: int, expected: int, unit: str, any_size: bool) -> None:
  """Raises ValueError if a file has none of these units, or not as many as were published."""
  if not count or not (any_size or count == expected):
    raise ValueError(
      f"{path}: expected {expected:,} {unit}, got {count:,}. Take the original file; "
      "any_size=True takes an excerpt"
    )


def fields(value: Any, where: str, **kinds: type) -> list[Any]:
  """Returns the fields of a JSON object, in the order of `kinds`.

  Args:
    value: the object; it may have further fields.
    where: the file and entry, for messages.
    kinds: the type of each field, `str` or `list`.
  Raises:
    ValueError: if it is not an object, or a field is missing, of another type or empty.
  """
  if not isinstance(value, dict):
    raise ValueError(f"{where}: expected an object, got {value!r:.100}")
  for name, kind in kinds.items():
    if name not in value:
      names = ", ".join(value) or "none"
      raise ValueError(f"{where}: expected the field {name}, got the fields {names:.200}")
    part = value[name]
    if type(part) is not kind or not (part.strip() if isinstance(part, str) else part):
      noun = "a text that is not empty" if kind is str else "a list that is not empty"
      raise ValueError(f"{where}: expected {name} to be {noun}, got {part!r:.100}")
  return [value[name] for name in kinds]
