"""Results in the form of the paper's Table 3."""

from collections.abc import Sequence
from typing import Any

METRICS = {
  "bleu": "BLEU",
  "nist": "NIST",
  "meteor": "METEOR",
  "rouge_l": "ROUGE-L",
  "cider": "CIDEr",
}
DIGITS = {"bleu": 2, "nist": 3, "meteor": 2, "rouge_l": 2, "cider": 3}


def markdown(results: Sequence[dict[str, Any]]) -> str:
  """Returns a Markdown table with a row for each result."""
  head = ["model and method", "trainable", "lines", "valid loss", *METRICS.values()]
  rows = [head, ["---", *["---:"] * (len(head) - 1)], *map(_row, results)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _row(result: dict[str, Any]) -> list[str]:
  scores = result.get("scores", {})
  cells = [
    "" if scores.get(name) is None else f"{scores[name]:.{DIGITS[name]}f}" for name in METRICS
  ]
  return [
    f"GPT-2 {result['variant']}, {result['method'].replace('_', ' ')}",
    f"{result['trainable_parameters']:,}",
    f"{result['num_train_records']:,}",
    f"{result['valid_loss']:.3f}",
    *cells,
  ]
