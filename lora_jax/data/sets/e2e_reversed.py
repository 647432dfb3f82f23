"""E2E reversed: the slots of a restaurant from a text about it.

    The Vaults is a cheap pub .   ->   name : The Vaults | Type : pub | price : cheap

The records are those of the reference format of `e2e.py`, which comes with lora_jax, with context
and completion exchanged. Some texts leave out slots of their input, so that no system is always
right. A text may also occur with several inputs (45 of the test set's 4,532 distinct texts do);
`e2e.grouped` collects them, and each counts as right.
"""

import os
import re
from collections.abc import Iterable

from lora_jax.data.sets import e2e
from lora_jax.data.sets.e2e import Record

TITLE = "E2E reversed"


def read(split: e2e.Split, folder: str | os.PathLike[str] | None = None) -> list[Record]:
  """Returns the records of a split, in the file's order; arguments and errors as in `e2e.read`."""
  return [
    Record(completion.strip(), context) for context, completion in e2e.read(split, folder=folder)
  ]


def slots(text: str) -> dict[str, str]:
  """Returns the slots that a completion states, without case, order and further spaces.

  Any text is accepted. A part without a colon is a slot without a value; a slot that is repeated
  with another value has both, and so equals no input's.

  >>> slots("Type : pub | name : The Vaults")
  {'type': 'pub', 'name': 'the vaults'}
  """
  by_name: dict[str, str] = {}
  for part in text.split("|"):
    name, _, value = (" ".join(piece.lower().split()) for piece in part.partition(":"))
    by_name[name] = value if by_name.get(name, value) == value else f"{by_name[name]} | {value}"
  return by_name


def values(records: Iterable[Record]) -> dict[str, list[str]]:
  """Returns the values of each slot in a training set, by the slots' order of first appearance."""
  by_name: dict[str, dict[str, None]] = {}
  for slots_text in dict.fromkeys(record.completion for record in records):
    for part in slots_text.split(" | "):
      name, _, value = part.partition(" : ")
      by_name.setdefault(name, {})[value] = None
  return {name: list(values) for name, values in by_name.items()}


def copied(text: str, known: dict[str, list[str]]) -> str:
  """Returns the slots whose values a text contains word for word: the floor of copying.

  Args:
    text: a context.
    known: the result of `values` on the training set. Of several values of a slot in the text, the
      longest counts.
  """
  parts = []
  for name, candidates in known.items():
    for value in sorted(candidates, key=len, reverse=True):
      if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE):
        parts.append(f"{name} : {value}")
        break
  return " | ".join(parts)
