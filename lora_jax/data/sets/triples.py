"""Facts as triples, and the texts that state them: the common part of WebNLG and DART.

The context of Hu et al.'s code has the triples of an input in the file's order:

    Alan_Bean : occupation : Test_pilot | Alan_Bean : birthPlace : Wheeler,_Texas

Several texts describe one input; `e2e.grouped` collects them, also those of repeated entries.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.data.sets.e2e import Record
from lora_jax.files import local_path

Triple = tuple[str, str, str]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Entry(NamedTuple):
  """An input and its texts.

  Attributes:
    triples: subject, relation and object of each fact, at least one.
    texts: each states all the facts.
    category: of the subjects; empty in DART.
  """

  triples: tuple[Triple, ...]
  texts: tuple[str, ...]
  category: str = ""


def context_of(triples: Iterable[Triple]) -> str:
  """Returns the context of an input.

  >>> context_of([("Alan_Bean", "occupation", "Test_pilot"), ("Alan_Bean", "status", "Retired")])
  'Alan_Bean : occupation : Test_pilot | Alan_Bean : status : Retired'
  """
  return " | ".join(" : ".join(triple) for triple in triples)


def records(entries: Iterable[Entry]) -> list[Record]:
  """Returns a record for each text, in the entries' order."""
  return [Record(context_of(entry.triples), text) for entry in entries for text in entry.texts]


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
      found = ", ".join(value) or "none"
      raise ValueError(f"{where}: expected the field {name}, got the fields {found:.200}")
    part = value[name]
    if type(part) is not kind or not (part.strip() if isinstance(part, str) else part):
      noun = "a text that is not empty" if kind is str else "a list that is not empty"
      raise ValueError(f"{where}: expected {name} to be {noun}, got {part!r:.100}")
  return [value[name] for name in kinds]
