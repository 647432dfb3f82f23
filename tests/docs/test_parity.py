"""docs/parity.md has what `python -m tests.parity` prints: all rows, each figure small enough."""

import re

import pytest

from tests import parity
from tests.paths import ROOT

PAGE = ROOT / "docs" / "parity.md"


def rows(title):
  """Returns the rows of a section's table by their first cell, and the names of its columns."""
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
  table, _ = rows(title)
  assert list(table) == names
  for name, cells in table.items():
    assert len(figures(cells)) >= (1 if name == "llama/qwen2_mixed" else least), name
    assert all(figure < 1e-5 for figure in figures(cells)), name


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
def test_the_command_has_the_same_columns():
  for title, row in (
    ("Models", parity.model_row("gpt2/tied")),
    ("Adapters", parity.adapter_row("fused")),
  ):
    table, columns = rows(title)
    assert len(row) == len(columns)
    assert row[1] == table[row[0]][0]
    assert all(figure < 1e-5 for figure in figures(row))
  assert columns == parity.ADAPTER_COLUMNS
  assert row[columns.index("same")] == "yes"


def test_the_settings_are_those_of_the_adapters():
  assert f"```\n{parity.settings()}\n```" in PAGE.read_text("utf-8")
