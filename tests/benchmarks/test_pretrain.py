"""The benchmark of pretraining: a tiny step in this process, the real one in separate processes."""

import json

import pytest

from benchmarks import pretrain

TINY = {
  "keep_freed_memory": False,
  "model.embed_dim": 32,
  "model.num_layers": 1,
  "fit.accumulation_steps": 2,
  "data.row_length": 32,
}


def test_a_tiny_step_is_measured_and_printed(capsys, monkeypatch):
  results = []
  monkeypatch.setattr(pretrain, "WAYS", {"as configured": TINY})
  monkeypatch.setattr(pretrain, "wait_for_start", lambda: 0.0)
  monkeypatch.setattr(pretrain, "finish", results.append)
  pretrain.run("as configured", rows=2, steps=1)
  assert set(results[0]) == {"tokens", "gflops", "matmul"}
  pretrain.print_table({"as configured": [{**results[0], "growth": 2.5}]})
  header, row = capsys.readouterr().out.splitlines()
  assert header.split() == ["way", "tokens/s", "x", "gflop/s", "share", "growth_mb"]
  cells = row.removeprefix("as configured").split()
  assert cells[1] == "1.00"
  assert 0 <= float(cells[3]) < 1.2


@pytest.mark.long
def test_the_benchmark_prints_its_table(capsys, monkeypatch):
  monkeypatch.setattr(pretrain, "WAYS", {"as configured": {}})  # the others take as long
  turns = pretrain.main(["--rows", "4", "--steps", "1", "--repeats", "1"])
  assert list(turns) == ["as configured"]
  out = capsys.readouterr().out.splitlines()
  assert json.loads(out[1]) == {"rows": 4, "steps": 1, "repeats": 1}
  cells = out[3].removeprefix("as configured").split()
  assert cells[1] == "1.00"
  assert 0 < float(cells[3]) < 1.2
