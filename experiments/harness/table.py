"""Tables in Markdown."""

from collections.abc import Mapping, Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table; the first row of cells is its header.

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


def by_rate(
  header: str, cells: Mapping[str, Mapping[float, str]], best: Mapping[str, float]
) -> str:
  """Returns a table with a column for each learning rate, the best of each row in bold.

  Args:
    header: the first column's header.
    cells: each row's cells by learning rate.
    best: each row's best learning rate. A note names the rows where it is the lowest or highest
      that was tried.
  """
  rates = sorted({rate for row in cells.values() for rate in row})
  rows = [[header, *(f"{rate:g}" for rate in rates)]]
  for label, row in cells.items():
    bold = {**row, best[label]: f"**{row[best[label]]}**"}
    rows.append([label, *(bold.get(rate, "") for rate in rates)])
  edges = [
    label for label, row in cells.items() if len(row) > 1 and best[label] in (min(row), max(row))
  ]
  note = f"At an end of the learning rates that were tried: {'; '.join(edges)}." if edges else ""
  return f"{aligned(rows)}\n\nThe best of each row in bold. {note}".rstrip()
