"""The report as a CSV file: one row for each group, then the paper's rows for the data sets."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.harness import paper as paper_tables
from experiments.nlg.config import DataSet
from experiments.nlg.groups import RATE, Group, data_name
from experiments.nlg.paper_rows import TABLES

LABELS = ("source", "data", "run", "trainable", "examples", "learning_rate", "rank", "seeds")
PARTS = ("", "_deviation", "_low", "_high")  # deviation over seeds; the first seed's interval


def write_csv(
  path: Path, groups: Sequence[Group], metrics: Sequence[str], data_sets: Sequence[DataSet]
) -> None:
  """Writes all numbers of the groups and the paper; a missing one is an empty cell.

  Args:
    path: the file.
    groups: of all data sets.
    metrics: all that some data set has.
    data_sets: those of which the paper's rows are written.
  """
  values = ("valid_loss", *metrics)
  names = [*LABELS, *(name + part for name in values for part in PARTS)]
  with path.open("w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    writer.writerows(_ours(group, values) for group in groups)
    writer.writerows(_paper(data_sets))


def _ours(group: Group, values: Sequence[str]) -> dict[str, object]:
  row: dict[str, object] = {
    "source": "runs",
    "data": data_name(group.first),
    "run": group.label,
    "trainable": group.first.result["trainable_parameters"],
    "examples": group.first.result["num_train_records"],
    "learning_rate": group.settings.get(RATE),
    "rank": group.settings.get("lora.rank"),
    "seeds": len(group.runs),
  }
  for name in values:
    if (statistic := group.statistic(name)) is not None:
      row |= {name: statistic.mean, f"{name}_deviation": statistic.deviation}
    if (interval := group.first.interval(name)) is not None:
      row |= {f"{name}_low": interval[0], f"{name}_high": interval[1]}
  return row


def _paper(data_sets: Sequence[DataSet]) -> Iterator[dict[str, object]]:
  for data_set in data_sets:
    table = TABLES[data_set]
    for row in table.rows:
      cells: dict[str, object] = {"source": f"paper, {table.name}", "data": data_set}
      cells |= {"run": row.label, "trainable": row.trainable}
      for name, value in row.scores.items():
        cells |= {name: value.mean, f"{name}_deviation": value.deviation}
      yield cells
  if "e2e" in data_sets:
    for rank, values in paper_tables.TABLE_18.items():
      label = {"source": "paper, Table 18", "data": "e2e", "run": "GPT-2 M, LoRA", "rank": rank}
      yield {**label, **values}
