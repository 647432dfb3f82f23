"""The five scores of the paper's Tables 3, 13 and 14 for a system's texts."""

import dataclasses
import importlib.util
from collections.abc import Sequence

from lora_jax.metrics import coco, java, ngrams
from lora_jax.metrics.segments import SegmentStatistics

METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider")


@dataclasses.dataclass(frozen=True)
class NlgScores:
  """A row of the paper's Table 3; a cell that could not be computed is None.

  Attributes:
    bleu: percent.
    nist: bits.
    meteor: percent.
    rouge_l: percent.
    cider: 10 at most.
    missing: the reason for each cell that is None.
  """

  bleu: float | None
  nist: float | None
  meteor: float | None
  rouge_l: float | None
  cider: float | None
  missing: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measured:
  """One system's statistics by metric, and the reason for each metric that is missing."""

  statistics: dict[str, SegmentStatistics]
  missing: dict[str, str]

  def scores(self) -> NlgScores:
    """Returns the scores of the whole corpus."""
    values = {name: statistics.score() for name, statistics in self.statistics.items()}
    return NlgScores(**{name: values.get(name) for name in METRICS}, missing=self.missing)


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> NlgScores:
  """Scores a system's texts by all five metrics.

  Args:
    hypotheses: one text for each input; it may be empty.
    references: for each input its references, at least one; their number may differ.
  Raises:
    ValueError: if there are no inputs, they do not pair up, or a reference has no word.
  """
  return measure([hypotheses], references)[0].scores()


def measure(
  systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> list[Measured]:
  """Returns the segments' statistics of several systems over the same inputs.

  METEOR takes seconds to start; all systems share one start.

  Args:
    systems: for each system, one text for each input.
    references: for each input its references, at least one; their number may differ.
  Raises:
    ValueError: as `score`.
  """
  check_references(references)
  for hypotheses in systems:
    check_hypotheses(hypotheses, references)
  columns = {"nist": [ngrams.nist(hypotheses, references) for hypotheses in systems]}
  missing = {}
  if importlib.util.find_spec("sacrebleu") is None:
    missing["bleu"] = "sacrebleu was not found; pip install lora-jax[metrics]"
  else:
    columns["bleu"] = [ngrams.bleu(hypotheses, references) for hypotheses in systems]
  if reason := java.why_missing():
    missing |= dict.fromkeys(("meteor", "rouge_l", "cider"), reason)
  else:
    columns |= _measure_coco(systems, references)
  return [
    Measured({name: columns[name][i] for name in METRICS if name in columns}, dict(missing))
    for i in range(len(systems))
  ]


def _measure_coco(
  systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, list[SegmentStatistics]]:
  texts = [text for group in (*references, *systems) for text in group]
  tokenized = iter(coco.tokenize_ptb(texts))
  tokenized_references = [[next(tokenized) for _ in segment] for segment in references]
  tokenized_systems = [[next(tokenized) for _ in hypotheses] for hypotheses in systems]
  return {
    "meteor": coco.meteor_by_system(tokenized_systems, tokenized_references),
    "rouge_l": [coco.rouge_l(texts, tokenized_references) for texts in tokenized_systems],
    "cider": [coco.cider(texts, tokenized_references) for texts in tokenized_systems],
  }


def check_references(references: Sequence[Sequence[str]]) -> None:
  """Raises ValueError unless every segment has references, each with a word in it."""
  if isinstance(references, str):
    raise ValueError(f"expected lists of references, got one string: {references[:40]!r}")
  if not references:
    raise ValueError("expected at least one segment to score, got none")
  for i, texts in enumerate(references):
    if isinstance(texts, str):
      raise ValueError(
        f"references[{i}] is one string; expected a list of strings. "
        f"Give a single reference as [{texts!r}]"
      )
    if not isinstance(texts, Sequence):
      raise ValueError(f"references[{i}]: expected a list of strings, got {texts!r:.100}")
    if not texts:
      raise ValueError(f"references[{i}] is empty; every segment needs at least one reference")
    for j, text in enumerate(texts):
      _check_text(f"references[{i}][{j}]", text)
      if not any(character.isalnum() for character in text):
        raise ValueError(f"references[{i}][{j}] has no word: {text!r:.100}. Leave it out")


def check_hypotheses(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
  """Raises ValueError unless there is one text for each segment."""
  if isinstance(hypotheses, str):
    raise ValueError(f"expected a list of hypotheses, got one string: {hypotheses[:40]!r}")
  if len(hypotheses) != len(references):
    raise ValueError(
      f"got {len(hypotheses)} hypotheses for {len(references)} segments of references; "
      "expected one hypothesis for each segment, in the same order"
    )
  for i, text in enumerate(hypotheses):
    _check_text(f"hypotheses[{i}]", text)


def _check_text(name: str, text: object) -> None:
  if not isinstance(text, str):
    raise ValueError(f"{name}: expected a string, got {text!r:.100}")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    half = text[error.start]
    raise ValueError(f"{name}: half of a surrogate pair, {half!a}, is not text") from None
