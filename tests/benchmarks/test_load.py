"""The benchmark of loading runs, without transformers, and counts the weights' memory."""

import jax
import numpy as np

from benchmarks import load
from lora_jax.models.llama.folder import load_llama


def test_the_benchmark_prints_its_table(monkeypatch, capsys):
  monkeypatch.setenv("XLA_FLAGS", "")
  small = ["--megabytes", "64", "--width", "512", "--repeats", "1", "--dtypes", "float32"]
  measured = load.main([*small, "--alone"])["float32"]
  row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("lora_jax"))
  assert row.split()[1] == "float32"
  assert row.split()[-1] == "1.00"
  growth = measured["ways"]["lora_jax"]["growth"][0]
  assert 0.9 < growth / measured["size"] < 1.3  # a tenth is not of the weights


def test_the_folder_has_the_requested_size(tmp_path):
  size = load.random_llama(tmp_path / "model", 10, 3, "bfloat16", 128, 512)
  assert abs(size - 10e6) < 1e6
  assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 3
  _, params = load_llama(tmp_path / "model", param_dtype="bfloat16")
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == size
  kernel = np.asarray(params["layers_0"]["mlp"]["up"]["kernel"], np.float32)
  assert 0.019 < kernel.std() < 0.021
