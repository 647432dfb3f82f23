"""Carrying out runs: failures are results, nothing is repeated; records and JSON lines."""

import contextlib
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.comparison.lines import read_lines, write_lines
from experiments.comparison.losses import losses_by_input, wikipedia_loss
from experiments.comparison.plan import FROZEN, Planned, config_of, frozen_run
from experiments.comparison.runs import (
  carry_out,
  collect,
  costs_file,
  rate_losses,
)
from experiments.configs.variants import TINY
from experiments.harness import sharing
from experiments.harness.config import read_config, replace_fields
from experiments.harness.launch import apply
from experiments.harness.methods import adapt
from experiments.harness.sharing import claimed
from experiments.harness.workdir import open_workdir, write_json
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import examples_of, load_data, validation_loss
from experiments.nlg.restore import trainable_shapes
from lora_jax.training.loss import language_model_loss
from lora_jax.trees import leaves_with_path, replace_leaves

from tests.experiments.comparison.records import records as comparison_records
from tests.tiny_e2e import tiny_config

LOSSES = {1e-3: 2.5, 3e-3: 1.5, 1e-2: 9.0}  # by learning rate


def without(record, name):
  return {key: value for key, value in record.items() if key != name}


def planned(rate, arm="lora"):
  return Planned("rates", arm, {"method": "lora", "optimizer.learning_rate": rate, "seed": 0})


def fake_run(config):
  """Leaves what a run leaves: its config and its result, without training."""
  settings = read_config(E2EConfig, config)
  if settings.optimizer.learning_rate == 0.3:
    raise ValueError("a mistake")
  with open_workdir(settings) as folder:
    if settings.optimizer.learning_rate == 0.1:
      raise FloatingPointError("the loss of step 3 is nan")
    trains = settings.method != FROZEN
    loss = LOSSES[settings.optimizer.learning_rate] if trains else 4.9
    result = {"method": settings.method, "seed": settings.seed, "valid_loss": loss}
    write_json(folder / "result.json", {**result, "trainable_parameters": 7})
  return result


@pytest.fixture
def root(tmp_path):
  runs = [planned(rate) for rate in (*LOSSES, 0.1)]
  assert carry_out(runs, TINY, tmp_path, fake_run) == []
  folder = tmp_path / "rates" / FROZEN
  fake_run(config_of(frozen_run("rates"), TINY, str(folder)))
  write_json(folder / "planned.json", {"stage": "rates", "arm": FROZEN})
  return tmp_path


def test_failed_runs_are_counted_and_not_repeated(root):
  records = {
    r["settings"]["optimizer.learning_rate"]: r for r in collect(root) if r["arm"] != FROZEN
  }
  assert {rate: record["status"] for rate, record in records.items()} == {
    1e-3: "finished",
    3e-3: "finished",
    1e-2: "failed",  # above the base model's loss
    0.1: "failed",
  }
  assert records[1e-2]["reason"] == "its loss is above the base model's, 4.900"
  assert records[0.1]["reason"] == "the loss of step 3 is nan"

  def repeated(config):
    raise AssertionError(f"{config.workdir} was done before")

  assert carry_out([planned(rate) for rate in (*LOSSES, 0.1)], TINY, root, repeated) == []


def test_a_run_with_another_config_is_not_taken(root):
  with pytest.raises(ValueError, match=r"rate=0.001,seed=0 is a run with other settings than"):
    carry_out([planned(1e-3)], dataclasses.replace(TINY, valid_lines=25), root, fake_run)


def test_other_errors_are_named_and_the_rest_is_done(tmp_path, capsys):
  broken = carry_out([planned(0.3), planned(1e-3)], TINY, tmp_path, fake_run)
  assert broken == [str(tmp_path / "rates" / "lora,rate=0.3,seed=0")]
  assert "ValueError: a mistake" in capsys.readouterr().out
  assert [record["valid_loss"] for record in collect(tmp_path)] == [2.5]


def test_losses_by_rate(root):
  losses = rate_losses(collect(root), "rates")
  assert losses == {"lora": {1e-3: 2.5, 3e-3: 1.5, 1e-2: math.inf, 0.1: math.inf}}


def test_records_are_json_lines(root):
  costs = dict.fromkeys(("gflop", "step_megabytes", "step_seconds", "step_ratio"), 1.0)
  write_json(costs_file(root, "embedded"), {"lora": costs})
  records = collect(root)
  path = root / "runs.jsonl"
  write_lines(path, records)
  assert read_lines(path) == records
  assert len(path.read_text().splitlines()) == 6
  assert records[-1] == {"stage": "costs", "arm": "lora", "base": "embedded", **costs}
  record = json.loads(path.read_text().splitlines()[0])
  assert {"stage", "arm", "base", "method", "seed", "status", "settings"} <= record.keys()


def test_lines_are_replaced_while_another_process_reads_them(root):
  records, path = collect(root), root / "runs.jsonl"
  write_lines(path, records)
  with path.open() as file:
    write_lines(path, records[:1])
    assert len(file.readlines()) == len(records)
  assert [each.name for each in root.glob("*runs.jsonl*")] == ["runs.jsonl"]


def test_lines_that_cannot_be_read(tmp_path):
  path = tmp_path / "runs.jsonl"
  with pytest.raises(FileNotFoundError, match="there is no file"):
    read_lines(path)
  write_lines(path, [])
  with pytest.raises(ValueError, match=r"runs.jsonl is empty: expected the records of runs"):
    read_lines(path)


SEEDS = next(r for r in comparison_records() if r["stage"] == "seeds")
COST = next(r for r in comparison_records() if r["stage"] == "costs")


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ([1], "expected a run's record, got '[1]'"),
    (SEEDS | {"stage": "nope"}, "stage must be one of rates, seeds, effort, "),
    (without(SEEDS, "stage"), "the record lacks the field 'stage'"),
    (without(SEEDS, "base"), "the record lacks the field 'base'"),
    (SEEDS | {"base": "smollm2"}, "base must be embedded, seeds's, got 'smollm2'"),
    (SEEDS | {"arm": "dura"}, "there is no arm 'dura'; did you mean dora"),
    (SEEDS | {"status": "crashed"}, "status must be one of finished, failed, got 'crashed'"),
    (SEEDS | {"settings": []}, "settings must be of type Mapping, got []"),
    (SEEDS | {"settings": {}}, "settings lack 'optimizer.learning_rate'"),
    (without(SEEDS, "valid_loss"), "the record lacks the field 'valid_loss'"),
    (SEEDS | {"valid_loss": math.nan}, "valid_loss must be a finite number"),
    (SEEDS | {"valid_loss": "1.9"}, "valid_loss must be a number"),
    (SEEDS | {"wikipedia_loss": math.inf}, "wikipedia_loss must be a finite number"),
    (without(SEEDS, "input_losses"), "the record lacks the field 'input_losses'"),
    (SEEDS | {"input_losses": [1.0]}, "input_losses has 1 numbers, and input_tokens 60"),
    (SEEDS | {"input_losses": [math.nan] * 60}, "input_losses[0] must be a finite number"),
    (without(COST, "gflop"), "the record lacks the field 'gflop'"),
  ],
)
def test_a_record_without_what_the_page_needs_is_named(record, message, tmp_path):
  path = tmp_path / "runs.jsonl"
  write_lines(path, [SEEDS, record])
  with pytest.raises(ValueError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
    read_lines(path)


def test_a_run_of_another_process_is_waited_for(tmp_path, monkeypatch):
  """The other process does the first run, and ends while this one waits after the second."""
  first, second = planned(1e-3), planned(3e-3)
  folder, done = tmp_path / "rates" / first.name, []

  def run(config):
    done.append(config.optimizer.learning_rate)
    return fake_run(config)

  with contextlib.ExitStack() as other:
    assert other.enter_context(claimed(folder))

    def wait(seconds):
      assert done == [second.rate]
      fake_run(config_of(first, TINY, str(folder)))
      write_json(folder / "planned.json", {"stage": "rates", "arm": "lora"})
      other.close()

    monkeypatch.setattr(sharing.time, "sleep", wait)
    assert carry_out([first, second], TINY, tmp_path, run) == []
  assert done == [second.rate]
  assert len(collect(tmp_path)) == 2


@pytest.mark.parametrize("rate", [1e-3, 0.3])
def test_a_run_that_another_process_gave_up_is_taken_over(rate, tmp_path, monkeypatch):
  given_up = planned(rate)
  with contextlib.ExitStack() as other:
    assert other.enter_context(claimed(tmp_path / "rates" / given_up.name))
    monkeypatch.setattr(sharing.time, "sleep", lambda seconds: other.close())
    broken = carry_out([given_up], TINY, tmp_path, fake_run)
  assert broken == ([str(tmp_path / "rates" / given_up.name)] if rate == 0.3 else [])
  assert len(collect(tmp_path)) == 1 - len(broken)


def test_losses_by_input_add_up_to_the_validation_loss(tmp_path, caplog):
  config = replace_fields(
    read_config(E2EConfig, tiny_config(tmp_path)), {"data.num_valid_records": 9}
  )
  mesh = config.mesh.make()
  base = load_base(config, mesh)
  examples = examples_of(config, base, "valid")
  losses = losses_by_input(base, base.params, examples, config)
  assert len(losses) == len(examples) == 9
  tokens = sum(len(example.targets) for example in examples)
  whole = validation_loss(config, base, base.params, load_data(config, base), mesh)
  assert losses.sum() / tokens == pytest.approx(whole, rel=1e-5)
  assert np.argmax(losses) == max(range(9), key=lambda i: len(examples[i].targets))  # their order
  with jax.log_compiles(), caplog.at_level("WARNING"):
    again = losses_by_input(load_base(config, mesh), base.params, examples, config)
    assert "of_rows" not in caplog.text  # the next run of the model compiles nothing
    jax.jit(lambda of_rows: of_rows + 1)(1.0)
  assert "Compiling" in caplog.text  # the log can tell
  np.testing.assert_array_equal(again, losses)


@pytest.mark.long
def test_the_wikipedia_loss_of_random_weights_is_that_of_a_uniform_guess(tmp_path):
  config = read_config(E2EConfig, tiny_config(tmp_path))
  base = load_base(config, config.mesh.make())
  assert wikipedia_loss(base, base.params, config) == pytest.approx(math.log(8192), abs=0.2)


@pytest.mark.long
def test_the_wikipedia_loss_of_an_adapter_that_cannot_be_merged_is_the_adapted_functions(tmp_path):
  """A bottleneck that adds a constant to each layer's output is another bias of its MLP."""
  config = read_config(E2EConfig, apply(tiny_config(tmp_path), {"method": "adapter_p"}))
  base = load_base(config, config.mesh.make())
  shapes = trainable_shapes(adapt(config)(language_model_loss(base.module)), base.params)
  adapter = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  biased = base.params
  for i, layer in enumerate(adapter["lora_added"]["bottleneck"].values()):
    constant = 3.0 * jax.random.normal(jax.random.key(i), (32,))
    layer["layer_output"]["up"]["bias"] = constant
    path = f"h_{i}/mlp/down/bias"
    biased = replace_leaves(biased, {path: dict(leaves_with_path(biased))[path] + constant})
  actual = wikipedia_loss(base, {"base": base.params, "adapter": adapter}, config)
  lora = replace_fields(config, {"method": "lora"})  # can be merged: its params are the model's
  assert actual == pytest.approx(wikipedia_loss(base, biased, lora), rel=1e-5)
  assert abs(actual - wikipedia_loss(base, base.params, lora)) > 0.002
