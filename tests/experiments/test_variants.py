"""The command of the comparison: its page of published lines, and what it refuses."""

import re

import pytest

from experiments import variants
from experiments.comparison import plan
from experiments.comparison.lines import read_lines, write_lines
from experiments.comparison.plan import first_rates
from experiments.comparison.summary import summarize
from experiments.configs import variants as configs
from experiments.configs.variants import FULL, TINY

from tests.experiments.comparison.records import record, records
from tests.tiny_e2e import tiny_folder


def test_the_page_of_published_lines(tmp_path, capsys):
  lines = tmp_path / "runs.jsonl"
  write_lines(lines, records())
  variants.main([f"--lines={lines}", f"--out={tmp_path}/new/page"])
  printed = capsys.readouterr().out
  assert (tmp_path / "new" / "page.md").read_text("utf-8") in printed
  assert "<table" in (tmp_path / "new" / "page.html").read_text("utf-8")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--report"], r"has no finished runs: leave out --report"),
    (["--lines={root}/missing"], r"there is no file .*missing"),
    (["--stage=seeds", "--arms=dora"], r"no learning rates of lora, dora are known: run --stage"),
    (["--stage=rates", "--arms=dura"], r"the arms must be of lora, dora.*got 'dura'"),
    (["--stage=smollm2"], r"--tiny has no --stage=smollm2: leave out --tiny"),
    (["--out={root}"], r"--out.*"),
  ],
)
def test_what_cannot_be_done_is_refused(flags, message, tmp_path, capsys):
  (tmp_path / "x.html").mkdir()
  flags = [flag.format(root=tmp_path / "x" if "out" in flag else tmp_path) for flag in flags]
  with pytest.raises(SystemExit) as exit:
    variants.main([*flags, "--tiny", f"--root={tmp_path}/root"])
  assert re.search(message, str(exit.value))


@pytest.fixture
def rates(monkeypatch):
  """Records of two arms' learning rates, of which the lowest is DoRA's best; and the runs done."""
  lora = first_rates("lora", "embedded", 3)
  made = [record("rates", "lora", rate, 0, abs(rate - lora[1])) for rate in lora]
  made += [record("rates", "dora", rate, 0, rate) for rate in lora]
  done = []
  monkeypatch.setattr(variants, "collect", lambda root: made)
  monkeypatch.setattr(variants, "carry_out", lambda runs, *rest: done.extend(runs) or [])
  return made, done


def test_an_arm_without_a_bracketed_learning_rate_is_not_reported(tmp_path, rates):
  left = variants.do_stage("seeds", TINY, tmp_path, ["dora", "pissa"])
  reason = "(learning rate not bracketed)"
  assert left == [f"{tmp_path / 'seeds' / arm} {reason}" for arm in ("dora", "pissa")]
  assert {run.arm for run in rates[1]} == {"lora"}


def test_an_arm_that_stays_without_a_bracket_does_not_stop_the_others(tmp_path, rates, monkeypatch):
  monkeypatch.setattr(plan, "MAX_ADDED_RATES", 0)
  left = variants.do_stage("rates", TINY, tmp_path, ["dora"])
  assert left == [f"{tmp_path / 'rates' / 'dora'} (learning rate not bracketed)"]
  assert [run.arm for run in rates[1]] == [plan.FROZEN]


def test_a_missing_model_is_found_before_the_runs(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)
  monkeypatch.setattr(variants, "do_stage", lambda *_: pytest.fail("a stage was started"))
  plan.size_of.cache_clear()
  with pytest.raises(FileNotFoundError, match="Fetch it once: make smollm2"):
    variants.do_all("all", FULL, tmp_path, [])


@pytest.mark.long
def test_all_parts_from_the_rates_to_the_page(tmp_path, monkeypatch):
  def get_config(base):
    config = configs.get_config(base)
    config.model.folder = str(tiny_folder())
    return config

  monkeypatch.setattr(plan, "get_config", get_config)
  monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)  # it is for whole processes
  plan.size_of.cache_clear()
  flags = ["--tiny", "--arms=pissa,full_finetuning", f"--root={tmp_path}"]
  variants.main(flags)
  plan.size_of.cache_clear()
  text = (tmp_path / "variants.md").read_text("utf-8")
  assert "not ranked: its own size" in text
  assert "### Expected best loss by the number of random draws" in text
  (table,) = summarize(read_lines(tmp_path / "runs.jsonl")).tables
  rows = {row.label: row for row in table.rows}
  assert rows["PiSSA"].parameters == rows["LoRA"].parameters
  assert rows["PiSSA"].verdict in ("better", "worse", "equivalent", "cannot be told")
  for row in rows.values():
    assert row.seeds == len(TINY.seeds)
    measured = (row.step_seconds, row.gflop, row.step_megabytes, row.adapter_bytes)
    assert all(value and value > 0 for value in measured)
    assert row.forgetting is not None
    assert min(table.rates[row.label]) < row.rate < max(table.rates[row.label])
  full, lora = rows["full fine-tuning"], rows["LoRA"]
  assert full.gflop > lora.gflop
  assert full.step_megabytes > lora.step_megabytes
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.json")}
  variants.main(flags)  # nothing is repeated
  assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.json")} == before
