"""Runs of LoftQ: on a quantized base only; trained, resumed and restored."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lora_jax as lj
from experiments import finetune, gpt2_e2e
from experiments.configs import finetune as finetune_configs
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.harness.methods import adapt
from experiments.nlg.config import E2EConfig
from experiments.nlg.loftq import initial_adapter
from experiments.nlg.restore import load_run
from lora_jax.adapters.delta import adapter_weights
from lora_jax.trees import nest

from tests.tiny_e2e import tiny_config
from tests.tiny_training import interrupted_at


def test_a_base_that_is_not_quantized_is_refused(tmp_path):
  config = apply(tiny_config(tmp_path / "run"), {"method": "loftq"})
  message = r"method=loftq starts .*param_dtype=int8 or nf4, or model.rounded_to; or choose .*lora$"
  with pytest.raises(ValueError, match=message):
    gpt2_e2e.run(config)
  changes = {"method": "loftq", "model.folder": "any", "model.param_dtype": "stored"}
  with pytest.raises(ValueError, match=r"param_dtype=stored has no .*=int8 or nf4; or choose"):
    finetune.run(apply(finetune_configs.get_config(), changes))


@pytest.mark.long
def test_a_resumed_run_reads_its_initial_adapter(tmp_path):
  config = apply(tiny_config(tmp_path), {"method": "loftq", "model.param_dtype": "int8"})
  settings, path = read_config(E2EConfig, config), "h_0/attn/query/kernel"
  params = nest([(tuple(path.split("/")), jax.random.normal(jax.random.key(0), (8, 8)))])
  loss = adapt(settings)(lambda params, x: x @ params["h_0"]["attn"]["query"]["kernel"])
  arguments = settings, loss, lj.quantize(params, "int8", path), jnp.ones((1, 8))
  first = initial_adapter(*arguments, lambda: params)
  (tmp_path / "checkpoints").mkdir()
  second = initial_adapter(*arguments, lambda: pytest.fail("loaded again"))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert adapter_weights(first)[path].lora_b.any()


def check_checkpoints(workdir, size):
  """Checkpoints have the adapter, its moments, counts and a key, and nothing of the base model."""
  args = ocp.args.Composite(state=ocp.args.StandardRestore())
  for folder in (workdir / "checkpoints").iterdir():
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      arrays = checkpointer.restore(folder, args=args)["state"]
    assert 3 * size <= sum(array.size for array in arrays.values()) < 3 * size + 100


@pytest.mark.long
@pytest.mark.parametrize("model", [{"param_dtype": "int8"}, {"rounded_to": "Q4_0"}], ids=str)
def test_a_run_is_trained_resumed_and_restored(model, tmp_path, capsys):
  changes = {f"model.{name}": value for name, value in model.items()}
  changes |= {"method": "loftq", "fit.num_train_steps": 4, "decoding.num_inputs": 0}
  runs = [apply(tiny_config(tmp_path / name), changes) for name in ("whole", "interrupted")]
  whole = gpt2_e2e.run(runs[0])
  assert "LoftQ: mean error of 12 quantized weights" in capsys.readouterr().out
  with interrupted_at(2):
    gpt2_e2e.run(runs[1])
  assert gpt2_e2e.run(runs[1])["valid_loss"] == whole["valid_loss"]
  finished = load_run(runs[0].workdir)
  assert Path(runs[0].workdir, "adapter").is_dir()
  check_checkpoints(Path(runs[1].workdir), whole["trainable_parameters"])
  assert finished.generate(["name : The Vaults"])
