"""The report as a CSV file: one row for each group, then the paper's Tables 3 and 18."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.harness import paper as paper_tables
from experiments.nlg.groups import RATE, Group
from experiments.nlg.scores import METRICS, SCORES

VALUES = ("valid_loss", *SCORES)
LABELS = ("source", "run", "trainable", "examples", "learning_rate", "rank", "seeds")
PARTS = ("", "_deviation", "_low", "_high")  # deviation over seeds; the first seed's interval


def write_csv(path: Path, groups: Sequence[Group]) -> None:
  """Writes all numbers of the groups and the paper; a missing one is an empty cell."""
  names = [*LABELS, *(name + part for name in VALUES for part in PARTS)]
  with path.open("w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    writer.writerows(_ours(group) for group in groups)
    writer.writerows(_paper())


def _ours(group: Group) -> dict[str, object]:
  row: dict[str, object] = {
    "source": "runs",
    "run": group.label,
    "trainable": group.first.result["trainable_parameters"],
    "examples": group.first.result["num_train_records"],
    "learning_rate": group.settings.get(RATE),
    "rank": group.settings.get("lora.rank"),
    "seeds": len(group.runs),
  }
  for name in VALUES:
    if (statistic := group.statistic(name)) is not None:
      row |= {name: statistic.mean, f"{name}_deviation": statistic.deviation}
    if (interval := group.first.interval(name)) is not None:
      row |= {f"{name}_low": interval[0], f"{name}_high": interval[1]}
  return row


def _paper() -> Iterator[dict[str, object]]:
  for row in paper_tables.TABLE_3:
    cells: dict[str, object] = {"source": "paper, Table 3", "run": row.label}
    cells["trainable"] = row.trainable
    for name, value in zip(METRICS, row[2:], strict=True):
      cells |= {name: value.mean, f"{name}_deviation": value.deviation}
    yield cells
  for rank, values in paper_tables.TABLE_18.items():
    yield {"source": "paper, Table 18", "run": "GPT-2 M, LoRA", "rank": rank, **values}
