"""SAMSum (Gliwa et al. 2019, arXiv 1911.12237): chats in English, and a summary of each.

The files are tables of `id,dialogue,summary`; a chat has a line for each message:

    13818513,"Ann: I baked cookies.
    Ben: Save me one!",Ann baked cookies and Ben wants one.

A record's context is the chat and an empty line (Hu et al. 2021, appendix C), its completion the
summary without spaces at its ends. The paper counts 14,732 chats to train on; the tables have
14,731.

The files are CC BY-NC-ND 4.0 and do not come with lora_jax. `samsum_tfds.py` is the TFDS builder.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from lora_jax.data.sets import originals
from lora_jax.data.sets.e2e import Record
from lora_jax.files import read_lines

TITLE = "SAMSum"
SOURCE = (
  "the corpus of arXiv 1911.12237 (CC BY-NC-ND 4.0), as tables with the columns id, dialogue and "
  "summary"
)
FILES: dict[str, list[str]] = {
  "train": ["train.csv"],
  "valid": ["validation.csv", "val.csv"],
  "test": ["test.csv"],
}
SIZES = {"train": 14731, "valid": 818, "test": 819}
COLUMNS = ["id", "dialogue", "summary"]


def read(split: str, folder: str | os.PathLike[str], *, any_size: bool = False) -> list[Record]:
  """Returns the records of a split, in the file's order.

  Args:
    split: `train`, `valid` or `test`.
    folder: has the split's file under its original name.
    any_size: whether another number of chats than 14,731, 818 and 819 is accepted, as in an
      excerpt.
  Raises:
    FileNotFoundError: if the file does not exist, saying where it can be got.
    ValueError: if a row cannot be read, naming file and line, or rows are missing.
  """
  originals.check_split(TITLE, split, FILES)
  path = originals.find_file(folder, FILES[split], TITLE, SOURCE)
  rows = list(_rows(path))
  originals.check_count(path, len(rows), SIZES[split], "chats", any_size)
  return rows


def _rows(path: Path) -> Iterator[Record]:
  reader = csv.reader((f"{line}\n" for _, line in read_lines(path)), strict=True)
  lines: dict[str, int] = {}
  start = 1
  try:
    for row in reader:
      where = f"{path}:{start}"
      if start == 1:
        if row != COLUMNS:
          raise ValueError(f"{where}: expected the header {','.join(COLUMNS)}, got {','.join(row)}")
      elif len(row) != len(COLUMNS) or not all(field.strip() for field in row):
        raise ValueError(
          f"{where}: expected an id, a dialogue and a summary that are not empty, got {row!r:.200}"
        )
      elif row[0] in lines:
        raise ValueError(f"{where}: the id {row[0]} is that of line {lines[row[0]]} already")
      else:
        lines[row[0]] = start
        yield Record(f"{row[1].strip()}\n\n", row[2].strip())
      start = reader.line_num + 1
  except csv.Error as error:
    raise ValueError(f"{path}:{start}: expected a row of {','.join(COLUMNS)}: {error}") from error


def lead(context: str, count: int = 3) -> str:
  """Returns the first messages of a chat as its summary, the floor named lead-3.

  >>> lead("Ann: Hi!\\nBen: Hello.\\nAnn: Tea?\\nBen: Yes.")
  'Ann: Hi! Ben: Hello. Ann: Tea?'
  """
  return " ".join(context.strip().splitlines()[:count])
