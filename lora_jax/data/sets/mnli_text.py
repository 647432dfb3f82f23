"""MNLI (Williams et al. 2018, arXiv 1704.05426) as text: a prompt, and a word for the label.

    Premise: A man sleeps. Hypothesis: He is awake. Label:   ->   contradiction

`prompts` makes records of GLUE's own files, which `glue.py` and `glue_tfds.py` read. `read` takes a
subset of 8,999 and 1,000 rows in JSON, an object for each row by number:

    {"0": {"text_a": "A man sleeps.", "text_b": "He is awake.", "label": "contradiction"}, ...}

Results on it are named by `TITLE`. GLUE's files do not come with lora_jax. `mnli_text_tfds.py` is
the subset's TFDS builder.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from lora_jax.data.sets import glue, originals
from lora_jax.data.sets.e2e import Record
from lora_jax.files import read_json

TITLE = "MNLI, subset of 10,000"
SOURCE = (
  "10,000 rows of MNLI as JSON, each an object with text_a, text_b and label by its number; or "
  "take GLUE's own files (https://gluebenchmark.com) with lora_jax.data.sets.glue"
)
FILES: dict[str, list[str]] = {"train": ["train.json"], "valid": ["dev.json"]}
SIZES = {"train": 8999, "valid": 1000}
LABELS = glue.TASKS["mnli"].labels


def prompt(premise: str, hypothesis: str) -> str:
  """Returns the context of a pair of texts.

  >>> prompt("A man sleeps.", "He is awake.")
  'Premise: A man sleeps. Hypothesis: He is awake. Label:'
  """
  return f"Premise: {premise.strip()} Hypothesis: {hypothesis.strip()} Label:"


def prompts(records: Iterable[glue.Record]) -> list[Record]:
  """Returns the records of GLUE's MNLI as text.

  Raises:
    ValueError: if a record has no second text, or no label of MNLI's, as in a test set.
  """
  texts = []
  for i, (first, second, label, *_) in enumerate(records):
    if second is None or label is None or label not in range(len(LABELS)):
      raise ValueError(
        f"record {i}: expected two texts and a label from 0 to {len(LABELS) - 1}, got "
        f"{(first, second, label)!r:.200}"
      )
    texts.append(Record(prompt(first, second), LABELS[int(label)]))
  return texts


def read(split: str, folder: str | os.PathLike[str], *, any_size: bool = False) -> list[Record]:
  """Returns the records of a split of the subset, in the file's order.

  Args:
    split: `train` or `valid`.
    folder: has the split's file under its original name.
    any_size: whether another number of rows than 8,999 and 1,000 is accepted, as in an excerpt.
  Raises:
    FileNotFoundError: if the file does not exist, saying where it can be got.
    ValueError: if a row cannot be read, naming file and row, or rows are missing.
  """
  originals.check_split(TITLE, split, FILES)
  path = originals.find_file(folder, FILES[split], TITLE, SOURCE)
  records = []
  for number, (key, row) in enumerate(read_json(path).items()):
    where = f"{path}: row {key!r:.40}"
    if key != str(number):
      raise ValueError(f"{where}: expected the rows in order, here {number}")
    premise, hypothesis, label = originals.fields(row, where, text_a=str, text_b=str, label=str)
    if label not in LABELS:
      raise ValueError(f"{where}: expected a label of {', '.join(LABELS)}, got {label!r:.100}")
    records.append(Record(prompt(premise, hypothesis), label))
  originals.check_count(path, len(records), SIZES[split], "rows", any_size)
  return records


def majority(records: Sequence[Record]) -> str:
  """Returns the most frequent label of a training set, whose accuracy is the floor.

  Raises:
    ValueError: if there are no records.
  """
  if not records:
    raise ValueError("expected at least one record to count labels in, got none")
  return Counter(record.completion for record in records).most_common(1)[0][0]
