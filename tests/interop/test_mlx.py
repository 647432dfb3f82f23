"""Adapters in MLX's format: names, shapes and scale; with mlx-lm installed, its logits too."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.interop import save_mlx
from lora_jax.models.zoo import load_causal_lm

from tests.make_peft_golden import MODELS, tokens_of
from tests.toy_models import randomized, relative_difference

CASES = {  # the base model, and the adapter
  "llama": ("llama/llama3", {"target": r".*/attn/(query|out)/kernel"}),
  "all linear": ("llama/qwen2", {"target": r".*/(attn|mlp)/.*kernel"}),
  "rules": (
    "llama/llama3",
    {"target": r".*/(up|down)/kernel", "rules": [lj.LoraRule(".*/up/.*", rank=3, alpha=1.0)]},
  ),
  "one layer": ("llama/llama3", {"target": r".*/(query|up)/kernel", "layers": [1]}),
  "tied": ("gpt2/tied", {"target": r"wte/embedding|.*/mlp/up/kernel"}),
  "untied": ("llama/llama_biased", {"target": "token_embedding/embedding|lm_head/kernel"}),
  "query and value": ("gpt2/tied", {"target": r".*/attn/(query|value)/kernel"}),
  "mixtral": ("llama/mixtral", {"target": r".*/(experts/\w+|router/kernel)"}),
  "qwen2_moe": ("llama/qwen2_moe", {"target": r".*/(experts/\w+|shared/.*/kernel)"}),
  "qwen3_moe": ("llama/qwen3_moe", {"target": r".*/(experts/\w+|value/kernel)"}),
  "dora": ("llama/llama3", {"target": r".*/(query|up)/kernel", "variant": lj.DORA}),
  "fused dora": ("gpt2/tied", {"target": r".*/attn/query/kernel", "variant": lj.DORA}),
}


def written(case, folder):
  """Writes an adapter of random numbers; returns its base model, function and tree."""
  name, settings = CASES[case]
  model = load_causal_lm(MODELS / name)
  config = lj.LoraConfig(**{"rank": 2, "alpha": 6.0} | settings)
  adapted = lj.lora(model.call, config)
  trainable = adapted.init(jax.random.key(0), model.params, jnp.zeros((1, 2), jnp.int32))
  trainable = randomized(trainable)
  save_mlx(folder, config, trainable, model.module.config, model.params)
  return model, adapted, trainable


def read(folder):
  config = json.loads((folder / "adapter_config.json").read_text())
  return config, load_file(folder / "adapters.safetensors")


def test_names_and_shapes(tmp_path):
  _, _, trainable = written("llama", tmp_path / "new")
  config, arrays = read(tmp_path / "new")
  keys = ["self_attn.q_proj", "self_attn.o_proj"]
  assert config == {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": keys},
  }
  assert sorted(arrays) == [
    f"model.layers.{i}.self_attn.{name}.lora_{factor}"
    for i in range(2)
    for name in ("o_proj", "q_proj")
    for factor in "ab"
  ]
  query = trainable["layers_1"]["attn"]["query"]["kernel"]
  for factor in "ab":  # in our orientation, and unscaled
    got = arrays[f"model.layers.1.self_attn.q_proj.lora_{factor}"]
    np.testing.assert_array_equal(got, query.arrays[f"lora_{factor}"])


def test_ranks_and_scalings_become_one(tmp_path):
  _, _, trainable = written("rules", tmp_path / "new")
  config, arrays = read(tmp_path / "new")
  assert (config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]) == (3, 2.0)
  for name, scaling in (("up", 1 / 3), ("down", 3.0)):
    weight = trainable["layers_0"]["mlp"][name]["kernel"]
    a, b = (arrays[f"model.layers.0.mlp.{name}_proj.lora_{factor}"] for factor in "ab")
    expected = scaling * weight.lora_a @ weight.lora_b
    np.testing.assert_allclose(2.0 * a @ b, expected, rtol=1e-5, atol=1e-5)


def test_one_layer_has_its_full_name(tmp_path):
  written("one layer", tmp_path / "new")
  config, _ = read(tmp_path / "new")
  keys = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
  assert config["lora_parameters"]["keys"] == keys


def test_experts_are_stacked(tmp_path):
  _, _, trainable = written("mixtral", tmp_path / "new")
  arrays = read(tmp_path / "new")[1]
  prefix = "model.layers.1.block_sparse_moe"
  up = trainable["layers_1"]["mlp"]["experts"]["up"]
  names = {f"{prefix}.switch_mlp.{name}_proj.lora_a" for name in ("gate", "up", "down")}
  assert {*names, f"{prefix}.gate.lora_a"} == {
    name for name in arrays if name.startswith(prefix) and name.endswith("lora_a")
  }
  for factor in "ab":
    got = arrays[f"{prefix}.switch_mlp.up_proj.lora_{factor}"]
    np.testing.assert_array_equal(got, up.arrays[f"lora_{factor}"].swapaxes(1, 2))


def test_dora_has_its_magnitude(tmp_path):
  _, _, trainable = written("dora", tmp_path / "new")
  config, arrays = read(tmp_path / "new")
  assert config["fine_tune_type"] == "dora"
  magnitude = trainable["layers_0"]["mlp"]["up"]["kernel"].magnitude
  np.testing.assert_array_equal(arrays["model.layers.0.mlp.up_proj.m"], magnitude)


def folder_for_mlx(source, folder):
  """Copies a model's folder, with the names of fields and tensors that mlx-lm reads."""
  shutil.copytree(source, folder)
  fields = json.loads((source / "config.json").read_text())
  rope = dict(fields.get("rope_parameters", {}))
  fields |= {"rope_theta": rope.pop("rope_theta", None), "n_ctx": fields.get("n_positions")}
  fields |= {"rope_scaling": None if rope.get("rope_type") == "default" else rope}
  fields |= {"num_experts": fields.get("num_local_experts", fields.get("num_experts"))}
  (folder / "config.json").write_text(json.dumps(fields))
  arrays = load_file(folder / "model.safetensors")  # of GPT-2 without a prefix, as published
  arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
  save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
  return folder


@pytest.mark.parametrize("case", CASES)
def test_mlx_itself_agrees(case, tmp_path):
  """The logits of mlx-lm's own model with the adapter, and those of its base model."""
  mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
  from mlx_lm.tuner.utils import load_adapters
  from mlx_lm.utils import load_model

  model, adapted, trainable = written(case, tmp_path / "new")
  tokens = np.asarray(tokens_of(CASES[case][0]))[:, :7]  # it has no sliding window of Mixtral

  def logits(peer):
    return np.array(peer(mlx.array(tokens)).astype(mlx.float32))

  peer, _ = load_model(folder_for_mlx(model.folder, tmp_path / "base"))
  expected = model.call(model.params, jnp.asarray(tokens))
  assert relative_difference(logits(peer), expected) < 1e-5, "the base model"
  expected = adapted.apply(model.params, trainable, jnp.asarray(tokens))
  assert relative_difference(logits(load_adapters(peer, str(tmp_path / "new"))), expected) < 1e-5
