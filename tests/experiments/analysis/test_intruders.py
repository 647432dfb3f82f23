"""Intruders of a run's weights, and which runs of the comparison are read."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.analysis import intruders
from experiments.analysis.intruders import measure_intruders, plan_intruders
from experiments.analysis.summary import summarize
from experiments.configs.mechanism import TINY

from tests.experiments.comparison.records import record


def orthogonal(size, seed):
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def test_a_planted_output_vector_is_counted_and_an_unchanged_weight_is_not(tmp_path, monkeypatch):
  """The kernel is (inputs, outputs): the vector is one of its outputs."""
  outputs, inputs = orthogonal(24, 0), orthogonal(16, 1)
  before = inputs * np.arange(16, 0, -1.0) @ outputs[:, :16].T
  after = before + 50 * np.outer(inputs[:, 3], outputs[:, 20])
  base = {"h_0": {"attn": {"query": {"kernel": before}, "key": {"kernel": before}}}}
  trained = {"h_0": {"attn": {"query": {"kernel": after}, "key": {"kernel": before}}}}
  seen = []

  def load_run(folder):
    seen.append(folder)
    return SimpleNamespace(base=SimpleNamespace(params=base), params=trained)

  monkeypatch.setattr(intruders, "load_run", load_run)
  monkeypatch.setattr(intruders, "ALL_LINEAR", r".*/attn/(query|key)/kernel")
  (planned,) = plan_intruders([record("seeds", "lora", 1e-2, 1, 2.0) | {"folder": "a"}], ["lora"])
  result = measure_intruders(planned, tmp_path)
  assert seen == [tmp_path / "seeds" / "a"]
  assert result["weights"] == 1
  assert result["by_weight"] == {"h_0/attn/query/kernel": 1}
  assert result["intruders"] == dict.fromkeys(("0.3", "0.4", "0.5", "0.6", "0.7"), 1)
  assert result["effective_rank"] == pytest.approx(1)
  norm = np.linalg.norm(before)
  assert result["relative_change"] == pytest.approx(50 / norm)


def test_another_run_in_the_same_folder_is_measured_again():
  one, other = (
    plan_intruders([record("seeds", "lora", 1e-2, 1, loss) | {"folder": "a"}], ["lora"])[0]
    for loss in (2.0, 2.0 + 1e-9)
  )
  assert one.find([one._asdict()]) is not None
  assert other.find([one._asdict()]) is None
  results = [{"status": "finished", "intruders": {}, "loss": i} for i in range(2)]
  lines = [
    planned._asdict() | result for planned, result in zip([one, other], results, strict=True)
  ]
  (row,) = summarize(TINY, ["lora"], lines, [])
  assert row.intruders == lines[1:]


def test_only_finished_reported_runs_are_read():
  made = [
    record("rates", "lora", 1e-2, 0, 2.0),
    record("seeds", "lora", 1e-2, 1, 2.0),
    record("seeds", "lora", 1e-2, 2, 9.0, status="failed"),
    record("seeds", "dora", 1e-2, 1, 2.0),
  ]
  for number, made_record in enumerate(made):
    made_record["folder"] = f"run{number}"
  assert [planned.settings["run"] for planned in plan_intruders(made, ["lora"])] == ["run1"]
