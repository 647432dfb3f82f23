"""WebNLG 2017 (Gardent et al. 2017, ACL P17-1017): facts of DBpedia in triples, and English texts.

Hu et al.'s code has its three JSON files, with entries by number:

    {"entries": [{"1": {"category": "Airport", "modifiedtripleset": [{"subject": ..., "property":
      ..., "object": ...}], "lexicalisations": [{"comment": "good", "lex": ...}], ...}}, ...]}

A text is kept if its comment is "good". That leaves out 77 texts of the training set and 10 of the
development set, and so the 5 and 1 entries that have no other. Half of the test set has the ten
categories of the training set, half has five others:

| split         | entries | texts  | categories |
|---------------|---------|--------|------------|
| `train`       | 6,935   | 18,025 | 10 seen    |
| `valid`       | 871     | 2,258  | 10 seen    |
| `test`        | 1,862   | 4,928  | 15         |
| `test_seen`   | 971     | 2,495  | 10 seen    |
| `test_unseen` | 891     | 2,433  | 5 unseen   |

The files are CC BY-NC-SA 4.0 and do not come with lora_jax. `webnlg_tfds.py` is the TFDS builder.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from lora_jax.data.sets import originals, triples
from lora_jax.data.sets.e2e import Record
from lora_jax.data.sets.originals import BYTE_ORDER_MARK, fields
from lora_jax.data.sets.triples import Entry
from lora_jax.files import parse_json, read_bytes

TITLE = "WebNLG 2017"
SOURCE = (
  "https://github.com/microsoft/LoRA, folder examples/NLG/data/webnlg_challenge_2017 "
  "(CC BY-NC-SA 4.0)"
)
FILES: dict[str, list[str]] = {
  "train": ["train.json"],
  "valid": ["dev.json"],
  "test": ["test.json"],
  "test_seen": ["test.json"],
  "test_unseen": ["test.json"],
}
SIZES = {"train.json": 6940, "dev.json": 872, "test.json": 1862}
"""The published number of entries."""
SHA256 = {
  "train.json": "180edb6011360608c8548d4551366a9d55f140cbf9bc9397fbf4d97f6a89c639",
  "dev.json": "50f5a2c24d760bc84ba3e852707cd3b43b0cf2da035b425f87945a2440880488",
  "test.json": "2574896b23b5959d1a0cd4bb501ffbeff1a11790a9996c4cb8efed289149ff4f",
}
"""The files of Hu et al.'s code."""

SEEN = ("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument")
SEEN += ("SportsTeam", "University", "WrittenWork")
UNSEEN = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")
COMMENTS = ("good", "toFix")


def read(split: str, folder: str | os.PathLike[str], *, any_size: bool = False) -> list[Record]:
  """Returns the records of a split: one for each good text, in the file's order.

  Args:
    split: `train`, `valid`, `test`, `test_seen` or `test_unseen`.
    folder: has the files under their original names.
    any_size: whether a file other than the published one is accepted, as an excerpt.
  Raises:
    FileNotFoundError: if the file does not exist, saying where it can be got.
    ValueError: if an entry cannot be read, naming file and entry, or the file is not the
      published one.
  """
  return triples.records(read_entries(split, folder, any_size=any_size))


def read_entries(
  split: str, folder: str | os.PathLike[str], *, any_size: bool = False
) -> list[Entry]:
  """Returns the entries of a split that have a good text; arguments and errors as in `read`."""
  originals.check_split(TITLE, split, FILES)
  path = originals.find_file(folder, FILES[split], TITLE, SOURCE)
  data = read_bytes(path)
  entries = parse(data, path, SEEN if split in ("train", "valid") else (*SEEN, *UNSEEN))
  originals.check_count(path, len(entries), SIZES[path.name], "entries", any_size)
  if not any_size:
    _check_sha256(path, data)
  parts = {"test_seen": SEEN, "test_unseen": UNSEEN}
  chosen = [
    entry
    for entry in entries
    if entry.texts and entry.category in parts.get(split, (*SEEN, *UNSEEN))
  ]
  if not chosen:
    raise ValueError(f"{path}: expected entries of {split} with a good text, got none")
  return chosen


def parse(data: bytes, path: Path, categories: tuple[str, ...]) -> list[Entry]:
  """Returns all entries of a file's bytes, some of which may have no good text.

  Args:
    data: JSON in UTF-8.
    path: the file, for messages.
    categories: those that the file may have.
  Raises:
    ValueError: if an entry cannot be read, or occurs twice, naming file and entry.
  """
  (values,) = fields(parse_json(data.removeprefix(BYTE_ORDER_MARK), path), str(path), entries=list)
  entries = []
  places: dict[tuple[str, str, str], int] = {}
  for number, value in enumerate(values, start=1):
    where = f"{path}, entry {number}"
    inner = _only_field(value, str(number), where)
    entries.append(_entry(inner, where, categories))
    category, size, name = fields(inner, where, category=str, size=str, xml_id=str)
    first = places.setdefault((category, size, name), number)
    if first != number:
      raise ValueError(f"{where}: {name} of {category}, size {size}, is entry {first} already")
    if size != str(len(entries[-1].triples)):
      raise ValueError(
        f"{where}: expected triples of size {size}, got {len(entries[-1].triples)} of them"
      )
  return entries


def _only_field(value: Any, name: str, where: str) -> Any:
  if not isinstance(value, dict) or list(value) != [name]:
    raise ValueError(f"{where}: expected an object with the one field {name!r}, got {value!r:.100}")
  return value[name]


def _entry(value: Any, where: str, categories: tuple[str, ...]) -> Entry:
  category, facts, texts = fields(
    value, where, category=str, modifiedtripleset=list, lexicalisations=list
  )
  if category not in categories:
    raise ValueError(
      f"{where}: expected a category of {', '.join(categories)}, got {category!r:.100}"
    )
  good = []
  for number, text in enumerate(texts, start=1):
    comment, lex = fields(text, f"{where}, lexicalisation {number}", comment=str, lex=str)
    if comment not in COMMENTS:
      raise ValueError(
        f"{where}, lexicalisation {number}: expected the comment {' or '.join(COMMENTS)}, got "
        f"{comment!r:.100}"
      )
    good += [lex] if comment == "good" else []
  parts = [
    fields(fact, f"{where}, triple {number}", subject=str, property=str, object=str)
    for number, fact in enumerate(facts, start=1)
  ]
  return Entry(tuple((s, p, o) for s, p, o in parts), tuple(good), category)


def _check_sha256(path: Path, data: bytes) -> None:
  digest = hashlib.sha256(data).hexdigest()
  if digest != SHA256[path.name]:
    raise ValueError(
      f"{path}: expected content of SHA-256 {SHA256[path.name]}, got {digest}. Take the file of "
      f"{SOURCE}; any_size=True takes another version"
    )
