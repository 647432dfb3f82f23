"""Tasks with one answer: WikiSQL, MNLI as text, E2E reversed, addition; and summaries, SAMSum."""

from collections.abc import Callable, Sequence

from experiments.nlg.config import Texts
from experiments.nlg.tasks.task import Measure, Task, from_files
from lora_jax.data.sets import (
  addition,
  e2e_reversed,
  mnli_text,
  mnli_text_tfds,
  samsum,
  samsum_tfds,
  wikisql,
  wikisql_tfds,
)
from lora_jax.data.sets.e2e import Record, Split
from lora_jax.metrics import Measured, exact_match, part_accuracy, rouge
from lora_jax.metrics.exact import one_spaced
from lora_jax.metrics.rouge import ROUGE

NUM_SUMS = 100_000  # of the training set of addition
NUM_VALID_PAIRS = 1000  # of MNLI, the last ones of the subset's training set


def by_exact_match(name: str, canonical: Callable[[str], object] = one_spaced) -> Measure:
  """Returns the `measure` of a task whose only metric is `exact_match`."""

  def measure(
    systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
  ) -> list[Measured]:
    return [Measured({name: exact_match(texts, references, canonical)}, {}) for texts in systems]

  return measure


def _measure_slots(
  systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> list[Measured]:
  slots = e2e_reversed.slots
  return [
    Measured(
      {
        "exact": exact_match(texts, references, slots),
        "slots": part_accuracy(texts, references, slots),
      },
      {},
    )
    for texts in systems
  ]


def _measure_summaries(
  systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> list[Measured]:
  try:
    return [Measured(dict(rouge(texts, references)), {}) for texts in systems]
  except ImportError as error:
    return [Measured({}, dict.fromkeys(ROUGE, str(error))) for _ in systems]


def _lead(contexts: Sequence[str], train: Sequence[Record]) -> list[str]:
  del train
  return [samsum.lead(context) for context in contexts]


def _majority(contexts: Sequence[str], train: Sequence[Record]) -> list[str]:
  return [mnli_text.majority(train)] * len(contexts)


def _copied(contexts: Sequence[str], train: Sequence[Record]) -> list[str]:
  known = e2e_reversed.values(train)
  return [e2e_reversed.copied(context, known) for context in contexts]


def _load_mnli(texts: Texts, split: Split) -> Sequence[Record]:
  """Returns a split of MNLI's subset, whose development set is the test set here.

  The last 1,000 pairs of its training set are for validation, of an excerpt the last tenth.
  """
  name = "valid" if split == "test" else "train"
  records = list(mnli_text_tfds.load(name, texts.source, any_size=texts.any_size))
  if split == "test":
    return records
  start = len(records) - min(NUM_VALID_PAIRS, -(-len(records) // 10))
  return records[:start] if split == "train" else records[start:]


def _load_reversed(texts: Texts, split: Split) -> Sequence[Record]:
  return e2e_reversed.read(split, None if texts.source == "embedded" else texts.source)


def _load_sums(texts: Texts, split: Split) -> Sequence[Record]:
  del texts
  return addition.read(split, NUM_SUMS if split == "train" else addition.HELD_OUT)


WIKISQL = Task(
  wikisql.TITLE,
  from_files(wikisql_tfds.load),
  by_exact_match("logical_form", wikisql.logical_form),
  ("logical_form",),
)
SAMSUM = Task(
  samsum.TITLE,
  from_files(samsum_tfds.load),
  _measure_summaries,
  ROUGE,
  floor=_lead,
  floor_label="the chat's first three messages",
)
MNLI_TEXT = Task(
  mnli_text.TITLE,
  _load_mnli,
  by_exact_match("accuracy"),
  ("accuracy",),
  floor=_majority,
  floor_label="the training set's most frequent label",
)
E2E_REVERSED = Task(
  e2e_reversed.TITLE,
  _load_reversed,
  _measure_slots,
  ("exact", "slots"),
  floor=_copied,
  floor_label="the training set's values that the text has word for word",
)
ADDITION = Task(addition.TITLE, _load_sums, by_exact_match("exact"), ("exact",))
