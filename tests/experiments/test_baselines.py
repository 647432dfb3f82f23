"""Runs of BitFit, FT-Top-k and random subspaces: rows, settings, resuming and decoding."""

import jax
import pytest

from experiments import gpt2_e2e
from experiments.classification.config import GlueConfig
from experiments.harness.config import read_config
from experiments.harness.fit import count_trained
from experiments.harness.launch import apply
from experiments.harness.methods import adapt, check_used
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import inputs_of
from experiments.nlg.restore import load_run
from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.trees import leaves_with_path

from tests.tiny_e2e import tiny_config
from tests.tiny_glue_run import tiny_config as tiny_glue
from tests.tiny_training import interrupted_at

LAYER = 12 * 32**2 + 13 * 32
SUBSPACE = {"random_subspace.dim": 7}
COUNTS = {  # three layers of 32
  "bitfit": ({}, 3 * 11 * 32 + 32),
  "top_layers": ({"top_layers.num_layers": 2}, 2 * LAYER),
  "random_subspace": (SUBSPACE, 7),
}


@pytest.mark.parametrize("method", COUNTS)
def test_a_row_trains_its_leaves(method, tmp_path):
  changes, count = COUNTS[method]
  config = read_config(E2EConfig, apply(tiny_config(tmp_path), {"method": method, **changes}))
  module = GPT2(GPT2Config(vocab_size=64, embed_dim=32, num_layers=3, num_heads=2))
  init = adapt(config)(lambda params: params).init
  assert count_trained(jax.eval_shape(init, jax.random.key(0), shapes_of(module))) == count


@pytest.mark.parametrize("method", COUNTS)
def test_a_row_trains_the_head_of_a_classifier_too(method, tmp_path):
  config = read_config(GlueConfig, apply(tiny_glue(tmp_path), {"method": method}))
  shape = {"vocab_size": 64, "num_positions": 16, "embed_dim": 32, "num_layers": 2, "num_heads": 2}
  module = Bert(BertConfig(**shape, mlp_dim=64, num_labels=2))
  init = adapt(config)(lambda params: params).init
  shapes = jax.eval_shape(init, jax.random.key(0), shapes_of(module))
  paths = [path for path, _ in leaves_with_path(shapes)]
  for path in ("head/out/kernel", "head/out/bias", "pooler/kernel", "pooler/bias"):
    assert paths.count(path) == 1
  assert "token_embedding/embedding" not in paths


def test_settings_that_have_no_effect_are_refused():
  check_used("top_layers", {"top_layers.num_layers": 3}, "gpt2_e2e")
  check_used("random_subspace", SUBSPACE, "glue")
  for method, changes, users in (
    ("lora", {"top_layers.num_layers": 3}, "top_layers$"),
    ("bitfit", SUBSPACE, "random_subspace$"),
    ("random_subspace", {"lora.rank": 2}, "lora, "),
  ):
    with pytest.raises(ValueError, match=f"has no effect with method={method}: .*: {users}"):
      check_used(method, changes, "gpt2_e2e")


@pytest.mark.long
@pytest.mark.parametrize("method", ["top_layers", "random_subspace"])  # BitFit's as FT-Top-k's
def test_an_interrupted_run_resumes_decodes_and_is_restored(method, tmp_path):
  short = {"data.num_train_records": 24, "decoding.num_inputs": 2, "fit.checkpoint_every_steps": 1}
  rate = {"optimizer.learning_rate": 0.1}
  changes = {"method": method, **COUNTS[method][0], **short, **rate}
  result = gpt2_e2e.run(apply(tiny_config(tmp_path / "whole"), changes))
  config = apply(tiny_config(tmp_path / "run"), changes)
  with interrupted_at(2):
    gpt2_e2e.run(config)
  assert gpt2_e2e.run(config)["valid_loss"] == result["valid_loss"]
  run = load_run(tmp_path / "run")
  lines = (tmp_path / "run" / "predictions.txt").read_text().splitlines()
  assert lines == (tmp_path / "whole" / "predictions.txt").read_text().splitlines()
  assert run.generate([group.context for group in inputs_of(run.config)]) == lines
  changed = [
    path
    for (path, old), (_, new) in zip(
      leaves_with_path(run.base.params), leaves_with_path(run.params), strict=True
    )
    if bool((old != new).any())
  ]
  assert 0 < len(changed) <= len(jax.tree.leaves(run.params))
