"""Whole training runs: interrupted and resumed, they end with the same bits."""

import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.data.batches import as_grain
from lora_jax.training import loop, progress
from lora_jax.training.checkpoint import Checkpoints
from lora_jax.training.finite import Diagnosis, all_finite
from lora_jax.training.loop import Evaluation, FitConfig, evaluate_loss, fit
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh
from lora_jax.training.metrics_log import MetricsLog, read_metrics
from lora_jax.training.step import StepMetrics, make_eval_step

from tests.paths import ROOT
from tests.tiny_training import (
  STEPS,
  batches,
  examples,
  fresh_params,
  interrupted_at,
  method,
  model,
  train,
)


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
  """Keeps compiled programs: every run here compiles the same ones."""
  options = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@cache
def undisturbed(name="lora"):
  """Returns the result of an uninterrupted run, and its folder."""
  workdir = Path(mkdtemp(prefix="undisturbed-"))
  return train(workdir, name), workdir


def lines(workdir):
  """Returns a run's log without its times."""
  kept = read_metrics(workdir / "metrics.jsonl")
  return [{k: v for k, v in line.items() if k != "train/tokens_per_second"} for line in kept]


def assert_same(got, got_workdir, name="lora"):
  expected, workdir = undisturbed(name)
  for tree, expected_tree in ((got.last, expected.last), (got.best, expected.best)):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected_tree), strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert (got.best_step, got.best_loss) == (expected.best_step, expected.best_loss)
  assert got.last_loss == expected.last_loss
  assert lines(got_workdir) == lines(workdir)


def copied(tmp_path, name="lora"):
  """Returns a copy of an undisturbed run's folder."""
  shutil.copytree(undisturbed(name)[1], tmp_path / "run")
  return tmp_path / "run"


def test_one_program_looks_for_numbers_that_are_not_finite(tmp_path):
  """Before the first step and at each checkpoint: of many leaves it takes seconds to compile."""
  all_finite.clear_cache()
  train(tmp_path)
  assert all_finite._cache_size() == 1


def test_a_run_learns_and_reports(tmp_path):
  fitted, workdir = undisturbed()
  log = read_metrics(workdir / "metrics.jsonl")
  training = {line["step"]: line["train/loss"] for line in log if "train/loss" in line}
  valid = {line["step"]: line["valid/loss"] for line in log if "valid/loss" in line}
  assert list(training) == list(range(1, STEPS + 1))
  assert list(valid) == [3, 6, 8]
  assert training[STEPS] < training[1]
  assert fitted.best_loss == min(valid.values())
  assert fitted.best_step == min(valid, key=valid.__getitem__)
  assert fitted.last_loss == valid[STEPS]
  data = batches()
  assert fitted.tokens == sum(np.count_nonzero(data[i]["segment_ids"]) for i in range(STEPS))
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps() == sorted({6, 8, fitted.best_step})


def test_checkpoints_have_no_base_weights():
  """Neither an array of a base weight's shape, nor more elements than adapter and moments have."""
  fitted, workdir = undisturbed()
  base = {x.shape for x in jax.tree.leaves(model(num_layers=1)[1]) if x.ndim > 1}
  args = ocp.args.Composite(state=ocp.args.StandardRestore())
  for folder in (workdir / "checkpoints").iterdir():
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      arrays = checkpointer.restore(folder, args=args)["state"]
    assert not base & {array.shape for array in arrays.values()}
    adapter = sum(x.size for x in jax.tree.leaves(fitted.last))
    assert sum(array.size for array in arrays.values()) == 3 * adapter + 2 + 2  # counts, key


def test_tensorboard_files_have_the_same_metrics():
  _, workdir = undisturbed()
  (file,) = (workdir / "tensorboard").iterdir()
  data, tags, place = file.read_bytes(), [], 0
  while place < len(data):  # TFRecord: length, its checksum, the data, their checksum
    length = int.from_bytes(data[place : place + 8], "little")
    tags.append(data[place + 12 : place + 12 + length])
    place += 12 + length + 4
  assert place == len(data)
  assert sum(b"train/loss" in tag for tag in tags) == STEPS
  assert sum(b"valid/loss" in tag for tag in tags) == 3


@pytest.mark.parametrize("name", ["lora", pytest.param("full_finetuning", marks=pytest.mark.long)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, name):
  command = [sys.executable, "-m", "tests.tiny_training", tmp_path, "--method", name]
  run = subprocess.run([*command, "--kill_at", "6"], cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == -signal.SIGKILL, run.stderr
  shown = run.stderr.splitlines()  # the console has a line for each log interval, and no more
  assert [line.split(":")[0] for line in shown] == [f"step {i} of {STEPS}" for i in range(1, 6)]
  with (tmp_path / "metrics.jsonl").open("a") as log:
    log.write('{"step": 6, "train/lo')
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [3, 4]
  assert_same(train(tmp_path, name), tmp_path, name)


def test_saving_by_time_changes_nothing(tmp_path):
  """Step 5 is saved only because of the time, and the run resumes from there."""
  with interrupted_at(5):
    train(tmp_path, checkpoint_every_seconds=1e-9)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.steps()[-2:] == [4, 5]
  assert_same(train(tmp_path), tmp_path)


@pytest.mark.parametrize(("seconds", "due"), [(0.0, False), (60.0, False), (1e-9, True)])
def test_all_processes_save_by_the_clock_of_the_first(seconds, due, monkeypatch):
  """Process 0 says so; the others' own clocks do not count."""
  config = FitConfig(8, 8, 8, checkpoint_every_seconds=seconds)
  assert loop._is_due(time.monotonic() - 1, config) == due
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  for first in (False, True):
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _, first=first: first)
    assert loop._is_due(time.monotonic() - 1, config) == (first and seconds > 0)


def test_the_time_left_leaves_out_compilation(monkeypatch, tmp_path, capsys):
  clock = [0.0]
  monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
  metrics = StepMetrics(*map(jnp.asarray, (1.0, 2.0, 0.5)))
  with Checkpoints(tmp_path / "checkpoints") as checkpoints, MetricsLog(tmp_path) as log:
    window = progress.Window(14, log, progress.NoBar(), True, None, Diagnosis(checkpoints, {}))
    for step, seconds in ((5, 100.0), (6, 2.0), (7, 2.0), (8, 2.0)):  # resumed after step 4
      clock[0] += seconds
      window.add(step, metrics, 10)
      if step != 7:
        window.flush()
  shown = capsys.readouterr().err.splitlines()
  assert shown == [
    "step 5 of 14: loss 1.000, 0 tokens/s",
    "step 6 of 14: loss 1.000, 5 tokens/s, 0:00:16 left",
    "step 8 of 14: loss 1.000, 5 tokens/s, 0:00:12 left",
  ]
  speeds = [line["train/tokens_per_second"] for line in read_metrics(tmp_path / "metrics.jsonl")]
  assert speeds == [0.1, 5.0, 5.0]


def test_a_full_disk_stops_the_log_with_one_line(tmp_path):
  """The first error is reported, not one of closing the files."""

  def fill_the_disk():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path) as log:
      log.write(1, {"loss": 0.5})
      resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
      try:
        log.write(2, {"loss": 0.5})
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

  message = r"metrics\.jsonl could not be written \(File too large\)\. The run's checkpoints are"
  with pytest.raises(OSError, match=message):
    fill_the_disk()
  assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_run_killed_after_its_last_checkpoint_only_reports(tmp_path):
  workdir = copied(tmp_path)
  got = train(workdir)
  assert_same(got, workdir)
  assert got.tokens == 0


def test_a_run_resumes_before_a_damaged_checkpoint(tmp_path, caplog):
  workdir = copied(tmp_path)
  (data,) = (workdir / "checkpoints" / str(STEPS) / "state" / "d").iterdir()
  os.truncate(data, data.stat().st_size // 2)
  assert_same(train(workdir), workdir)
  assert f"the checkpoint of step {STEPS}" in caplog.text
  assert "set aside" in caplog.text


def test_checkpoints_of_another_run_are_refused(tmp_path):
  workdir = copied(tmp_path)
  with pytest.raises(ValueError, match=r"another state: .*expected"):
    train(workdir, "full_finetuning")
  with pytest.raises(ValueError, match=r"longer run: .* step 8, and num_train_steps is 7"):
    train(workdir, steps=7)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  with pytest.raises(FloatingPointError, match=r"of step \d: nan; .*Try a lower learning rate"):
    train(tmp_path, learning_rate=1e38)
  for line in read_metrics(tmp_path / "metrics.jsonl"):
    assert all(math.isfinite(value) for value in line.values())
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.steps() == []


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
  """The second step's own loss is finite; its update is not."""
  with pytest.raises(FloatingPointError, match=r"weights of step 2: nan; .*nothing was saved yet"):
    train(tmp_path, steps=2, learning_rate=lambda count: jnp.where(count == 1, jnp.nan, 0.01))


def test_batches_that_end_early_are_an_error(tmp_path):
  count = len(batches())
  message = f"ended before step {count + 1} of 99. Lower num_train_steps, or give more epochs"
  with pytest.raises(ValueError, match=message):
    train(tmp_path, "full_finetuning", steps=99, eval_every_steps=99)


def test_evaluation_is_exact_over_uneven_batches():
  loss = method("full_finetuning")(language_model_loss(model()[0]))
  step, params = make_eval_step(loss), fresh_params()
  data = batches(13, None, batch_size=8, epochs=1)
  several = batches(13, None, batch_size=2, epochs=1)
  weights = [float(several[i]["target_weights"].sum()) for i in range(len(several))]
  assert len(several) > 1
  assert len(set(weights)) > 1
  whole, split = (
    evaluate_loss(step, params, params, iter(x), make_mesh()) for x in (data, several)
  )
  assert whole == pytest.approx(split, rel=1e-6)
  apply = jax.jit(lambda batch: loss.apply(params, params, batch, lora_key=None))
  total = sum(float(apply(several[i]).total) for i in range(len(several)))
  assert split == pytest.approx(total / sum(len(e.targets) for e in examples(13)), rel=1e-6)
  with pytest.raises(ValueError, match="there are no validation batches"):
    evaluate_loss(step, params, params, [], make_mesh())


def test_a_custom_evaluation_chooses_the_best(tmp_path):
  """The middle one of three is called the best, whatever its loss."""
  params, evaluated = fresh_params(num_layers=1), []
  loss = method("lora")(language_model_loss(model(num_layers=1)[0]))
  data = batches()

  def evaluate(params, trainable):
    evaluated.append(jax.tree.map(np.array, trainable))
    return Evaluation((3.0, 1.0, 2.0)[len(evaluated) - 1], {"accuracy": 0.1 * len(evaluated)})

  options = {"workdir": tmp_path, "key": jax.random.key(0), "mesh": make_mesh(), "progress": False}
  arguments = (
    *(loss, params, loss.init(jax.random.key(2), params, data[0])),
    *(optax.adamw(1e-2), iter(as_grain(data))),
  )
  with pytest.raises(ValueError, match="expected eval_loss and eval_batches, or evaluate"):
    fit(*arguments, config=FitConfig(6, 2, 9, 1), **options)
  got = fit(*arguments, config=FitConfig(6, 2, 9, 1), evaluate=evaluate, **options)
  assert (got.best_step, got.best_loss, got.last_loss) == (4, 1.0, 2.0)
  jax.tree.map(np.testing.assert_array_equal, got.best, evaluated[1])
  logged = [m for m in read_metrics(tmp_path / "metrics.jsonl") if "valid/accuracy" in m]
  assert [m["step"] for m in logged] == [2, 4, 6]


@pytest.mark.parametrize("progress", [False, True])
def test_tqdm_is_needed_only_for_a_progress_bar(progress, tmp_path, monkeypatch, capfd):
  monkeypatch.setitem(sys.modules, "tqdm", None)
  train(tmp_path / "run", steps=1, progress=progress)
  assert ("step 1 of 1: loss" in capfd.readouterr().err) == progress
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  if progress:
    with pytest.raises(ImportError, match="tqdm"):
      train(tmp_path / "shown", steps=1, progress=True)


def test_steps_are_positive():
  with pytest.raises(ValueError, match=r"eval_every_steps must be an integer in \[1, inf\), got 0"):
    FitConfig(10, 0, 1)


def test_the_log_drops_lines_of_repeated_steps(tmp_path):
  with MetricsLog(tmp_path) as log:
    for step in range(1, 6):
      log.write(step, {"loss": step / 2})
  with MetricsLog(tmp_path, first_step=3) as log:
    log.write(4, {"loss": 7})
  assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
  (tmp_path / "bad").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
  with pytest.raises(ValueError, match="bad:2: expected a JSON object with a step, got 'rubb"):
    read_metrics(tmp_path / "bad")


def test_training_works_without_tensorboard_and_grain(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with MetricsLog(tmp_path) as log:
    log.write(1, {"loss": 0.5})
  assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
  assert not (tmp_path / "tensorboard").exists()
  assert "tensorboardX is not installed" in caplog.text
