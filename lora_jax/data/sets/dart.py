"""DART 1.1.1 (Nan et al. 2021, arXiv 2007.02871): facts of tables in triples, and English texts.

Two formats of the same entries, found by their names in a folder:

| names                              | format                  |
|------------------------------------|-------------------------|
| `dart-v1.1.1-full-train.json`, ... | the authors' JSON lists |
| `train.jsonl`, `dev.jsonl`, ...    | an entry a line         |

    {"tripleset": [["Ben Mauk", "HIGH_SCHOOL", "Kenton"], ...],
     "annotations": [{"source": "WikiSQL_lily", "text": "Ben Mauk went to Kenton ..."}, ...]}

Contexts have lowercased relations, as in Hu et al.'s code. The files repeat entries, and texts
within one; all are kept, and `e2e.grouped` joins the texts of one input. The test set has an empty
text, of its entry 116; where an entry has another text, an empty one is left out, and logged.

`dev_train` and `dev_valid` are nine tenths and one tenth of the inputs of the development set: for
a check run where the training set is missing, whose results are not those of DART.
`dart_tfds.py` is the TFDS builder. DART's licence is MIT.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_jax.data.sets import originals, triples
from lora_jax.data.sets.e2e import Record, input_ids
from lora_jax.data.sets.originals import BYTE_ORDER_MARK, fields
from lora_jax.data.sets.triples import Entry, Triple
from lora_jax.files import parse_json, read_bytes, read_lines

logger = logging.getLogger(__name__)

TITLE = "DART 1.1.1"
SOURCE = "https://github.com/Yale-LILY/dart, folder data/v1.1.1 (MIT)"
_NAMES = {
  part: [f"dart-v1.1.1-full-{part}.json", f"{part}.jsonl"] for part in ("train", "dev", "test")
}
FILES = {
  "train": _NAMES["train"],
  "valid": _NAMES["dev"],
  "test": _NAMES["test"],
  "dev_train": _NAMES["dev"],
  "dev_valid": _NAMES["dev"],
}
SIZES = {"train": 62659, "valid": 6980, "test": 12552, "dev_train": 6980, "dev_valid": 6980}
"""The published number of texts in a split's file, the empty one included."""


def read(split: str, folder: str | os.PathLike[str], *, any_size: bool = False) -> list[Record]:
  """Returns the records of a split: one for each text, in the file's order.

  Args:
    split: `train`, `valid` or `test`; `dev_train` or `dev_valid`, parts of the development set.
    folder: has the files under their original names.
    any_size: whether another number of texts than was published is accepted, as in an excerpt.
  Raises:
    FileNotFoundError: if the file does not exist, saying where it can be got.
    ValueError: if an entry cannot be read, naming file and entry or line, or texts are missing.
  """
  originals.check_split(TITLE, split, FILES)
  path = originals.find_file(folder, FILES[split], TITLE, SOURCE)
  entries, empty = [], []
  for where, value in _values(path):
    entry, count = _entry(value, where)
    entries.append(entry)
    empty += [where] * count
  if empty:
    logger.warning("%d empty texts left out, the first of %s", len(empty), empty[0])
  records = triples.records(entries)
  originals.check_count(path, len(records) + len(empty), SIZES[split], "texts", any_size)
  if split in ("dev_train", "dev_valid"):
    numbers = input_ids(records)
    records = [
      record
      for record, number in zip(records, numbers, strict=True)
      if (number % 10 == 9) == (split == "dev_valid")
    ]
  return records


def _values(path: Path) -> Iterator[tuple[str, Any]]:
  """Yields the place and the JSON value of each entry of a file."""
  if path.suffix == ".jsonl":
    for where, line in read_lines(path):
      yield where, parse_json(line, where)
    return
  values = parse_json(read_bytes(path).removeprefix(BYTE_ORDER_MARK), path)
  if not isinstance(values, list):
    raise ValueError(f"{path}: expected a list of entries, got {type(values).__name__}")
  for number, value in enumerate(values, start=1):
    yield f"{path}, entry {number}", value


def _entry(value: Any, where: str) -> tuple[Entry, int]:
  """Returns an entry, and the number of its empty texts."""
  facts, annotations = fields(value, where, tripleset=list, annotations=list)
  parts = [_triple(fact, f"{where}, triple {i}") for i, fact in enumerate(facts, start=1)]
  texts = []
  for number, annotation in enumerate(annotations, start=1):
    place = f"{where}, annotation {number}"
    is_empty = isinstance(annotation, dict) and annotation.get("text", 0) in ("", None)
    (text,) = [""] if is_empty else fields(annotation, place, text=str)
    texts.append(text)
  kept = tuple(text for text in texts if text)
  if not kept:
    raise ValueError(f"{where}: expected a text that is not empty, got {len(texts)} empty ones")
  return Entry(tuple(parts), kept), len(texts) - len(kept)


def _triple(fact: Any, where: str) -> Triple:
  if not isinstance(fact, list) or len(fact) != 3:
    raise ValueError(f"{where}: expected a list of subject, relation, object, got {fact!r:.100}")
  names = ("subject", "relation", "object")
  head, relation, tail = fields(
    dict(zip(names, fact, strict=True)), where, subject=str, relation=str, object=str
  )
  return head, relation.lower(), tail
