"""SuperGLUE (Wang et al. 2019, arXiv 1905.00537) from its original JSONL files.

A row has the names and values of TFDS's `super_glue`. `records` turns rows into examples of one or
two texts; the tasks of another kind are converted so:

| task    | first text   | second text                         | records of a row                 |
|---------|--------------|-------------------------------------|----------------------------------|
| COPA    | premise      | "because" or "so", and the choice   | 2 of a group, one of them right  |
| MultiRC | paragraph    | question and answer                 | 1, of its question's group       |
| ReCoRD  | passage      | query with an entity in its place   | 1 for each entity, a group       |
| WiC     | "word: " and sentence | the other sentence         | 1                                |
| WSC     | text         | "pronoun: " and the noun phrase     | 1                                |

These conversions are ours: the benchmark prescribes none. The others are pairs of texts already.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.data.sets.glue import ENTAILMENT, Record, Row, check_size, check_split
from lora_jax.files import local_path, parse_json, read_lines

TRUTH = ("False", "True")
FILES = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}


@dataclass(frozen=True)
class Task:
  """A task of SuperGLUE.

  Attributes:
    folder: its folder in the benchmark's download.
    texts: the names of a row's texts.
    labels: the names of the classes by number.
    sizes: the published number of the files' lines by split.
    numbers: the names of a row's further integers.
  """

  folder: str
  texts: tuple[str, ...]
  labels: tuple[str, ...]
  sizes: Mapping[str, int]
  numbers: tuple[str, ...] = ()


def _sizes(train: int, validation: int, test: int) -> dict[str, int]:
  return {"train": train, "validation": validation, "test": test}


TASKS: dict[str, Task] = {
  "boolq": Task("BoolQ", ("question", "passage"), TRUTH, _sizes(9427, 3270, 3245)),
  "cb": Task(
    "CB",
    ("premise", "hypothesis"),
    ("entailment", "contradiction", "neutral"),
    _sizes(250, 56, 250),
  ),
  "copa": Task(
    "COPA",
    ("premise", "choice1", "choice2", "question"),
    ("choice1", "choice2"),
    _sizes(400, 100, 500),
  ),
  "multirc": Task("MultiRC", ("paragraph", "question", "answer"), TRUTH, _sizes(456, 83, 166)),
  "record": Task("ReCoRD", ("passage", "query"), (), _sizes(65709, 7481, 7484)),
  "rte": Task("RTE", ("premise", "hypothesis"), ENTAILMENT, _sizes(2490, 277, 3000)),
  "wic": Task(
    "WiC",
    ("word", "sentence1", "sentence2"),
    TRUTH,
    _sizes(5428, 638, 1400),
    ("start1", "start2", "end1", "end2"),
  ),
  "wsc": Task(
    "WSC",
    ("text", "span1_text", "span2_text"),
    TRUTH,
    _sizes(554, 104, 146),
    ("span1_index", "span2_index"),
  ),
}


def task_of(name: str) -> Task:
  """Returns a task; raises ValueError, naming all, if it does not exist."""
  if name not in TASKS:
    raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
  return TASKS[name]


def read(
  name: str, split: str, folder: str | os.PathLike[str], *, any_size: bool = False
) -> list[Row]:
  """Returns the rows of a split, in the file's order.

  Args:
    name: of the task.
    split: `train`, `validation` or `test`.
    folder: of the benchmark; the task's own is in it.
    any_size: whether another number of lines than was published is accepted, as in an excerpt.
  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if a line cannot be read, naming file and line, or lines are missing.
  """
  task = task_of(name)
  check_split(name, split, task.sizes)
  path = local_path(os.fspath(folder)) / task.folder / FILES[split]
  if not path.exists():
    raise FileNotFoundError(f"expected the file {path.name} in the folder {path.parent}")
  rows, number = [], 0
  for number, (where, line) in enumerate(read_lines(path), start=1):  # noqa: B007 (counts)
    value = parse_json(line, where)
    try:
      rows += list(_rows(name, value, labelled=split != "test"))
    except (ValueError, TypeError, AttributeError) as error:
      raise ValueError(f"{where}: expected a JSON object of {name}, got {error}") from None
    except KeyError as error:
      raise ValueError(f"{where}: expected the key {error}, there is none") from None
  check_size(f"{path}", number, task.sizes[split], any_size)
  return rows


def _rows(name: str, line: dict[str, Any], labelled: bool) -> Iterator[Row]:
  """Yields the rows of a line, as TFDS has them."""
  if name == "multirc":
    for question in line["passage"]["questions"]:
      for answer in question["answers"]:
        yield {
          "paragraph": _text(line["passage"]["text"]),
          "question": _text(question["question"]),
          "answer": _text(answer["text"]),
          "label": _label(name, answer["label"]) if labelled else -1,
          "idx": {
            "paragraph": _number("idx", line["idx"]),
            "question": _number("idx", question["idx"]),
            "answer": _number("idx", answer["idx"]),
          },
        }
  elif name == "record":
    text = _text(line["passage"]["text"])
    entities = {_entity(text, entity) for entity in line["passage"]["entities"]}
    for query in line["qas"]:
      answers = {_text(answer["text"]) for answer in query["answers"]} if labelled else ()
      yield {
        "passage": text,
        "query": _text(query["query"]),
        "entities": sorted(entities),
        "answers": sorted(answers),
        "idx": {"passage": _number("idx", line["idx"]), "query": _number("idx", query["idx"])},
      }
  else:
    task = TASKS[name]
    line = line | line["target"] if name == "wsc" else line
    yield {
      **{field: _text(line[field]) for field in task.texts},
      **{field: _number(field, line[field]) for field in task.numbers},
      "label": _label(name, line["label"]) if labelled else -1,
      "idx": _number("idx", line["idx"]),
    }


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise ValueError(f"{value!r:.100} where a text is expected")
  return value


def _number(field: str, value: Any) -> int:
  if type(value) is not int:
    raise ValueError(f"{field} {value!r:.100} where an integer is expected")
  return value


def _entity(text: str, entity: dict[str, Any]) -> str:
  start, end = (_number(field, entity[field]) for field in ("start", "end"))
  if not (0 <= start <= end and start < len(text)):
    raise ValueError(f"an entity from {start} to {end} in a passage of {len(text)} characters")
  return text[start : end + 1]


def _label(name: str, value: Any) -> int:
  """Returns a class's number: the files have names, truth values or 0 and 1."""
  labels = TASKS[name].labels
  if isinstance(value, str) and value in labels:
    return labels.index(value)
  if value not in (0, 1) or isinstance(value, str) or labels[0] == "entailment":
    raise ValueError(f"the label {value!r:.100}, which is none of {', '.join(labels)}")
  return int(value)


def records(name: str, rows: Sequence[Row]) -> list[Record]:
  """Returns the examples of a task's rows; the label -1 becomes None."""
  task_of(name)
  make = _FORMS[name]
  groups: dict[Any, int] = {}
  result = []
  for number, row in enumerate(rows):
    key = (row["idx"]["paragraph"], row["idx"]["question"]) if name == "multirc" else number
    label = None if row.get("label", -1) == -1 else row["label"]
    result += make(row, label, groups.setdefault(key, len(groups)))
  return result


def _pair(first: str, second: str) -> Callable[[Row, int | None, int], list[Record]]:
  return lambda row, label, group: [Record(row[first], row[second], label)]


def _copa(row: Row, label: int | None, group: int) -> list[Record]:
  joined = "because" if row["question"] == "cause" else "so"
  return [
    Record(
      row["premise"],
      f"{joined} {row[choice]}",
      None if label is None else int(label == number),
      group,
      row[choice],
    )
    for number, choice in enumerate(("choice1", "choice2"))
  ]


def _multirc(row: Row, label: int | None, group: int) -> list[Record]:
  second = f"{row['question']} {row['answer']}"
  return [Record(row["paragraph"], second, label, group, row["answer"])]


def _record(row: Row, label: int | None, group: int) -> list[Record]:
  return [
    Record(
      row["passage"],
      row["query"].replace("@placeholder", entity),
      int(entity in row["answers"]) if row["answers"] else None,
      group,
      entity,
    )
    for entity in row["entities"]
  ]


def _wic(row: Row, label: int | None, group: int) -> list[Record]:
  return [Record(f"{row['word']}: {row['sentence1']}", row["sentence2"], label)]


def _wsc(row: Row, label: int | None, group: int) -> list[Record]:
  return [Record(row["text"], f"{row['span2_text']}: {row['span1_text']}", label)]


_FORMS: dict[str, Callable[[Row, int | None, int], list[Record]]] = {
  "boolq": _pair("question", "passage"),
  "cb": _pair("premise", "hypothesis"),
  "rte": _pair("premise", "hypothesis"),
  "copa": _copa,
  "multirc": _multirc,
  "record": _record,
  "wic": _wic,
  "wsc": _wsc,
}
