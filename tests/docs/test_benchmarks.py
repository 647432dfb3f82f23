"""docs/benchmarks.md: its commands run, its tables have the columns that are printed."""

import importlib
import re
import shlex

import pytest

from benchmarks import decode, e2e_epoch, transform

from tests.paths import ROOT

PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
COMMAND = re.compile(r"python -m (benchmarks\.\w+[^`\n]*)")
COMMANDS = sorted(set(COMMAND.findall(PAGE)))
OF_GOALS = COMMAND.findall((ROOT / "docs" / "performance.md").read_text())


def section(title):
  return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def table(title):
  """Returns a section's table: the columns' names, and the cells by row."""
  blocks = re.findall(r"```\n(.*?)```", section(title), flags=re.DOTALL)
  header, *rows = next(block for block in blocks if "\n" in block.strip()).splitlines()
  return header.split(), [row.split() for row in rows if row]


def explained(title):
  """Returns the names in the first cells of a section's tables."""
  cells = re.findall(r"^\| (`.*?) \|", section(title), flags=re.MULTILINE)
  return {name for cell in cells for name in re.findall(r"`\(?(.*?)\)?`", cell)}


def test_every_benchmark_is_on_the_page():
  files = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
  assert {f"benchmarks.{path.stem}" for path in files} == {line.split()[0] for line in COMMANDS}


@pytest.mark.parametrize("command", sorted({*COMMANDS, *OF_GOALS}))
def test_the_flags_of_a_command_exist(command):
  name, *flags = shlex.split(command, comments=True)
  known = (ROOT / (name.replace(".", "/") + ".py")).read_text()
  assert all(f'"{flag}"' in known for flag in flags if flag.startswith("--"))
  module = importlib.import_module(name)
  if hasattr(module, "parse") and "--against" not in flags:
    module.parse(flags)


def test_the_columns_are_those_of_the_train_step():
  header, rows = table("The train step")
  assert [name for name in header if name in transform.COLUMNS] == [
    name for name in transform.COLUMNS if name not in ("retrace_s", "lower_s")
  ]
  names = {name.strip("()") for name in header} - {"form", "way"}
  assert explained("The train step") >= names | set(transform.WAYS)
  assert [row[1] for row in rows] == [*transform.WAYS] * 2
  hand = {row[0]: row for row in rows if row[1] == "hand"}
  for row in rows:
    for column in (4, 6):  # gflop and temp_mb, which are counts
      ratio = float(row[column]) / float(hand[row[0]][column])
      assert float(row[column + 1]) == pytest.approx(ratio, abs=0.01)


def test_the_columns_are_those_of_an_epoch(capsys):
  turns = {0: e2e_epoch.Turn(1.0, 1.0)}
  trainer = e2e_epoch.Trainer(lambda batch: 0.0, lambda: None, 1)
  data = [{"segment_ids": []}]
  way = e2e_epoch.Way(trainer, data, {}, turns=turns)  # pyright: ignore[reportArgumentType]
  options = e2e_epoch.parse([])
  e2e_epoch.print_table(options, {"lora_jax packed": way, "PEFT dynamic": way, "PEFT packed": way})
  header, rows = table("An epoch against PEFT")
  assert header == capsys.readouterr().out.splitlines()[1].split()
  assert {" ".join(row[:2]) for row in rows} <= explained("An epoch against PEFT")
  for name, *cells in ([" ".join(row[:2]), *row[2:]] for row in rows):
    steps, step_ms, epoch_s = (float(cells[i]) for i in (2, 3, 4))
    assert epoch_s == pytest.approx(steps * step_ms / 1e3, rel=2e-3), name


def test_the_columns_are_those_of_beam_search(capsys):
  result = {"batch": 1, "first": 1.0, "seconds": [1.0], "result": decode.Decoded([[1]], [0.0], 1)}
  decode.print_table({"lora_jax": result})
  header, rows = table("Beam search against transformers")
  assert header == capsys.readouterr().out.splitlines()[1].split()
  assert set(header) - {"way"} <= explained("Beam search against transformers")
  seconds = [float(row[3]) for row in rows[:2]]
  assert float(rows[0][4]) == pytest.approx(seconds[0] / seconds[1], abs=0.0051)
