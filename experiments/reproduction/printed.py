"""The paper's values, as tables by the study in whose section they are."""

from collections.abc import Iterator, Mapping, Sequence

from experiments.harness import paper, paper_gpt3
from experiments.nlg.paper_rows import TABLES
from experiments.nlg.scores import HEADS, header, metric_of
from experiments.reproduction.blocks import Block, Rows, Table, Text


def column_header(name: str) -> str:
  """Returns a column's header; that of a metric that text metrics do not have is its name."""
  return header(name) if metric_of(name) in HEADS else name


def printed_blocks(name: str, tables: str) -> Iterator[Block]:
  """Yields the paper's values that belong into a study's section.

  Args:
    name: of the study.
    tables: of the paper, as the study names them.
  """
  if not any(map(str.isdigit, tables)):
    yield Text("The paper has no such experiment.")
  if name in OTHER_DATA:
    yield Text(OTHER_DATA[name])
  for caption, rows in PAPER.get(name, {}).items():
    yield Text(f"{caption}, as printed (arXiv 2106.09685v2):")
    yield Table(rows)


def _value(value: paper.Value) -> str:
  return f"{value.mean:g}" + ("" if value.deviation is None else f" ± {value.deviation:g}")


def _score_rows(rows: Sequence[paper.ScoreRow]) -> list[list[str]]:
  names = list(rows[0].scores)
  head = ["model, method", "trained", *(column_header(name) for name in names)]
  return [head, *([r.label, r.trainable, *map(_value, r.scores.values())] for r in rows)]


def _table_2() -> list[list[str]]:
  head = ["model", "method", "trained", *paper.TASKS_2]
  rows = [
    [r.model, r.label, r.trainable, *(_value(r.scores[task]) for task in paper.TASKS_2)]
    for r in paper.TABLE_2
  ]
  return [head, *rows]


def _table_18() -> list[list[str]]:
  rows = [[str(rank), *(f"{x:g}" for x in row.values())] for rank, row in paper.TABLE_18.items()]
  return [["rank", *(column_header(name) for name in paper.NAMES_18)], *rows]


PAPER: Mapping[str, Mapping[str, Rows]] = {  # by study; other studies of the same table have none
  "rank": {"Table 6, GPT-3": paper_gpt3.TABLE_6, "Table 18, E2E, GPT-2 M": _table_18()},
  "weights": {"Table 5, GPT-3, 18 M parameters": paper_gpt3.TABLE_5},
  "sizes": {"Table 15, GPT-3": paper_gpt3.TABLE_15},
  "low_data": {"Table 16, GPT-3": paper_gpt3.TABLE_16},
  "e2e_smollm2": {"Table 3, E2E": _score_rows(TABLES["e2e"].rows)},
  "webnlg": {"Table 14, WebNLG": _score_rows(TABLES["webnlg"].rows)},
  "dart_dev": {"Table 13, DART": _score_rows(TABLES["dart"].rows)},
  "samsum": {"Table 4, SAMSum, GPT-3": _score_rows(paper.TABLE_4_SAMSUM)},
  "glue_cola": {"Table 2, GLUE": _table_2()},
}
OTHER_DATA = {
  "wikisql": "Table 4 has WikiSQL with its own columns: its values are not shown beside these.",
  "mnli_text": "Table 4 has MNLI's whole validation set: its values are not shown beside these.",
}
"""Studies whose data are not those of the paper's table, and the reason why it is not shown."""
