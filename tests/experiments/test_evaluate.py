"""Decodes finished runs again: equal settings give equal texts, others have their own folder."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import evaluate, gpt2_e2e
from experiments.evaluate import evaluate_run
from experiments.harness.config import replace_fields
from experiments.harness.launch import apply
from experiments.harness.workdir import read_run, write_json
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import load_data
from experiments.nlg.restore import restore_params
from experiments.report import report
from lora_jax.training.mesh import make_mesh

from tests.tiny_e2e import tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  rate = {"optimizer.learning_rate": 10.0, "optimizer.schedule": "constant"}
  for seed in range(1, 9):  # far too high a learning rate: only some seeds' best step is the last
    run = gpt2_e2e.run(apply(tiny_config(root / "lora"), rate | {"seed": seed}))
    if run["best_step"] < run["num_train_steps"]:
      break
    shutil.rmtree(root / "lora")
  assert run["best_step"] < run["num_train_steps"]
  full = {"method": "full_finetuning", "optimizer.learning_rate": 0.01}
  gpt2_e2e.run(apply(tiny_config(root / "full"), full | {"decoding.num_inputs": 0}))
  return root


def texts(folder):
  return (folder / "predictions.txt").read_text("utf-8")


def stored(folder):
  return json.loads((folder / "result.json").read_text("utf-8"))


def test_unchanged_settings_give_the_runs_texts_and_scores(runs):
  result = evaluate_run(runs / "lora", {})
  folder = runs / "lora" / "evaluations" / "unchanged"
  assert texts(folder) == texts(runs / "lora")
  run = stored(runs / "lora")
  assert result == stored(folder)
  for name in ("scores", "intervals", "valid_loss", "trainable_parameters", "seed", "method"):
    assert result[name] == run[name]
  assert result["run"] == str(runs / "lora")
  config, usual = read_run(E2EConfig, folder), read_run(E2EConfig, runs / "lora")
  assert replace_fields(config, {"workdir": usual.workdir}) == usual


def test_other_settings_have_a_folder_and_a_row_of_their_own(runs, tmp_path, capsys):
  before = {path: path.read_bytes() for path in (runs / "lora").glob("*.*")}
  arguments = ["--num_beams=1", "--max_new_tokens=5", "--num_inputs=3", "--length_penalty=0.9"]
  evaluate.main([str(runs / "lora"), *arguments])
  folder = runs / "lora" / "evaluations" / "num_beams=1,max_new_tokens=5,num_inputs=3"
  assert f"wrote {folder}" in capsys.readouterr().out
  assert len(texts(folder).splitlines()) == 3
  assert read_run(E2EConfig, folder).decoding.num_beams == 1
  assert before == {path: path.read_bytes() for path in (runs / "lora").glob("*.*")}
  text = report([runs / "lora", folder], tmp_path / "r")
  assert "LoRA, max_new_tokens 5, num_beams 1" in text
  assert "LoRA, max_new_tokens 8, num_beams 2" in text


def test_a_finished_evaluation_is_not_repeated(runs, capsys):
  first = evaluate_run(runs / "lora", {})
  assert evaluate_run(runs / "lora", {}) == first
  assert "is finished" in capsys.readouterr().out


@pytest.mark.long
def test_an_adapter_served_on_rounded_weights(runs, tmp_path):
  result = evaluate_run(runs / "lora", {"rounded_to": "rtn2", "num_shots": 1, "num_inputs": 2})
  assert result["trained_on"] == "the model's weights"
  assert result["valid_loss"] != stored(runs / "lora")["valid_loss"]
  folder = runs / "lora" / "evaluations" / "num_inputs=2,num_shots=1,rounded_to=rtn2"
  assert read_run(E2EConfig, folder).model.rounded_to == "rtn2"
  with pytest.raises(ValueError, match=r"rounds the base weights of an adapter.*full_finetuning"):
    evaluate_run(runs / "full", {"rounded_to": "rtn2"})
  config = json.loads((runs / "lora" / "config.json").read_text("utf-8"))
  config["model"]["rounded_to"] = "Q8_0"
  write_json(tmp_path / "config.json", config)
  write_json(tmp_path / "result.json", stored(runs / "lora"))
  with pytest.raises(ValueError, match="adapts weights rounded to Q8_0"):
    evaluate_run(tmp_path, {"rounded_to": "rtn2"})


def test_the_last_checkpoint_of_lora(runs):
  result = evaluate_run(runs / "lora", {"checkpoint": "last", "num_inputs": 2})
  assert result["valid_loss"] == stored(runs / "lora")["last_valid_loss"]
  folder = runs / "lora" / "evaluations" / "num_inputs=2,checkpoint=last"
  assert read_run(E2EConfig, folder).fit.keep == "last"


def test_the_checkpoint_of_the_best_step_is_the_adapter(runs):
  """Both ways to a run's params lead to the same bits."""
  folder, mesh = runs / "lora", make_mesh()
  config = read_run(E2EConfig, folder)
  base = load_base(config, mesh)
  from_adapter, _ = restore_params(config, "best", base, mesh)
  other = replace_fields(config, {"fit.keep": "last"})
  from_checkpoint, loss = restore_params(other, "best", base, mesh)
  assert loss == stored(folder)["valid_loss"]
  jax.tree.map(np.testing.assert_array_equal, from_adapter, from_checkpoint)
  kernel = ("h_0", "mlp", "up", "kernel")
  assert np.abs(leaf(from_adapter, kernel) - leaf(base.params, kernel)).max() > 0


def leaf(tree, keys):
  for key in keys:
    tree = tree[key]
  return np.asarray(tree)


@pytest.mark.long
def test_full_finetuning_from_its_checkpoint(runs):
  """A run that decoded nothing is decoded, with what it trained: its loss on its own data."""
  with pytest.raises(ValueError, match="--num_inputs=630"):
    evaluate_run(runs / "full", {})
  result = evaluate_run(runs / "full", {"num_inputs": 2})
  assert result["num_inputs"] == 2
  config, mesh = read_run(E2EConfig, runs / "full"), make_mesh()
  base = load_base(config, mesh)
  params, loss = restore_params(config, "best", base, mesh)
  assert loss == stored(runs / "full")["valid_loss"]
  tuned = base._replace(model=base.model._replace(params=params))
  measured = gpt2_e2e.measure(config, tuned, load_data(config, base), mesh)[1]["valid_loss"]
  assert measured == pytest.approx(loss, rel=1e-6)


def test_runs_that_cannot_be_evaluated(runs, tmp_path):
  with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
    evaluate_run(tmp_path, {})
  config = json.loads((runs / "lora" / "config.json").read_text("utf-8"))
  write_json(tmp_path / "config.json", config)
  with pytest.raises(ValueError, match="is not finished"):
    evaluate_run(tmp_path, {})
  write_json(tmp_path / "result.json", stored(runs / "lora"))
  with pytest.raises(FileNotFoundError, match="holds no adapter"):
    evaluate_run(tmp_path, {"num_inputs": 1})
  with pytest.raises(FileNotFoundError, match=r"does not exist: the last checkpoint of"):
    evaluate_run(tmp_path, {"num_inputs": 1, "checkpoint": "last"})
  write_json(tmp_path / "config.json", config | {"method": "frozen_base"})
  with pytest.raises(ValueError, match=r"fit\.keep='last' has no effect with method=frozen_base"):
    evaluate_run(tmp_path, {"num_inputs": 1, "checkpoint": "last"})
  with pytest.raises(ValueError, match=r"decoding\.scoring must be one of"):
    evaluate_run(runs / "lora", {"scoring": "other"})
  write_json(tmp_path / "config.json", config | {"experiment": "e2e_template"})
  with pytest.raises(ValueError, match="is a run of 'e2e_template', expected a run of 'gpt2_e2e'"):
    evaluate_run(tmp_path, {})


def test_the_command_explains_its_errors(tmp_path, capsys):
  with pytest.raises(SystemExit, match=r"error: .*is not the folder of a run"):
    evaluate.main([str(tmp_path)])
  with pytest.raises(SystemExit):
    evaluate.main([str(tmp_path), "--num_beams=many"])
  assert "invalid int value: 'many'" in capsys.readouterr().err
