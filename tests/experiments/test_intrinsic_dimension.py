"""The command: d90 from results on disk, its plan, and what it refuses."""

import json
import re

import pytest

from experiments import intrinsic_dimension
from experiments.analysis import intrinsic
from experiments.analysis.intrinsic import planned_runs, read_curves
from experiments.analysis.runs import do_runs
from experiments.configs import intrinsic_dimension as configs
from experiments.configs.intrinsic_dimension import BASES, FULL, TINY
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

from tests.docs.pages import page
from tests.tiny_e2e import tiny_folder

BASE = "20 M tokens"
LOSSES = {  # nats per token; 90 % of the gain is 1.1
  "frozen_base": 2.0,
  "full_finetuning": 1.0,
  "dim=4,rate=0.1": 1.9,
  "dim=4,rate=1": 1.5,
  "dim=16,rate=0.1": 1.05,
  "dim=16,rate=1": None,  # failed
}


def write(root, losses=LOSSES, base=BASE):
  configs = {config.workdir: config for config in planned_runs(TINY, [base], root)[base]}
  for name, loss in losses.items():
    folder = root / base / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(configs[str(folder)].to_json())
    file, content = ("failed.json", {}) if loss is None else ("result.json", {"valid_loss": loss})
    (folder / file).write_text(json.dumps(content))


def test_d90_is_the_smallest_dimension_with_the_share(tmp_path):
  write(tmp_path)
  (curve,), missing = read_curves(TINY, [BASE], tmp_path)
  assert missing == []
  assert curve.shares == pytest.approx({4: 0.5, 16: 0.95})
  assert curve.d90 == 16
  assert curve.unbracketed == [4, 16]
  assert curve._replace(whole=0.5).d90 is None


def test_the_report_has_the_table_and_what_is_missing(tmp_path, capsys):
  write(tmp_path)
  rest = {"dim=4,rate=0.1": None, "dim=4,rate=1": None}
  write(tmp_path, {**dict(list(LOSSES.items())[:2]), **rest}, "new weights")
  write(tmp_path, LOSSES | {"full_finetuning": 2.0}, "0.2 M tokens")  # gains nothing
  intrinsic_dimension.main(["--tiny", "--report", f"--root={tmp_path}"])
  text = (tmp_path / "intrinsic_dimension.md").read_text("utf-8")
  assert text in capsys.readouterr().out
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
  assert ["20 M tokens", "2.000", "1.000", "16", "50 %", "95 %"] in rows
  assert ["new weights", "2.000", "1.000", "above 4", "failed", ""] in rows
  assert "- new weights: 2 runs are not finished, such as dim=16,rate=0.1." in text
  assert "- 2 M tokens: 6 runs are not finished, such as frozen_base." in text
  assert "- 20 M tokens: the best learning rate is an end of those tried at 4, 16." in text
  assert ["0.2 M tokens", "2.000", "2.000", "none up to 16", "", ""] in rows
  assert "- 0.2 M tokens: no d90 up to 16: full fine-tuning ends with a loss of 2.000, not" in text
  assert (tmp_path / "intrinsic_dimension.png").stat().st_size > 1000


def test_runs_with_other_settings_are_refused(tmp_path):
  """Those of --tiny are no part of the study, although some have its names."""
  write(tmp_path)
  with pytest.raises(
    ValueError, match=r"frozen_base is a run with other settings than are planned"
  ):
    read_curves(FULL, [BASE], tmp_path)


def test_every_planned_run_is_a_valid_config(tmp_path):
  plans = planned_runs(FULL, [*BASES], tmp_path)
  runs = [read_config(E2EConfig, config) for base in plans.values() for config in base]
  assert len({run.workdir for run in runs}) == len(runs) == 4 * (2 + 7 * 3)
  assert {run.method for run in runs} == {"frozen_base", "full_finetuning", "random_subspace"}
  assert {run.model.start for run in runs} == {"pretrained", "random"}
  dims = {run.random_subspace.dim for run in runs if run.method == "random_subspace"}
  assert dims == {*FULL.dims}
  assert intrinsic.plan(FULL, [*BASES]) in page("subspaces"), "paste the output of --plan"


def test_a_failed_run_is_a_result_and_the_rest_is_done(tmp_path, capsys):
  first, second, third, *_ = planned_runs(TINY, [BASE], tmp_path)[BASE]
  asked = []

  def run(config):
    asked.append(config.workdir)
    (tmp_path / BASE / config.workdir.rpartition("/")[2]).mkdir(parents=True, exist_ok=True)
    if config is first:
      raise FloatingPointError("the loss is nan")
    if config is second:
      raise ValueError("a mistake")
    return {"valid_loss": 1.0}

  for _ in range(2):
    assert do_runs([first, second, third], run) == [second.workdir]
  assert asked.count(first.workdir) == 1
  printed = capsys.readouterr().out
  assert "failed: the loss is nan" in printed
  assert "failed before" in printed
  assert "ValueError: a mistake" in printed


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--report"], "no base model whose own loss and full fine-tuning are finished yet"),
    (["--out={root}/worse"], r"--out.* is a folder, expected a file to write"),
  ],
)
def test_what_cannot_be_done_is_refused(flags, message, tmp_path):
  write(tmp_path / "worse", {"frozen_base": 2.0, "full_finetuning": 3.0})
  (tmp_path / "worse.md").mkdir()
  flags = [flag.format(root=tmp_path) for flag in flags]
  with pytest.raises(SystemExit) as exit:
    intrinsic_dimension.main(["--tiny", f"--root={tmp_path}/root", *flags])
  assert re.search(message, str(exit.value))


@pytest.mark.long
def test_all_parts_on_a_tiny_model(tmp_path, monkeypatch):
  def get_config():
    config = configs.variants.get_config("embedded")
    config.model.folder = str(tiny_folder())
    return config

  monkeypatch.setattr(intrinsic, "get_config", get_config)
  monkeypatch.setattr(intrinsic_dimension, "keep_freed_memory", lambda: None)  # of processes
  flags = ["--tiny", f"--root={tmp_path}", "--bases", BASE]
  intrinsic_dimension.main(flags)
  text = (tmp_path / "intrinsic_dimension.md").read_text("utf-8")
  assert "not finished" not in text
  (curve,), _ = read_curves(TINY, [BASE], tmp_path)
  assert set(curve.losses) == {*TINY.dims}
  assert curve.whole < curve.frozen
  monkeypatch.setattr(intrinsic_dimension.gpt2_e2e, "train", lambda *_: pytest.fail("again"))
  intrinsic_dimension.main(flags)
