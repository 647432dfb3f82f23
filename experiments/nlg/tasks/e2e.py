"""E2E's own part: slot errors, the references of the official files, and their punctuation."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.nlg.config import DecodedInputs, Decoding, Texts
from experiments.nlg.tasks.task import Task
from lora_jax.data.sets import e2e, e2e_tfds
from lora_jax.metrics import measure, slot_scores
from lora_jax.metrics.nlg import METRICS
from lora_jax.metrics.slots import parse_slots

COUNTS = ("missing", "wrong", "added", "slots")


def tokenized(line: str) -> str:
  """Returns a text with spaces around punctuation, like E2E's references in Hu et al.'s format.

  >>> tokenized("Aromi's a pub, near Café Brazil (£20-25).")
  "Aromi 's a pub , near Café Brazil ( £ 20 - 25 ) ."
  """
  line = re.sub(r"([£(),;:!?])", r" \1 ", line)
  line = re.sub(r"(?<=\w)-(?=\w)", " - ", line)
  line = re.sub(r"\.(?=\s|$)", " . ", line)
  line = re.sub(r"(?<=\w)((?:n't|'(?:s|re|ve|ll|d|m))\b)", r" \1", line)
  return " ".join(line.split())


def official_groups(groups: Sequence[e2e.Group], split: e2e.Split) -> list[e2e.Group]:
  """Returns inputs with the references of the official CSV file, matched by slot values.

  Raises:
    ValueError: if an input is not in that file.
  """
  official = {_key(group): group for group in e2e.grouped(e2e.read(split, "official"))}
  missing = [group.context for group in groups if _key(group) not in official]
  if missing:
    raise ValueError(
      f"{len(missing)} of {len(groups)} inputs are not in the official {split} file, the first "
      f"{missing[0]!r}. Set decoding.official_references=False"
    )
  return [official[_key(group)] for group in groups]


def _key(group: e2e.Group) -> frozenset[tuple[str, str]]:
  return frozenset(parse_slots(group.context).items())


def _load(texts: Texts, split: e2e.Split) -> Sequence[e2e.Record]:
  return e2e_tfds.load(split, texts.form, texts.source)


def _extras(
  texts: Sequence[str], groups: Sequence[e2e.Group], decoding: DecodedInputs
) -> Mapping[str, Any]:
  """Returns the slot errors of the texts and the references, and the scores by official ones."""
  slots = slot_scores(texts, [group.context for group in groups])
  pairs = [(text, group.context) for group in groups for text in group.references]
  of_references = slot_scores(*zip(*pairs, strict=True))
  fields: dict[str, Any] = {
    "scores": {"slot_error_rate": slots.rate},
    "intervals": {"slot_error_rate": list(slots.interval())},
    "slot_errors": dict(zip(COUNTS, slots.counts.sum(0).tolist(), strict=True)),
    "reference_slot_error_rate": of_references.rate,
  }
  if isinstance(decoding, Decoding) and decoding.official_references:
    official = official_groups(groups, decoding.split)
    scores = measure([texts], [group.references for group in official])[0].scores()
    fields["official_scores"] = dataclasses.asdict(scores)
  return fields


E2E = Task(
  "E2E NLG Challenge",
  _load,
  measure,
  (*METRICS, "slot_error_rate"),
  extras=_extras,
  in_file_order=True,
)
