"""The command: its parts on a tiny model, its report, and what it refuses."""

import contextlib
import re

import pytest

from experiments import gpt2_e2e, mechanism
from experiments.analysis import capacity
from experiments.analysis.records import read_records
from experiments.comparison import plan
from experiments.comparison.plan import Planned, changes_of
from experiments.comparison.runs import carry_out
from experiments.configs import variants
from experiments.configs.variants import TINY
from experiments.harness.launch import RATE
from experiments.harness.sharing import claimed

from tests.experiments.analysis.records import sharp
from tests.tiny_e2e import tiny_folder


def test_the_plan_is_printed_and_nothing_is_done(tmp_path, capsys):
  mechanism.main(["--plan", "--arms=dora", f"--root={tmp_path}"])
  assert "| capacity  |           12 |" in capsys.readouterr().out
  assert not any(tmp_path.iterdir())


def test_the_report_of_the_lines_so_far(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(mechanism, "read_records", lambda path: [sharp("dora", 4.0)])
  monkeypatch.setattr(mechanism, "draw", lambda path, *rest: path.touch())
  mechanism.main(["--report", f"--root={tmp_path}", f"--runs={tmp_path}", f"--out={tmp_path}/x/y"])
  printed = capsys.readouterr().out
  assert (tmp_path / "x" / "y.md").read_text("utf-8") in printed
  assert (tmp_path / "x" / "y.png").exists()
  assert "| DoRA" in printed


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--report"], r"has no measurements of lora, .*; leave out --report\n"),
    (["--measure=intruders", "--runs={root}", "--arms=dora"], r"measurements of lora, dora yet\n"),
    (["--arms=dura"], r"the arms must be of lora, dora.*got 'dura'"),
    (["--out={root}"], r"--out.* is a folder, expected a file to write"),
    (["--report", "--root={root}/damaged"], r"mechanism.jsonl:1: .*Remove the line"),
  ],
)
def test_what_cannot_be_done_is_refused(flags, message, tmp_path):
  (tmp_path / "x.md").mkdir()
  (tmp_path / "damaged").mkdir()
  (tmp_path / "damaged" / "mechanism.jsonl").write_text("{\n")
  flags = [flag.format(root=tmp_path / "x" if "out" in flag else tmp_path) for flag in flags]
  with pytest.raises(SystemExit) as exit:
    mechanism.main([f"--root={tmp_path}/root", *flags])
  assert re.search(message, str(exit.value))


def test_without_the_comparisons_runs_the_intruders_are_named_as_missing(tmp_path, capsys):
  path = tmp_path / "lines.jsonl"
  assert mechanism.do_measurements("intruders", mechanism.TINY, ["lora"], tmp_path, path, "") == []
  assert "has no finished runs of lora: python -m experiments.variants --stage=seeds" in (
    capsys.readouterr().out
  )
  assert not path.exists()


def test_what_breaks_is_named_and_the_rest_is_done(tmp_path, monkeypatch, capsys):
  def measure(planned, sizes):
    if planned.arm == "lora":
      raise ValueError("a mistake")
    return {"parameters": 1}

  monkeypatch.setattr(mechanism, "measure_sharpness", measure)
  path, arms = tmp_path / "lines.jsonl", ["lora", "dora"]
  broken = mechanism.do_measurements("sharpness", mechanism.TINY, arms, tmp_path, path, " --tiny")
  assert len(broken) == 1
  assert broken[0].startswith("sharpness of lora (")
  assert "ValueError: a mistake" in capsys.readouterr().out
  (record,) = read_records(path)
  assert (
    record["command"] == "python -m experiments.mechanism --measure=sharpness --arms=dora --tiny"
  )
  monkeypatch.setattr(mechanism, "measure_sharpness", lambda *_: pytest.fail("measured again"))
  assert mechanism.do_measurements("sharpness", mechanism.TINY, ["dora"], tmp_path, path, "") == []


def test_a_measurement_of_another_process_is_waited_for(tmp_path, monkeypatch):
  path = tmp_path / "lines.jsonl"
  (planned,) = mechanism.plan_sharpness(mechanism.TINY, ["lora"])
  with contextlib.ExitStack() as other:
    other.enter_context(claimed(planned.claim(path)))

    def finish(seconds):
      mechanism.carry_out(planned, lambda _: {"parameters": 1}, "", path)
      other.close()

    monkeypatch.setattr(mechanism.time, "sleep", finish)
    monkeypatch.setattr(mechanism, "measure_sharpness", lambda *_: pytest.fail("measured twice"))
    assert (
      mechanism.do_measurements("sharpness", mechanism.TINY, ["lora"], tmp_path, path, "") == []
    )
  assert len(read_records(path)) == 1


@pytest.mark.long
def test_all_measurements_of_a_tiny_model(tmp_path, monkeypatch, capsys):
  def get_config(base):
    config = variants.get_config(base)
    config.model.folder = str(tiny_folder())
    return config

  monkeypatch.setattr(plan, "get_config", get_config)
  monkeypatch.setattr(mechanism, "keep_freed_memory", lambda: None)  # it is for whole processes
  plan.size_of.cache_clear()
  capacity.sized_config.cache_clear()
  arms, runs = ["lora", "eva", "full_finetuning"], tmp_path / "variants"
  for arm in arms[::2]:
    fields = {RATE: 3e-3, "seed": 1, "data.num_train_records": 48}
    planned = Planned("seeds", arm, changes_of(arm, "embedded", fields))
    assert carry_out([planned], TINY, runs, gpt2_e2e.run) == []
  flags = ["--tiny", f"--arms={','.join(arms)}", f"--root={tmp_path}/root", f"--runs={runs}"]
  mechanism.main(flags)
  records = read_records(tmp_path / "root" / "mechanism.jsonl")
  by_measure = {name: [r for r in records if r["measure"] == name] for name in mechanism.MEASURES}
  assert [r["arm"] for r in by_measure["sharpness"]] == arms
  for record in by_measure["sharpness"]:
    shares = record["start"]["shares"]
    names = {"lora_a", "lora_b"} if record["arm"] in arms[:2] else {"embedding", "kernel", "bias"}
    assert names <= {*shares}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert record["start"]["loss"] > record["later"]["loss"] > 0
  lora, _, full = by_measure["sharpness"]
  assert lora["start"]["loss"] == pytest.approx(full["start"]["loss"], rel=1e-5)
  assert {r["arm"] for r in by_measure["intruders"]} == {"lora", "full_finetuning"}
  assert all(r["relative_change"] > 0 and r["weights"] == 12 for r in by_measure["intruders"])
  assert {r["arm"] for r in by_measure["capacity"]} == {*arms[:2]}
  assert all(r["bits"] >= 0 and r["nats"] > 0 for r in by_measure["capacity"])
  assert (tmp_path / "root" / "mechanism.png").exists()
  plan.size_of.cache_clear()
  capacity.sized_config.cache_clear()
  capsys.readouterr()
  mechanism.main(flags)  # nothing is repeated
  assert read_records(tmp_path / "root" / "mechanism.jsonl") == records
