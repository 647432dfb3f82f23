"""The command: its plan, what it leaves out, and a stage from its learning rates to the report."""

import dataclasses
import re
import sys

import pytest

from experiments import paper
from experiments.configs.paper import STUDIES
from experiments.reproduction.runs import collect

from tests.docs.pages import page
from tests.experiments.reproduction.studies import patched, small
from tests.tiny_e2e import tiny_folder


def test_the_plan_has_every_stage_and_at_most_40_hours(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(
    paper, "stage_hours", hours := {s: paper.stage_hours(s) for s in paper.STAGES}.get
  )
  (folder := tmp_path / "rank" / "x").mkdir(parents=True)
  (folder / "planned.json").write_text("{}")
  paper.main(["--plan", f"--root={tmp_path}"])
  printed = capsys.readouterr().out
  for stage in paper.STAGES:
    assert re.search(rf"^\| {stage} +\|", printed, re.MULTILINE)
  assert re.search(r"^\| rank +\|.* 1 \|$", printed, re.MULTILINE)
  assert printed.count("not run") == len(paper.STAGES) - 1
  assert sum(hours(stage).hours for stage in paper.STAGES) < 40
  rows = [row for row in paper.plan(tmp_path / "without runs").splitlines()[2:] if row[:1] == "|"]
  assert len(rows) == len(paper.STAGES) + 1
  for row in rows:
    assert row in page("paper")


def test_a_stage_without_its_files_is_left_out_and_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(paper, "write_report", lambda *_: None)
  monkeypatch.setattr(paper, "keep_freed_memory", lambda: None)
  with pytest.raises(SystemExit, match="there is no folder data/samsum with its files"):
    paper.main(["--stage=samsum", f"--root={tmp_path}"])


def test_a_stage_without_its_model_is_left_out_and_named(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  (reason,) = paper.do_stage("rank_smollm2", tmp_path, tiny=False)
  assert reason.startswith("rank_smollm2: the model 'smollm2' is not in the cache")
  assert not (tmp_path / "rank_smollm2").exists()


@pytest.mark.long
@pytest.mark.parametrize("model", ["tiny", "embedded"])
def test_a_stage_from_its_learning_rates_to_the_verdicts(model, tmp_path, monkeypatch, capsys):
  sizes = STUDIES["sizes"]

  def make():
    config = sizes.make()
    if model == "tiny":
      config.model.folder = str(tiny_folder())
    return config

  study = small(sizes, ("lora_r4", "prefix_layer_2", "frozen", "floor"), make=make, rate_points=1)
  once = dataclasses.replace(study.arms["prefix_layer_2"], seeds=1)
  patched(
    monkeypatch,
    {"sizes": dataclasses.replace(study, arms={**study.arms, "prefix_layer_2": once})},
  )
  monkeypatch.setattr(paper, "keep_freed_memory", lambda: None)  # it is for whole processes
  monkeypatch.setattr("experiments.reproduction.report.decide_all", lambda evidence: [])
  monkeypatch.setattr("experiments.reproduction.plan.next_rate", lambda losses: None)
  flags = ["--stage=sizes", "--tiny", f"--root={tmp_path}"]
  paper.main(flags)
  records = [record for record in collect(tmp_path) if record["kind"] == "reported"]
  assert [(r["arm"], r["seed"]) for r in sorted(records, key=lambda r: (r["arm"], r["seed"]))] == [
    ("floor", 1),
    ("frozen", 1),
    ("lora_r4", 1),
    ("lora_r4", 2),
    ("prefix_layer_2", 1),
  ]
  for record in records:
    assert len(record["rows"]["exact"]) == 4
    if record["arm"] != "floor":  # the sums by input are the run's own validation loss
      mean = sum(record["input_losses"]) / sum(record["input_tokens"])
      assert mean == pytest.approx(record["valid_loss"], rel=1e-4)
  text = (tmp_path / "paper.md").read_text("utf-8")
  assert re.search(r"prefix_layer_2 .*\[.*detectable.*another base \|", text)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.json")}
  paper.main(flags)  # nothing is repeated
  assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.json")} == before


def test_stages_that_are_other_commands_run_in_the_root(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(paper.subspaces, "main", calls.append)
  monkeypatch.setattr(paper.intrinsic_dimension, "main", lambda flags: sys.exit("error: x"))
  assert paper.do_stage("subspaces_smollm2", tmp_path, tiny=True) == []
  assert calls == [[f"--root={tmp_path}/subspaces", "--tiny", "--model=smollm2"]]
  assert paper.do_stage("intrinsic", tmp_path, tiny=False) == ["intrinsic: error: x"]
