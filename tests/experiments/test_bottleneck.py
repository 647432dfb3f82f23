"""Runs of bottleneck adapters: rows and settings, decoding without merging, resuming."""

import jax
import pytest

from experiments import export, finetune, glue, gpt2_e2e
from experiments.classification.restore import load_encoder
from experiments.configs import finetune as finetune_configs
from experiments.generate import main as generate
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.harness.methods import adapt, check_used
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import inputs_of
from experiments.nlg.restore import load_run
from lora_jax.data.batches import fill
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.training.loss import language_model_loss

from tests.experiments.test_glue import assert_predicts
from tests.tiny_e2e import tiny_config, tiny_folder, write_pairs
from tests.tiny_glue_run import tiny_config as tiny_glue
from tests.tiny_training import interrupted_at

WIDTH = {"bottleneck.width": 3}
SHORT = {"data.num_train_records": 24, "decoding.num_inputs": 2, "fit.checkpoint_every_steps": 1}
ADAPTER, NORM = 2 * 32 * 3 + 3 + 32, 2 * 32
COUNTS = {  # two layers of 32
  "adapter_h": 4 * ADAPTER,
  "adapter_l": 2 * (ADAPTER + NORM),
  "adapter_p": 2 * ADAPTER,
  "adapter_d": ADAPTER,
}


@pytest.mark.parametrize("method", COUNTS)
def test_a_row_trains_its_adapters(method, tmp_path):
  config = apply(tiny_config(tmp_path), {"method": method, **WIDTH})
  module = GPT2(GPT2Config(vocab_size=64, embed_dim=32, num_layers=2, num_heads=2))
  loss = adapt(read_config(E2EConfig, config))(language_model_loss(module))
  batch = fill([], 1, 4, 2)
  shapes = jax.eval_shape(loss.init, jax.random.key(0), shapes_of(module), batch)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[method]


def test_settings_that_have_no_effect_are_refused():
  check_used("adapter_d", {"bottleneck.num_dropped": 2, **WIDTH}, "gpt2_e2e")
  for method, changes, users in (
    ("adapter_h", {"bottleneck.num_dropped": 2}, "adapter_d$"),
    ("lora", WIDTH, "adapter_h, adapter_l, adapter_p, adapter_d$"),
    ("adapter_h", {"lora.rank": 2}, "lora, "),
  ):
    with pytest.raises(ValueError, match=f"has no effect with method={method}: .*: {users}"):
      check_used(method, changes, "gpt2_e2e")


@pytest.mark.long
def test_an_interrupted_run_resumes_decodes_and_is_restored(tmp_path):
  changes = {"method": "adapter_h", **WIDTH, **SHORT}
  result = gpt2_e2e.run(apply(tiny_config(tmp_path / "whole"), changes))
  assert result["trainable_parameters"] == COUNTS["adapter_h"]
  config = apply(tiny_config(tmp_path / "run"), changes)
  with interrupted_at(2):
    gpt2_e2e.run(config)
  assert gpt2_e2e.run(config)["valid_loss"] == result["valid_loss"]
  run = load_run(tmp_path / "run")
  lines = (tmp_path / "run" / "predictions.txt").read_text().splitlines()
  assert lines == (tmp_path / "whole" / "predictions.txt").read_text().splitlines()
  assert run.generate([group.context for group in inputs_of(run.config)]) == lines
  assert "Adapter_H" in gpt2_e2e.report(tmp_path / "run", result)
  with pytest.raises(SystemExit, match="of adapter_h: its adapter cannot be merged"):
    export.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merged"])


@pytest.mark.long
def test_finetune_answers_with_adapters(tmp_path, capsys):
  write_pairs(tmp_path / "data.jsonl", 40)
  changes = {
    "workdir": str(tmp_path / "run"),
    "method": "adapter_d",
    "model.folder": str(tiny_folder()),
    "model.scan_layers": True,
    "data.file": str(tmp_path / "data.jsonl"),
    "data.num_epochs": 1,
    "data.batch_size": 4,
    "samples.count": 1,
    "samples.max_new_tokens": 4,
    **WIDTH,
  }
  result = finetune.run(apply(finetune_configs.get_config(), changes))
  assert result["trainable_parameters"] == COUNTS["adapter_d"]
  capsys.readouterr()
  generate([str(tmp_path / "run"), result["samples"][0]["prompt"], "--max_new_tokens=4"])
  assert capsys.readouterr().out.strip() == result["samples"][0]["generated"].strip()


@pytest.mark.long
def test_a_classifier_is_trained_with_its_head(tmp_path):
  changes = {"method": "adapter_l", "fit.num_epochs": 1, **WIDTH}
  result = glue.run(apply(tiny_glue(tmp_path / "run"), changes))
  adapters = result["trainable_parameters"] - result["head_parameters"]
  assert 2 * adapters == COUNTS["adapter_l"]  # one layer
  assert_predicts(load_encoder(tmp_path / "run"), tmp_path / "run")
  with pytest.raises(SystemExit, match=r"cannot be merged, .*load_encoder\(folder\)"):
    export.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merged"])
