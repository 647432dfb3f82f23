"""Formats scores of generated texts like the paper's Table 3, and the slot error rate."""

from collections.abc import Sequence
from typing import Any

from experiments.harness.methods import find_method
from experiments.harness.table import aligned

METRICS = {
  "bleu": "BLEU",
  "nist": "NIST",
  "meteor": "METEOR",
  "rouge_l": "ROUGE-L",
  "cider": "CIDEr",
}
SCORES = {**METRICS, "slot_error_rate": "SER"}
DIGITS = {
  "slot_error_rate": 2,
  "valid_loss": 3,
  "bleu": 2,
  "nist": 3,
  "meteor": 2,
  "rouge_l": 2,
  "cider": 3,
}


def markdown(results: Sequence[dict[str, Any]]) -> str:
  """Returns a Markdown table with a row for each result."""
  head = ["model and method", "trainable", "examples", "valid loss", *SCORES.values()]
  return aligned([head, *map(_row, results)])


def model_label(variant: str) -> str:
  """Returns the model that a variant of `configs/gpt2_e2e.py` adapts."""
  return "SmolLM2" if variant == "smollm2" else f"GPT-2 {variant}"


def number(name: str, value: float | None) -> str:
  """Returns a metric's value with its digits, or an empty cell if it is missing."""
  return "" if value is None else f"{value:.{DIGITS[name]}f}"


def _row(result: dict[str, Any]) -> list[str]:
  scores = result.get("scores", {})
  variant = [model_label(result["variant"])] if result["variant"] else []
  return [
    ", ".join([*variant, find_method(result["method"]).label]),
    f"{result['trainable_parameters']:,}",
    f"{result['num_train_records']:,}",
    number("valid_loss", result["valid_loss"]),
    *(number(name, scores.get(name)) for name in SCORES),
  ]
