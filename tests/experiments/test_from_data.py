"""Runs whose adapters are initialized from the first training batches."""

import jax
import numpy as np
import pytest

import lora_jax as lj
from experiments import gpt2_e2e
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.harness.methods import METHODS, lora_config
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.from_data import FOLDER
from experiments.nlg.restore import load_adapter, load_run
from lora_jax.adapters.delta import adapter_weights
from lora_jax.training.checkpoint import restore_adapter
from lora_jax.trees import leaves_with_path

from tests.tiny_e2e import tiny_config
from tests.tiny_training import interrupted_at

NAMES = [name for name, method in METHODS.items() if method.from_data is not None]


def test_the_table_has_the_methods_from_data():
  assert NAMES == ["eva", "lora_ga", "corda"]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_run_from_data_resumes_and_is_restored_without_collecting_again(
  name, tmp_path, monkeypatch
):
  changes = {"method": name, "decoding.num_inputs": 0, "workdir": str(tmp_path / "run")}
  config = apply(tiny_config(tmp_path), changes)
  with interrupted_at(4):
    gpt2_e2e.run(config)

  def collected_again(*_, **__):
    raise AssertionError

  for module in ("eva", "lora_ga", "corda"):
    monkeypatch.setattr(f"lora_jax.variants.{module}.collect", collected_again)
  result = gpt2_e2e.run(config)
  settings = read_config(E2EConfig, config)
  run = load_run(settings.workdir)
  adapter = load_adapter(settings, load_base(settings, run.mesh))
  lora, params = lora_config(settings), load_base(settings, run.mesh).params
  merged = lj.lora(gpt2_e2e.language_model_loss(run.base.module), lora).merge(params, adapter)
  for got, expected in zip(jax.tree.leaves(run.params), jax.tree.leaves(merged), strict=True):
    np.testing.assert_array_equal(got, expected)
  start = restore_adapter(tmp_path / "run" / FOLDER, adapter)
  first, last = (dict(leaves_with_path(tree)) for tree in (start, adapter))
  assert any(np.any(first[path] != last[path]) for path in last)
  weights = adapter_weights(adapter)
  ranks = {path: weight.rank for path, weight in weights.items()}
  assert sum(ranks.values()) == len(ranks) * config.lora.rank
  scaling = config.lora.alpha / config.lora.rank
  assert [rule.alpha for rule in lora.rules] == [ranks[path] * scaling for path in ranks]
  assert result["trainable_parameters"] == sum(
    weight.lora_a.size + weight.lora_b.size for weight in weights.values()
  )
  for path, weight in weights.items():
    if weight.is_plain:  # EVA: orthonormal at the start
      a = np.asarray(first[f"{path}/lora_a"])
      np.testing.assert_allclose(a.T @ a, np.eye(weight.rank), atol=1e-4)
    else:
      np.testing.assert_array_equal(first[f"{path}/lora_a"], weight.initial_a)
      assert np.any(weight.initial_a)
