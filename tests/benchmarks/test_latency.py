"""The benchmark of latency prints its table, and compares models that agree."""

import functools

import numpy as np
import pytest

from benchmarks import latency
from experiments.shapes import results


@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["--scanned", "--dtype=bfloat16"]])
def test_the_table_has_ratios_to_the_base_model(flags, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(latency, "keep_freed_memory", lambda: None)  # it is for whole processes
  latency.main(["--model=tiny", "--cases=tiny", "--turns=3", f"--save={tmp_path}/a.json", *flags])
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
  head, _, row = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
  assert head[3:] == ["ms", "merged LoRA x", "LoRA x", "Adapter_L x", "Adapter_H x"]
  assert row[:3] == ["2 x 8", "3, 3", "3"]
  assert all(float(cell.split()[0]) > 0 for cell in row[3:])
  saved = results.read(results.Latencies, tmp_path / "a.json")
  assert [len(way.seconds) for way in saved.cases[0].ways] == [3] * 5


def test_saved_cases_of_earlier_calls_are_kept(monkeypatch, tmp_path):
  def cases(options):
    yield ["sizes"], None
    way = results.Way("base", (options.seconds,))
    for case in latency.CASES[options.cases]:
      yield [str(case)], results.TimedCase(*case, (way,))

  monkeypatch.setattr(latency, "keep_freed_memory", lambda: None)
  monkeypatch.setattr(latency, "run", cases)
  path = tmp_path / "a.json"
  for seconds, name in enumerate(["cpu", "table1"], 1):
    latency.main([f"--cases={name}", f"--seconds={seconds}", f"--save={path}"])
  saved = results.read(results.Latencies, path).cases
  assert [(*case.sizes[:2], case.ways[0].seconds[0]) for case in saved] == [
    *((4, 256, 1.0), (32, 512, 2.0), (16, 256, 2.0), (1, 128, 2.0))
  ]
  for flag, message in (
    ("--dtype=bfloat16", r"expected medium, bfloat16, .*, unrolled layers\. .* --save another"),
    ("--scanned", r"expected medium, float32, .*, scanned layers\. .* --save another"),
  ):
    words = r"a\.json has times of medium, float32, .*, unrolled layers, "
    with pytest.raises(SystemExit, match=words + message):
      latency.main(["--cases=cpu", flag, f"--save={path}"])


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    *((f"--turns={turns}", r"--turns must be an integer in \[3, ") for turns in ("0", "-3", "1")),
    ("--seconds=nan", r"--seconds must be a finite number in \[0, inf\), got nan"),
    ("--save=.", r"--save=\.: \. is a folder, expected a file to write"),
  ],
)
def test_flags_are_checked_before_the_work(flag, message, monkeypatch):
  monkeypatch.setattr(latency, "run", lambda options: pytest.fail("it was timed"))
  monkeypatch.setattr(latency, "keep_freed_memory", lambda: None)
  with pytest.raises(SystemExit, match=f"error: {message}"):
    latency.main(["--model=tiny", "--cases=tiny", flag])


def test_ratios_are_of_the_same_turn():
  times = {"base": [1.0, 2.0, 4.0], "merged LoRA": [1.0, 2.2, 4.0], "LoRA": [2.0, 4.0, 8.0]}
  cells = latency.row(latency.Case(1, 128, 224, 112), times)
  assert cells[:4] == ["1 x 128", "224, 112", "3", "2000.0"]
  assert cells[4:] == ["1.000 (1.000-1.050)", "2.000 (2.000-2.000)"]


def test_turns_end_at_their_number_or_time():
  ways = dict.fromkeys(("base", "LoRA"), lambda: np.zeros(1))
  assert {len(times) for times in latency.measure(ways, 5, 60.0).values()} == {5}
  assert {len(times) for times in latency.measure(ways, 5, 0.0).values()} == {3}


@pytest.mark.parametrize(("merged", "unmerged"), [(2.0, 2.1), (1.0, 1.0)])
def test_models_that_differ_stop_the_benchmark(merged, unmerged):
  outputs = {"base": 1.0, "merged LoRA": merged, "LoRA": unmerged}
  ways = {
    name: functools.partial(lambda x: [np.full(3, x)], value) for name, value in outputs.items()
  }
  with pytest.raises(ValueError, match="LoRA and the merged model differ by"):
    latency.check_agreement(ways, "float32")


@pytest.mark.parametrize("case", latency.CASES["table1"], ids=lambda case: str(case.length))
def test_the_sizes_are_the_papers(case):
  """24 layers of 1024: Adapter_L has one adapter and norm in a layer, Adapter_H two adapters."""
  size = 0.5e6 if case.length == 512 else 11.09e6
  lin = 24 * (2 * 1024 * case.lin_width + case.lin_width + 1024) + 2 * 24 * 1024
  houlsby = 48 * (2 * 1024 * case.houlsby_width + case.houlsby_width + 1024)
  assert abs(lin - size) < 24 * 2049 / 2  # no other width is closer
  assert abs(houlsby - size) < 48 * 2049 / 2
