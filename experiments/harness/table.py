"""Results in the form of the paper's Table 3."""

from collections.abc import Mapping, Sequence
from typing import Any

METRICS = {
  "bleu": "BLEU",
  "nist": "NIST",
  "meteor": "METEOR",
  "rouge_l": "ROUGE-L",
  "cider": "CIDEr",
}
DIGITS = {"valid_loss": 3, "bleu": 2, "nist": 3, "meteor": 2, "rouge_l": 2, "cider": 3}
METHODS = {
  "lora": "LoRA",
  "full_finetuning": "full fine-tuning",
  "frozen_base": "frozen base",
  "template": "template",
}


def markdown(results: Sequence[dict[str, Any]]) -> str:
  """Returns a Markdown table with a row for each result."""
  head = ["model and method", "trainable", "lines", "valid loss", *METRICS.values()]
  return aligned([head, *map(_row, results)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Returns rows of cells, the first being the head, as a Markdown table.

  >>> print(aligned([["what", "BLEU"], ["LoRA", "70.40"]]))
  | what |  BLEU |
  | :--- | ----: |
  | LoRA | 70.40 |
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  widths = [max(width, 4) for width in widths]
  rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
  lines = []
  for row in [rows[0], rule, *rows[1:]]:
    first, *rest = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def by_rate(what: str, cells: Mapping[str, Mapping[float, str]], best: Mapping[str, float]) -> str:
  """Returns a table with a column for each learning rate, the best of each row in bold.

  Args:
    what: the head of the first column.
    cells: of each row, by rate.
    best: each row's best rate. If it is an end of several, a note says so.
  """
  rates = sorted({rate for row in cells.values() for rate in row})
  rows = [[what, *(f"{rate:g}" for rate in rates)]]
  for label, row in cells.items():
    bold = {**row, best[label]: f"**{row[best[label]]}**"}
    rows.append([label, *(bold.get(rate, "") for rate in rates)])
  edges = [
    label for label, row in cells.items() if len(row) > 1 and best[label] in (min(row), max(row))
  ]
  note = f"At an end of the rates that were tried: {'; '.join(edges)}." if edges else ""
  return f"{aligned(rows)}\n\nThe best of each row in bold. {note}".rstrip()


def number(name: str, value: float | None) -> str:
  """Returns a metric's value with its digits; what is missing is an empty cell."""
  return "" if value is None else f"{value:.{DIGITS[name]}f}"


def _row(result: dict[str, Any]) -> list[str]:
  scores = result.get("scores", {})
  variant = [f"GPT-2 {result['variant']}"] if result["variant"] else []
  return [
    ", ".join([*variant, METHODS[result["method"]]]),
    f"{result['trainable_parameters']:,}",
    f"{result['num_train_records']:,}",
    number("valid_loss", result["valid_loss"]),
    *(number(name, scores.get(name)) for name in METRICS),
  ]
