"""The E2E NLG data set (Novikova et al. 2017, arXiv 1706.09254), with no further package.

Two formats of the same restaurant descriptions:

    reference  lines of Hu et al.'s code: `name : The Vaults | Type : pub||The Vaults is a pub .`
    official   the challenge's CSV files: `"name[The Vaults], eatType[pub]","The Vaults is a pub."`

Several texts describe one input, so that the test set's 4,693 records have 630 distinct inputs.
`read` takes a split from the embedded copy or a folder; `e2e_tfds.py` is the TFDS builder on it.
"""

import csv
import hashlib
import io
import lzma
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Literal, NamedTuple, get_args

from lora_jax.files import local_path, read_bytes

Form = Literal["reference", "official"]
Split = Literal["train", "valid", "test"]

FILES: dict[Form, dict[Split, str]] = {
  "reference": {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"},
  "official": {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"},
}
EMBEDDED_SHA256 = {
  "train.txt": "eae319082237310913d9f37f6a891d48fb3f821f29d86870d2cb4f92ddd72c5a",
  "valid.txt": "ba963113c8401d3d26216c0dc0a6dae1ea6ea927de3bf830e32c41f65401c80d",
  "test.txt": "81b1bcd40c4f12845ec4eb61a77bf43765d112483cd9b2f91ef10bfc1b3d8f13",
  "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
  "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}
"""The embedded files, and the SHA-256 of each before compression."""


class Record(NamedTuple):
  """An input and one text that describes it."""

  context: str
  completion: str


class Group(NamedTuple):
  """A distinct input and all its texts, in the file's order."""

  context: str
  references: tuple[str, ...]


def read(
  split: Split, form: Form = "reference", folder: str | os.PathLike[str] | None = None
) -> list[Record]:
  """Returns the records of a split, in the file's order.

  Args:
    split: `train`, `valid` or `test`.
    form: `reference` or `official`.
    folder: has the uncompressed file under its original name; None reads the embedded copy,
      which has all splits of the reference format and `valid` and `test` of the official one.
  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if a line cannot be read, naming file and line, or there is none.
  """
  name = file_name(split, form)
  data = embedded_bytes(name) if folder is None else folder_bytes(name, folder)
  return parse(data, name, form)


def file_name(split: Split, form: Form) -> str:
  """Returns the original name of a split's file."""
  if form not in FILES:
    raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
  if split not in FILES[form]:
    raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
  return FILES[form][split]


def embedded_bytes(name: str) -> bytes:
  """Returns an embedded file as it was before compression.

  Raises:
    FileNotFoundError: if there is no such file; the official training set is not embedded.
    ValueError: if the file is not that of this version of lora_jax.
  """
  if name not in EMBEDDED_SHA256:
    raise FileNotFoundError(
      f"{name} is not embedded; there are {', '.join(EMBEDDED_SHA256)}. Give the folder that has "
      "it, let the TFDS builder download it, or take the reference format, which has all splits"
    )
  path = resources.files("lora_jax") / "assets" / "e2e" / f"{name}.xz"
  data = lzma.decompress(path.read_bytes())
  digest = hashlib.sha256(data).hexdigest()
  if digest != EMBEDDED_SHA256[name]:
    raise ValueError(
      f"{path}: expected content of SHA-256 {EMBEDDED_SHA256[name]}, got {digest}. "
      "Reinstall lora_jax"
    )
  return data


def folder_bytes(name: str, folder: str | os.PathLike[str]) -> bytes:
  """Returns a file of a folder; raises FileNotFoundError, naming both, if it does not exist."""
  path = local_path(os.fspath(folder)) / name
  if not path.exists():
    raise FileNotFoundError(f"expected the E2E file {name} in the folder {folder}; there is none")
  return read_bytes(path)


def parse(data: bytes, name: str, form: Form) -> list[Record]:
  """Returns the records of a file's bytes; `name` is the file's in messages.

  Raises:
    ValueError: if a line cannot be read, naming file and line, or there is none.
  """
  if (place := data.find(b"\0")) >= 0:
    line = data.count(b"\n", 0, place) + 1
    raise ValueError(f"{name}:{line}: expected UTF-8, got a NUL byte")
  try:
    text = data.decode("utf-8-sig")  # without a byte-order mark
  except UnicodeDecodeError as error:
    line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
    raise ValueError(f"{name}:{line}: expected UTF-8, got byte 0x{byte:02x}") from error
  records = _lines(text, name) if form == "reference" else _table(text, name)
  if not records:
    raise ValueError(f"{name}: expected at least one record, got none")
  return records


def _lines(text: str, name: str) -> list[Record]:
  """Reads lines as Hu et al.'s code does: without the spaces around a line."""
  records = []
  for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
    parts = line.strip().split("||")
    if len(parts) != 2 or not all(part.strip() for part in parts):
      raise ValueError(f"{name}:{number}: expected 'context||completion', got {line!r}")
    records.append(Record(*parts))
  return records


def _table(text: str, name: str) -> list[Record]:
  reader = csv.reader(io.StringIO(text, newline=""), strict=True)
  records = []
  try:
    header = next(reader, ["mr", "ref"])
    if header != ["mr", "ref"]:
      raise ValueError(f"{name}:1: expected the header 'mr,ref', got {','.join(header)!r}")
    for row in reader:
      if len(row) != 2 or not all(field.strip() for field in row):
        raise ValueError(f"{name}:{reader.line_num}: expected a row 'mr,ref', got {row!r}")
      records.append(Record(*row))
  except csv.Error as error:
    raise ValueError(f"{name}:{reader.line_num}: expected a row 'mr,ref', got {error}") from error
  return records


def input_ids(records: Iterable[Record]) -> list[int]:
  """Returns the number of each record's input, counted in order of first appearance.

  >>> input_ids([Record("b", "1"), Record("a", "2"), Record("b", "3")])
  [0, 1, 0]
  """
  numbers: dict[str, int] = {}
  return [numbers.setdefault(record.context, len(numbers)) for record in records]


def grouped(records: Sequence[Record]) -> list[Group]:
  """Returns the distinct inputs with their texts, in order of first appearance.

  >>> grouped([Record("b", "1"), Record("a", "2"), Record("b", "3")])
  [Group(context='b', references=('1', '3')), Group(context='a', references=('2',))]
  """
  texts: dict[str, list[str]] = {}
  for record in records:
    texts.setdefault(record.context, []).append(record.completion)
  return [Group(context, tuple(references)) for context, references in texts.items()]
