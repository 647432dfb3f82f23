"""Formats the scores of generated texts as rows of a table."""

from collections.abc import Sequence
from typing import Any

from experiments.harness.methods import find_method
from experiments.harness.table import aligned

HEADS = {
  "valid_loss": "valid loss",
  "bleu": "BLEU",
  "nist": "NIST",
  "meteor": "METEOR",
  "rouge_l": "ROUGE-L",
  "cider": "CIDEr",
  "slot_error_rate": "SER",
  "ter": "TER",
  "mean_ter": "mean TER",
  "rouge1": "ROUGE-1",
  "rouge2": "ROUGE-2",
  "rougeL": "ROUGE-L",
  "logical_form": "logical form",
  "accuracy": "accuracy",
  "exact": "exact",
  "slots": "slots",
}
THREE_DIGITS = ("valid_loss", "nist", "cider")
LOWER_IS_BETTER = ("slot_error_rate", "ter", "mean_ter")
FLOOR = "⌊"
"""Marks scores whose interval reaches the floor, a score that needs no model."""


def markdown(results: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
  """Returns a Markdown table with a row for each result, and a column for each metric."""
  head = ["model and method", "trainable", "examples", "valid loss", *map(header, metrics)]
  return aligned([head, *(_row(result, metrics) for result in results)])


def metric_of(name: str) -> str:
  """Returns the metric of a column, without the part of the inputs.

  >>> metric_of("mean_ter_unseen")
  'mean_ter'
  """
  return name if name in HEADS else name.rpartition("_")[0]


def lower_is_better(name: str) -> bool:
  """Tells whether the metric of a column is an error rate."""
  return metric_of(name) in LOWER_IS_BETTER


def reaches_floor(name: str, interval: Sequence[float], level: float) -> bool:
  """Tells whether an interval of a column's score reaches the floor's score.

  >>> reaches_floor("bleu", (20, 30), 25), reaches_floor("mean_ter", (20, 30), 40)
  (True, False)
  """
  low, high = interval
  return high >= level if lower_is_better(name) else low <= level


def header(name: str) -> str:
  """Returns a column's header.

  >>> header("mean_ter_unseen")
  'mean TER unseen'
  """
  part = name.removeprefix(metric_of(name)).replace("_", " ")
  return HEADS[metric_of(name)] + part


def digits(name: str) -> int:
  """Returns the number of digits after the point that a column shows."""
  return 3 if metric_of(name) in THREE_DIGITS else 2


def model_label(variant: str) -> str:
  """Returns the model that a variant of `configs/gpt2_e2e.py` adapts."""
  return "SmolLM2" if variant == "smollm2" else f"GPT-2 {variant}"


def number(name: str, value: float | None) -> str:
  """Returns a metric's value with its digits, or an empty cell if it is missing."""
  return "" if value is None else f"{value:.{digits(name)}f}"


def _row(result: dict[str, Any], metrics: Sequence[str]) -> list[str]:
  scores = result.get("scores", {})
  variant = [model_label(result["variant"])] if result["variant"] else []
  return [
    ", ".join([*variant, find_method(result["method"]).label]),
    f"{result['trainable_parameters']:,}",
    f"{result['num_train_records']:,}",
    number("valid_loss", result["valid_loss"]),
    *(number(name, scores.get(name)) for name in metrics),
  ]
