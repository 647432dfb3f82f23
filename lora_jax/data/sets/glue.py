"""GLUE (Wang et al. 2018, arXiv 1804.07461) from its original TSV files, with no further package.

A row has the names and values of TFDS's `glue`, whatever it was read from:

    {"sentence1": "No Weapons ...", "sentence2": "Weapons ...", "label": 1, "idx": 0}

`label` is the class's number, a score from 0 to 5 for STS-B, and -1 where a test set hides it.
`records` turns rows into a classifier's examples: one or two texts and a label. `glue_tfds.py` is
the TFDS builder on it, `superglue.py` the same for SuperGLUE.

The files are those of the benchmark's own download, `<folder>/CoLA/train.tsv` and so on. A
quotation mark is a plain character in them, and a tab always ends a field.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.files import local_path, read_lines

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Record(NamedTuple):
  """One example: a text or a pair of texts, and its label.

  Attributes:
    first: the text, or the first of a pair.
    second: the second text of a pair.
    label: the class's number, or the score of a regression; None if it is hidden.
    group: the question's number, where a question of SuperGLUE has several candidates: each
      candidate is a record, and all of a group are scored together.
    answer: the candidate's own text, which ReCoRD's metrics compare.
  """

  first: str
  second: str | None
  label: int | float | None
  group: int | None = None
  answer: str = ""


@dataclass(frozen=True)
class Task:
  """A task of GLUE: the folder of its files, and the meaning of their columns.

  Attributes:
    folder: its folder in the benchmark's download.
    texts: the file's column for each of a row's texts.
    label_column: the column of the label, in the files that have labels.
    labels: the names of the classes by number; none for a regression.
    sizes: the published number of rows of each split; None where the publications differ.
    aliases: the names of the classes in the files, where they are others.
  """

  folder: str
  texts: Mapping[str, str]
  label_column: str
  labels: tuple[str, ...]
  sizes: Mapping[str, int | None]
  aliases: tuple[str, ...] = ()

  def label(self, text: str) -> int | float:
    """Returns the label of a file's field; raises ValueError if it is none of the task's."""
    if not self.labels:
      score = float(np.float32(text))  # the precision that TFDS stores
      if not 0 <= score <= 5 or "_" in text:
        raise ValueError(f"a score is from 0 to 5, got {text}")
      return score
    return (self.aliases or self.labels).index(text)


NUMBERS = ("0", "1")
PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}
ENTAILMENT = ("entailment", "not_entailment")


def _sizes(train: int | None, validation: int, test: int) -> dict[str, int | None]:
  return {"train": train, "validation": validation, "test": test}


TASKS: dict[str, Task] = {
  "cola": Task(
    "CoLA",
    {"sentence": "sentence"},
    "is_acceptable",
    ("unacceptable", "acceptable"),
    _sizes(8551, 1043, 1063),
    NUMBERS,
  ),
  "sst2": Task(
    "SST-2",
    {"sentence": "sentence"},
    "label",
    ("negative", "positive"),
    _sizes(67349, 872, 1821),
    NUMBERS,
  ),
  "mrpc": Task(
    "MRPC",
    {"sentence1": "#1 String", "sentence2": "#2 String"},
    "Quality",
    ("not_equivalent", "equivalent"),
    _sizes(3668, 408, 1725),
    NUMBERS,
  ),
  "stsb": Task("STS-B", PAIR, "score", (), _sizes(5749, 1500, 1379)),
  "rte": Task("RTE", PAIR, "label", ENTAILMENT, _sizes(2490, 277, 3000)),
  "wnli": Task(
    "WNLI", PAIR, "label", ("not_entailment", "entailment"), _sizes(635, 71, 146), NUMBERS
  ),
  "qnli": Task(
    "QNLI",
    {"question": "question", "sentence": "sentence"},
    "label",
    ENTAILMENT,
    _sizes(104743, 5463, 5463),
  ),
  "qqp": Task(
    "QQP",
    {"question1": "question1", "question2": "question2"},
    "is_duplicate",
    ("not_duplicate", "duplicate"),
    _sizes(None, 40430, 390965),  # train: 363,849 in TFDS, 363,846 in Hugging Face's
    NUMBERS,
  ),
  "mnli": Task(
    "MNLI",
    {"premise": "sentence1", "hypothesis": "sentence2"},
    "gold_label",
    ("entailment", "neutral", "contradiction"),
    {
      "train": 392702,
      **{"validation_matched": 9815, "validation_mismatched": 9832},
      **{"test_matched": 9796, "test_mismatched": 9847},
    },
  ),
}
COLA_COLUMNS = ["source", "is_acceptable", "author's mark", "sentence"]  # of the files without any


def task_of(name: str) -> Task:
  """Returns a task; raises ValueError, naming all, if it does not exist."""
  if name not in TASKS:
    raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
  return TASKS[name]


def check_split(name: str, split: str, splits: Iterable[str]) -> None:
  """Raises ValueError if a task has no such split."""
  if split not in splits:
    raise ValueError(f"split of {name} must be one of {', '.join(splits)}, got {split!r}")


def read(
  name: str,
  split: str,
  folder: str | os.PathLike[str],
  *,
  skip_malformed: bool = False,
  any_size: bool = False,
) -> list[Row]:
  """Returns the rows of a split, in the file's order.

  Args:
    name: of the task.
    split: `train`, `validation` or `test`; of MNLI `validation_matched` and so on.
    folder: of the benchmark; the task's own is in it.
    skip_malformed: whether lines that cannot be read are left out, and their number logged;
      otherwise they are an error. QQP's files are known to have some, which TFDS leaves out too.
    any_size: whether another number of rows than was published is accepted, as in an excerpt.
  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if a line cannot be read, naming file and line, or lines are missing.
  """
  task = task_of(name)
  check_split(name, split, task.sizes)
  rows: list[Row] = []
  skipped: list[str] = []
  path = local_path(os.fspath(folder)) / task.folder
  for number, row in _rows(name, split, path):
    if isinstance(row, str):
      skipped.append(row)
      if not skip_malformed:
        hint = ". QQP's files have such lines: skip_malformed=True" if name == "qqp" else ""
        raise ValueError(f"{row}{hint}")
    else:
      rows.append({**row, "idx": number})
  if skipped:
    logger.warning("%d lines skipped, the first: %s", len(skipped), skipped[0])
  file = path / file_names(name, split, path)[0]
  check_size(f"{file}, {split}", len(rows), task.sizes[split], any_size)
  return rows


def check_size(source: str, count: int, expected: int | None, any_size: bool) -> None:
  """Raises ValueError if there are no rows, or not as many as were published."""
  if not count or not (any_size or expected in (None, count)):
    raise ValueError(
      f"{source}: expected {'rows' if expected is None else f'{expected:,} rows'}, got {count:,}. "
      "Take the original file; any_size=True takes an excerpt"
    )


def file_names(name: str, split: str, folder: Path) -> list[str]:
  """Returns the names of the files that a split is read from, in the task's folder."""
  if name == "mrpc" and not (folder / f"{_stem(split)}.tsv").is_file():
    originals = {"test": ["msr_paraphrase_test.txt"]}
    names = originals.get(split, ["msr_paraphrase_train.txt", "dev_ids.tsv"])
    if (folder / names[0]).is_file():
      return names
  return [f"{_stem(split)}.tsv"]


def _stem(split: str) -> str:
  return split.replace("validation", "dev")


def _rows(name: str, split: str, folder: Path) -> Iterator[tuple[int, Row | str]]:
  """Yields the number of each row and the row, or an error message about its line."""
  task = task_of(name)
  file, *ids = file_names(name, split, folder)
  wants_dev = None if not ids else split == "validation"
  dev = {tuple(line.split("\t")) for _, line in read_lines(folder / ids[0])} if ids else set()
  header = COLA_COLUMNS if name == "cola" and split != "test" else None
  number = 0
  for where, fields in _table(folder / file, header):
    row = fields if isinstance(fields, str) else _row(task, where, fields, split)
    if wants_dev is not None and not isinstance(fields, str):
      # Microsoft's own training file of MRPC holds both; the pairs' ids say which are the dev set.
      is_dev = (fields["#1 ID"], fields["#2 ID"]) in dev
      if is_dev != wants_dev:
        continue
    yield number, row
    number += 1


def _table(path: Path, header: list[str] | None) -> Iterator[tuple[str, dict[str, str] | str]]:
  """Yields the place and fields of each line of a table, or an error message about the line."""
  if not path.exists():
    raise FileNotFoundError(f"expected the file {path.name} in the folder {path.parent}")
  for where, line in read_lines(path):
    fields = line.split("\t")
    if header is None:
      header = fields
      if len(set(header)) < len(header):
        raise ValueError(f"{where}: a column occurs twice in {', '.join(header):.200}")
    elif len(fields) == len(header):
      yield where, dict(zip(header, fields, strict=True))
    else:
      yield where, f"{where}: expected {len(header)} fields between tabs, got {len(fields)}"


def _row(task: Task, where: str, fields: dict[str, str], split: str) -> Row | str:
  """Returns the row of a line's fields, or an error message about them."""
  labelled = not split.startswith("test")
  columns = [*task.texts.values(), *([task.label_column] if labelled else [])]
  missing = [column for column in columns if column not in fields]
  if missing:
    raise ValueError(
      f"{where.rpartition(':')[0]}:1: expected the columns {', '.join(columns)}, got "
      f"{', '.join(fields)}"
    )
  row: Row = {name: fields[column] for name, column in task.texts.items()}
  if not labelled:
    return row | {"label": -1 if task.labels else -1.0}
  try:
    return row | {"label": task.label(fields[task.label_column])}
  except ValueError:
    labels = ", ".join(task.aliases or task.labels) or "0.0 to 5.0"
    return f"{where}: expected a label of {labels}, got {fields[task.label_column]!r}"


def records(name: str, rows: Sequence[Row]) -> list[Record]:
  """Returns the examples of a task's rows; the label -1 becomes None."""
  first, *second = task_of(name).texts
  text: Callable[[Row], str | None] = (lambda row: row[second[0]]) if second else lambda row: None
  return [
    Record(row[first], text(row), None if row["label"] == -1 else row["label"]) for row in rows
  ]
