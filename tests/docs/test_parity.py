"""docs/parity.md has the tables of `python -m tests.parity`: all rows, each figure small enough."""

import re

import pytest

from tests import parity
from tests.paths import ROOT

PAGE = ROOT / "docs" / "parity.md"


def rows(title):
  """Returns the cells of a section's table by their row's first cell, and the heads."""
  section = PAGE.read_text("utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
  lines = [line for line in section.splitlines() if line.startswith("|")]
  cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
  return {row[0]: row[1:] for row in cells[2:]}, cells[0]


def figures(cells):
  return [float(cell) for cell in cells if re.fullmatch(r"\d+e-\d+|0", cell)]


@pytest.mark.parametrize(
  ("title", "names", "least"),
  [("Models", parity.MODELS, 2), ("Adapters", list(parity.ADAPTERS), 5)],
)
def test_all_rows_are_there_and_small(title, names, least):
  found, _ = rows(title)
  assert list(found) == names
  for name, cells in found.items():
    assert len(figures(cells)) >= (1 if name == "llama/qwen2_mixed" else least), name
    assert all(figure < 1e-5 for figure in figures(cells)), name


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
def test_the_command_has_the_same_columns():
  for title, row in (
    ("Models", parity.model_row("gpt2/tied")),
    ("Adapters", parity.adapter_row("fused")),
  ):
    found, head = rows(title)
    assert len(row) == len(head)
    assert row[1 : 2 if title == "Models" else 3] == found[row[0]][: 1 if title == "Models" else 2]
    assert all(figure < 1e-5 for figure in figures(row))
