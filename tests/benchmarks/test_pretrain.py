"""The benchmark of pretraining runs, in processes of its own."""

import json

from benchmarks import pretrain


def test_the_benchmark_prints_its_table(capsys, monkeypatch):
  monkeypatch.setattr(pretrain, "WAYS", {"as configured": {}})  # the others take as long
  turns = pretrain.main(["--rows", "4", "--steps", "1", "--repeats", "1"])
  assert list(turns) == ["as configured"]
  out = capsys.readouterr().out.splitlines()
  assert json.loads(out[1]) == {"rows": 4, "steps": 1, "repeats": 1}
  cells = out[3].removeprefix("as configured").split()
  assert cells[1] == "1.00"
  assert 0 < float(cells[3]) < 1.2
