"""Runs of a sweep that are trained in one program: which, and that each is an ordinary run."""

import json
from pathlib import Path

import pytest

from experiments import gpt2_e2e
from experiments.configs.gpt2_e2e import get_config
from experiments.harness.concurrent import _Rungs, groups, train_together
from experiments.harness.launch import _check_concurrent, _sweep, apply
from experiments.harness.workdir import stopped_early, write_json

from tests.tiny_e2e import tiny_config
from tests.tiny_training import interrupted_at

VALID = "valid/loss"


def mini(folder):
  del folder
  return get_config("mini")


def configs(folder, *changes, make=mini):
  """Returns runs with these changed fields, each in a folder of its own."""
  config = make(folder)
  config.decoding.num_inputs = 0
  return [
    apply(config, fields | {"workdir": str(Path(folder) / str(i))})
    for i, fields in enumerate(changes)
  ]


def test_runs_are_grouped_by_what_they_share(tmp_path):
  runs = configs(
    tmp_path,
    {"seed": 1},
    {"lora.rank": 32, "lora.alpha": 3.0, "lora.dropout": 0.5, "decoding.num_beams": 3},
    {"optimizer.weight_decay": 0.1, "optimizer.learning_rate": 1.0, "data.num_epochs": 2},
    {"data.batch_size": 4},
    {"data.batch_size": 4, "seed": 3},
    {"method": "full_finetuning"},
    {"lora.tokens": ("a",)},
    {"mesh.data": 2},
    {"model.start": "random"},
    {"model.start": "random", "seed": 5},
    {"seed": 4},
    {"method": "dylora", "lora.rank": 32},
    {"method": "dylora"},
  )
  folder = Path(runs[10].workdir)
  folder.mkdir()
  (folder / "result.json").write_text("{}")
  together, reasons = groups(runs)
  names = [[Path(run.workdir).name for run in group] for group in together]
  assert names == [["1", "0", "2"], ["3", "4"]]  # the largest rank first
  assert groups([runs[0], runs[10]])[0] == [[runs[0]]]  # its partner is finished
  by_name = {Path(workdir).name: reason for workdir, reason in reasons.items()}
  assert set(by_name) == {"5", "6", "7", "8", "9", "11", "12"}
  assert "method=full_finetuning is not plain LoRA" in by_name["5"]
  assert "method=dylora is not plain LoRA" in by_name["11"]  # it draws up to the padded rank
  assert "lora.tokens" in by_name["6"]
  assert "mesh" in by_name["7"]
  assert "no other run has the same base model" in by_name["8"] == by_name["9"]


def test_the_worse_half_is_stopped(tmp_path):
  folders = [str(tmp_path / name) for name in "abcd"]
  rungs = [_Rungs(10, folders)]

  def at(step: int, **losses: float) -> list[str]:
    for name, loss in losses.items():
      (tmp_path / name).mkdir(exist_ok=True)
      with (tmp_path / name / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, VALID: loss}) + "\n")
      rungs[-1].evaluated.add(str(tmp_path / name))
    return [Path(name).name for name in rungs[-1].stop(folders)]

  assert at(5, a=1.0, b=2.0, c=3.0) == []  # no rung
  assert at(10, a=3.0, b=1.0, c=2.0) == ["a"]
  assert at(20, b=9.0) == []  # the first that gets there
  rungs.append(_Rungs(10, folders))  # of a resumed sweep
  assert at(10, d=5.0) == ["d"]  # a later run is compared with those before it
  assert at(20, c=1.0) == []
  assert at(30, b=9.0, c=1.0) == []
  reason = stopped_early(tmp_path / "a")
  assert reason.startswith("stopped at step 10, where its validation loss, 3.0000, was not in")
  assert stopped_early(tmp_path / "b") == ""
  write_json(tmp_path / "a" / "result.json", {})
  assert stopped_early(tmp_path / "a") == ""  # it was resumed, and is finished


def no_trainings(config):
  raise AssertionError("nothing is loaded")


def test_runs_of_other_kinds_are_named(tmp_path, capsys):
  runs = configs(tmp_path, {"seed": 1}, {"method": "dora"})
  assert train_together(runs, no_trainings, 2) == {}
  printed = capsys.readouterr().out
  assert "1 is trained on its own: method=dora is not plain LoRA" in printed
  assert "0 is trained on its own: no other run" in printed


def test_the_error_of_a_group_leaves_the_others(tmp_path):
  runs = configs(
    tmp_path, {"seed": 1}, {"seed": 2}, *({"seed": i, "data.batch_size": 4} for i in (1, 2))
  )
  started = []

  def failing(config):
    started.append(config.data.batch_size)
    raise ValueError("no model")

  early = train_together(runs, failing, 2)
  assert len(started) == 2
  assert {name: str(error) for name, error in early.items()} == {
    run.workdir: "no model" for run in runs
  }


def test_rungs_are_at_evaluations(tmp_path):
  runs = configs(tmp_path, {"seed": 1}, {"seed": 2})
  with pytest.raises(ValueError, match=r"--halving_steps=4 must be .* fit.eval_every_steps=100"):
    train_together(runs, no_trainings, 2, halving_steps=4)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0, 200, True, no_trainings), "--halving_steps=200 is for --concurrent; add --concurrent=K"),
    ((4, 0, False, no_trainings), "--concurrent=4 is for the runs of a sweep; add --sweep"),
    ((4, 0, True, None), "--concurrent=4: this experiment trains one run at a time"),
  ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    _check_concurrent(*arguments)
  _check_concurrent(4, 200, True, no_trainings)
  _check_concurrent(0, 0, False, None)


def test_a_stopped_run_is_neither_done_nor_failed(tmp_path, capsys):
  runs, done = configs(tmp_path, {"seed": 1}, {"seed": 2}), []
  _sweep(lambda run: done.append(run.seed) or {}, runs, {runs[0].workdir: "stopped at step 10"})
  assert done == [2]
  printed = capsys.readouterr().out
  assert "stopped at step 10. Its own command resumes it" in printed
  assert printed.endswith(", 1 of them stopped early\n")


@pytest.mark.long
def test_runs_trained_together_are_ordinary_runs(tmp_path):
  """Four runs in two slots, interrupted and resumed: one diverges, the others are ordinary runs."""
  changes = [
    {"lora.rank": 2, "seed": 1, "lora.dropout": 0.1},
    {"optimizer.learning_rate": 1e30},
    {"optimizer.weight_decay": 0.5, "lora.alpha": 3.0},
    {"seed": 2, "optimizer.learning_rate": 3e-2},
  ]
  runs = configs(tmp_path / "together", *changes, make=tiny_config)
  with interrupted_at(4):  # by the first run that gets there
    train_together(runs, gpt2_e2e.trainings, 2)
  early = train_together(runs, gpt2_e2e.trainings, 2)
  assert list(early) == [runs[1].workdir]
  assert isinstance(early[runs[1].workdir], FloatingPointError)
  alone = configs(tmp_path / "alone", *changes, make=tiny_config)
  for i in (0, 2):
    result, expected = gpt2_e2e.run(runs[i]), gpt2_e2e.run(alone[i])
    assert result["concurrent_runs"] == 2
    assert 0 < result["train_tokens"] <= expected["train_tokens"]  # of the last session
    for name in ("valid_loss", "last_valid_loss"):
      assert result[name] == pytest.approx(expected[name], rel=1e-4)
    lines, others = (
      [json.loads(x) for x in (Path(run.workdir) / "metrics.jsonl").read_text().splitlines()]
      for run in (runs[i], alone[i])
    )
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
      for name in set(line) - {"train/tokens_per_second"}:
        assert line[name] == pytest.approx(other[name], rel=1e-3), (name, line["step"])
    files = {path.name for path in Path(runs[i].workdir).glob("[!.]*")}
    assert files - {path.name for path in Path(alone[i].workdir).glob("[!.]*")} == {
      "concurrent.json"
    }


@pytest.mark.long
def test_a_run_that_halving_stopped_is_resumed_by_its_own_command(tmp_path):
  """Of two runs compared after three steps the slow one is stopped; its command trains the rest."""
  short = {"fit.num_train_steps": 6, "optimizer.warmup_steps": 1}
  changes = [short | {"optimizer.learning_rate": rate} for rate in (3e-2, 1e-6)]
  better, slow = configs(tmp_path / "together", *changes, make=tiny_config)
  early = train_together([better, slow], gpt2_e2e.trainings, 2, halving_steps=3)
  reason = early.pop(slow.workdir)
  assert early == {}
  assert reason == stopped_early(slow.workdir)
  assert reason.startswith("stopped at step 3, where its validation loss, ")
  assert losses_by_step(slow) == pytest.approx(
    {step: loss for step, loss in losses_by_step(better).items() if step <= 3}, rel=0.1
  )
  result = gpt2_e2e.run(slow)
  assert stopped_early(slow.workdir) == ""
  (alone,) = configs(tmp_path / "alone", changes[1], make=tiny_config)
  assert result["valid_loss"] == pytest.approx(gpt2_e2e.run(alone)["valid_loss"], rel=1e-4)
  assert losses_by_step(slow) == pytest.approx(losses_by_step(alone), rel=1e-4)
  assert max(losses_by_step(slow)) == max(losses_by_step(better)) == 6


def losses_by_step(run):
  lines = map(json.loads, (Path(run.workdir) / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
