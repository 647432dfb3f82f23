"""docs/results has finished runs that the report reads, and the pages have their numbers."""

from experiments.harness.runs import read_runs
from experiments.nlg.groups import ROUNDED, TRAINED_ON, group_runs

from tests.docs.pages import DOCS, page

RESULTS = DOCS / "results"
LARGEST = 100_000  # bytes of a file
FORMATS = {"rtn2": "2-bit codes (`rtn2`)", "rtn3": "3-bit codes (`rtn3`)"}


def served():
  """Returns the groups of the runs on weights that are served."""
  folders = [path.parent for path in (RESULTS / "smollm2" / "served").rglob("result.json")]
  runs, unfinished = read_runs(sorted(folders))
  assert not unfinished
  return group_runs(runs)


def cells(group):
  """Returns a group's loss, BLEU and slot errors as the page prints them."""
  loss, bleu, errors = (group.first.value(n) for n in ("valid_loss", "bleu", "slot_error_rate"))
  return [f"{loss:.3f}", f"{bleu:.2f}", f"{errors:.2f}"]


def place(group):
  """Returns the row and the first column of a group in the page's table."""
  rounded = group.settings.get(ROUNDED)
  row = FORMATS.get(rounded, rounded) if rounded else "not rounded: W"
  for method, column in (("QA-LoRA", 8), ("LoftQ", 11)):
    if group.method_label.startswith(method):
      return row, column
  return row, 2 if group.settings.get(TRAINED_ON) else 5


def test_the_table_of_served_weights_has_the_numbers_of_the_results():
  section = page("smollm2").split("## Trained on the weights that are served\n")[1]
  lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")]
  rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
  expected = {row[0]: [*row[:2], *[""] * 12] for row in rows}
  for group in served():
    row, start = place(group)
    expected[row][start : start + 3] = cells(group)
  assert {row[0]: row for row in rows} == expected


def test_all_files_are_small_and_their_folders_in_the_overview():
  overview = (RESULTS / "README.md").read_text("utf-8")
  for result in RESULTS.rglob("result.json"):
    assert f"`{'/'.join(result.relative_to(RESULTS).parts[:2])}`" in overview
    files = [path for path in result.parent.iterdir() if path.is_file()]
    assert all(path.stat().st_size < LARGEST for path in files)
