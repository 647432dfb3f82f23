"""Writes the comparison as one HTML file without links to anything else, and as Markdown."""

import dataclasses
import html
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.comparison.summary import Row, Summary, Table
from experiments.configs.variants import MARGIN, RANK, SCALING
from experiments.harness.table import aligned, by_rate

TEMPLATE = Path(__file__).parent / "page.html"
BASES = {"embedded": "The embedded base model", "smollm2": "SmolLM2"}


class Column(NamedTuple):
  """A column of the results: the field of `Row`, its header, and its digits."""

  name: str
  label: str
  form: Callable[[Any], str] = "{:,}".format
  larger: bool = False  # is better


COLUMNS = (
  Column("loss", "loss, nats/token", "{:.4f}".format),
  Column("loss_deviation", "± over seeds", "{:.4f}".format),
  Column("seeds", "seeds"),
  Column("bleu", "BLEU", "{:.2f}".format, larger=True),
  Column("wikipedia_loss", "Wikipedia loss, nats/token", "{:.3f}".format),
  Column("forgetting", "forgetting, nats/token", "{:+.3f}".format),
  Column("parameters", "trained parameters"),
  Column("adapter_bytes", "bytes on disk"),
  Column("step_seconds", "step, s", "{:.3f}".format),
  Column("step_ratio", "step, x LoRA's", "{:.2f}".format),
  Column("gflop", "step, GFLOP", "{:.1f}".format),
  Column("step_megabytes", "step's memory, MB", "{:.0f}".format),
  Column("rate", "learning rate", "{:g}".format),
  Column("tried", "learning rates tried"),
  Column("failed_share", "failed runs, share", "{:.2f}".format),
  Column("best_of_draws", "best of the draws", "{:.4f}".format),
)
NOTES = (
  f"Ranked arms have the trained parameters of LoRA of rank {RANK} within 5 %; the others have "
  f"their own size, are plotted, and are not ranked. alpha / rank is held at {SCALING:g}.",
  "Loss is that on the validation examples. Differences to LoRA have simultaneous 95 % intervals: "
  "bootstrap over seeds and inputs, corrected over all ranked arms "
  "(experiments/comparison/statistics.py).",
  f"Equivalent: the interval lies within the margin of {MARGIN:g} nats per token, which was fixed "
  "before the runs. Better or worse: it excludes 0. Otherwise it cannot be told.",
  "Forgetting is the loss on held-out Wikipedia articles, less the base model's own. Memory is "
  "that of a compiled train step with the base model. A run has failed if its training was not "
  "finite, or ended with a loss above the base model's.",
)


def write_page(summary: Summary, out: str | Path) -> str:
  """Writes OUT.html and OUT.md; returns the Markdown."""
  text = markdown(summary)
  Path(out).parent.mkdir(parents=True, exist_ok=True)
  Path(f"{out}.md").write_text(text, "utf-8")
  Path(f"{out}.html").write_text(page(summary), "utf-8")
  return text


def used_columns(table: Table) -> list[Column]:
  """Returns the columns with a value in some row."""
  return [c for c in COLUMNS if any(getattr(row, c.name) is not None for row in table.rows)]


def cell(row: Row, column: Column) -> str:
  value = getattr(row, column.name)
  return "" if value is None else column.form(value)


def difference(row: Row, prefix: str = "", digits: int = 4) -> str:
  """Returns a difference to LoRA with its interval, or an empty cell."""
  names = (f"{prefix}difference", f"{prefix}low", f"{prefix}high")
  ends = [getattr(row, name) for name in names]
  if None in ends:
    return ""
  value, low, high = (f"{end:+.{digits}f}" for end in ends)
  return f"{value} [{low}, {high}]"


def statements(table: Table) -> list[str]:
  """Returns the conclusions as sentences."""
  lines = []
  kinds = {
    "better": "Better than LoRA",
    "worse": "Worse than LoRA",
    "equivalent": f"Equivalent to LoRA within {MARGIN:g} nats per token",
    "cannot be told": "Cannot be told apart from LoRA, nor shown to be equivalent",
  }
  for verdict, words in kinds.items():
    names = [row.label for row in table.rows if row.verdict == verdict]
    if names:
      lines.append(f"{words}: {', '.join(names)}.")
  if not lines:
    lines.append("No arm can be compared with LoRA yet.")
  if table.detectable is not None:
    lines.append(
      f"The smallest difference in loss that would be detected in 80 % of such experiments is "
      f"{table.detectable:.4f} nats per token (median over the arms)."
    )
  if table.bleu_detectable is not None:
    lines.append(f"That in BLEU is {table.bleu_detectable:.2f}.")
  lines += [f"Missing runs ({stage}): {words}." for stage, words in table.missing.items()]
  if table.base_loss is not None:
    lines.append(f"The base model itself has a loss of {table.base_loss:.3f} nats per token.")
  return lines


def effort_rows(table: Table) -> list[list[str]]:
  """Returns the expected best loss by the number of draws, a header first; empty without draws."""
  longest = max((len(curve) for curve in table.effort.values()), default=0)
  counts = [count for count in (1, 2, 3, 4, 6, 8, 12) if count <= longest]
  if not counts:
    return []
  rows = [["draws", *map(str, counts)]]
  for name, curve in table.effort.items():
    rows.append([name, *(f"{curve[n - 1]:.3f}" if n <= len(curve) else "" for n in counts)])
  return rows


def rate_cells(table: Table) -> tuple[dict[str, dict[float, str]], dict[str, float]]:
  """Returns the cells of losses by arm and learning rate, and each arm's best rate."""
  cells = {
    name: {rate: f"{loss:.3f}" if math.isfinite(loss) else "failed" for rate, loss in row.items()}
    for name, row in table.rates.items()
  }
  return cells, {name: min(row, key=lambda rate: row[rate]) for name, row in table.rates.items()}


def provenance(summary: Summary) -> str:
  devices, commits = ", ".join(summary.devices), ", ".join(summary.commits)
  return f"Devices: {devices}; commits {commits}; {summary.hours:.2f} hours of training."


# ---- Markdown ----------------------------------------------------------------------------


def markdown(summary: Summary) -> str:
  parts = ["# LoRA's variants compared", *(f"- {note}" for note in NOTES)]
  text = "\n".join([parts[0], "", *parts[1:]])
  return "\n\n".join([text, *map(_section, summary.tables), provenance(summary)]) + "\n"


def _section(table: Table) -> str:
  columns = used_columns(table)
  has_bleu = any(row.bleu_difference is not None for row in table.rows)
  head = ["arm", "against LoRA", "difference in loss"]
  head += ["difference in BLEU"] if has_bleu else []
  rows = [[*head, *(column.label for column in columns)]]
  for row in table.rows:
    cells = [row.label, row.verdict, difference(row)]
    cells += [difference(row, "bleu_", 2)] if has_bleu else []
    rows.append([*cells, *(cell(row, column) for column in columns)])
  parts = [f"## {BASES[table.base]}", " ".join(statements(table)), aligned(rows)]
  if table.rates:
    cells, best = rate_cells(table)
    parts += ["### Validation loss by learning rate", by_rate("arm", cells, best)]
  if effort := effort_rows(table):
    parts += ["### Expected best loss by the number of random draws", aligned(effort)]
  return "\n\n".join(parts)


# ---- HTML --------------------------------------------------------------------------------


def page(summary: Summary) -> str:
  """Returns the HTML file's text. Its tables need no script; sorting and plots do."""
  body = ["<h1>LoRA's variants compared</h1>", "<ul>"]
  body += [f"<li>{html.escape(note)}</li>" for note in NOTES]
  body.append("</ul>")
  for table in summary.tables:
    body += _html_section(table)
  body.append(f"<p>{html.escape(provenance(summary))}</p>")
  data = {
    "columns": [{"name": c.name, "label": c.label, "larger": c.larger} for c in COLUMNS],
    "tables": {table.base: [_plotted(row) for row in table.rows] for table in summary.tables},
  }
  text = TEMPLATE.read_text("utf-8").replace("@@BODY@@", "\n".join(body))
  return text.replace("@@DATA@@", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def _plotted(row: Row) -> dict[str, Any]:
  values = dataclasses.asdict(row)
  ranked = row.difference is not None or row.verdict == "the control"
  return {c.name: values[c.name] for c in COLUMNS} | {"label": row.label, "ranked": ranked}


def _html_section(table: Table) -> Iterator[str]:
  yield f'<section aria-labelledby="{table.base}">'
  yield f'<h2 id="{table.base}">{BASES[table.base]}</h2>'
  yield f"<p>{html.escape(' '.join(statements(table)))}</p>"
  yield from _html_results(table)
  yield "<h3>Any two columns</h3>"
  yield f'<figure class="pareto" data-base="{table.base}" hidden>'
  yield "<fieldset><legend>Columns of the plot</legend>"
  for axis, words in (("x", "horizontal"), ("y", "vertical")):
    yield f'<label>{words}: <select name="{axis}"></select></label>'
    checked = " checked" if axis == "x" else ""
    yield f'<label><input type="checkbox" name="log{axis}"{checked}> logarithmic</label>'
  yield '</fieldset><svg viewBox="0 0 900 520" role="img"></svg><figcaption></figcaption></figure>'
  yield "<noscript><p>Sorting and the plot need JavaScript.</p></noscript>"
  if table.rates:
    cells, _ = rate_cells(table)
    rates = sorted({rate for row in cells.values() for rate in row})
    rows = [["arm", *(f"{rate:g}" for rate in rates)]]
    rows += [[name, *(row.get(rate, "") for rate in rates)] for name, row in cells.items()]
    yield from _html_table(rows, "Validation loss by learning rate, one seed that is not reported")
  if effort := effort_rows(table):
    yield from _html_table(effort, "Expected best validation loss by the number of random draws")
  yield "</section>"


def _html_results(table: Table) -> Iterator[str]:
  columns = used_columns(table)
  has_bleu = any(row.bleu_difference is not None for row in table.rows)
  heads = ["arm", "against LoRA", "difference in loss"]
  heads += ["difference in BLEU"] if has_bleu else []
  heads += [column.label for column in columns]
  yield '<div class="scroll" tabindex="0" role="region" aria-label="results">'
  yield '<table class="sortable"><caption>A header sorts by its column</caption><thead><tr>'
  for i, head in enumerate(heads):
    kind = ' class="text"' if i < 2 else ""
    yield f'<th scope="col"{kind}>{html.escape(head)}</th>'
  yield "</tr></thead><tbody>"
  for row in table.rows:
    cells = [_cell(difference(row), row.difference)]
    cells += [_cell(difference(row, "bleu_", 2), row.bleu_difference)] if has_bleu else []
    cells += [_cell(cell(row, c), getattr(row, c.name)) for c in columns]
    name, verdict = html.escape(row.label), html.escape(row.verdict)
    first = f'<th scope="row" data-value="{name}">{name}</th>'
    first += f'<td class="text" data-value="{verdict}">{verdict}</td>'
    yield f"<tr>{first}{''.join(cells)}</tr>"
  yield "</tbody></table></div>"


def _cell(text: str, value: float | None) -> str:
  shown = "" if value is None else f"{value:.10g}"
  return f'<td data-value="{shown}">{html.escape(text)}</td>'


def _html_table(rows: Sequence[Sequence[str]], caption: str) -> Iterator[str]:
  yield f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
  yield f"<table><caption>{html.escape(caption)}</caption><thead><tr>"
  yield "".join(f'<th scope="col">{html.escape(head)}</th>' for head in rows[0])
  yield "</tr></thead><tbody>"
  for name, *cells in rows[1:]:
    values = "".join(f"<td>{html.escape(text)}</td>" for text in cells)
    yield f'<tr><th scope="row">{html.escape(name)}</th>{values}</tr>'
  yield "</tbody></table></div>"
