"""Exported runs compute the same as the run's own model, and have its tokenizer and end token."""

import json
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from experiments import export, gpt2_e2e
from experiments.harness.launch import apply
from experiments.nlg.restore import load_run
from lora_jax.interop import load_peft
from lora_jax.models.gpt2.folder import load_gpt2, stored_tensors
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.training.fingerprint import fingerprint

from tests.tiny_e2e import tiny_config, tiny_folder
from tests.toy_models import relative_difference

TOKENS = jnp.asarray([[5, 17, 300, 4000, 2, 9]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Short runs of LoRA, DoRA and full fine-tuning."""
  root = tmp_path_factory.mktemp("runs")
  short = {"fit.num_train_steps": 4, "decoding.num_inputs": 0, "optimizer.learning_rate": 0.1}
  methods = {"lora": "lora", "dora": "dora", "full": "full_finetuning"}
  for name, changes in {name: {"method": method} for name, method in methods.items()}.items():
    gpt2_e2e.run(apply(tiny_config(root / name), {**short, **changes}))
  return root


def logits_of(run):
  return run.base.module.apply({"params": run.params}, TOKENS)


def check_text_files(folder):
  assert load_tokenizer(folder).get_vocab_size() == 8192
  assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 0}
  assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(("name", "flags"), [("lora", []), ("lora", ["--server"]), ("dora", [])])
def test_an_adapter_for_peft(runs, name, flags, tmp_path, capsys):
  export.main([str(runs / name), str(tmp_path / "new"), *flags])
  assert capsys.readouterr().out == f"wrote {tmp_path / 'new'}\n"
  config, params = load_gpt2(tiny_folder())
  lora_config, trainable = load_peft(tmp_path / "new", stored_tensors(config), params)
  adapted = lj.lora(lambda p, tokens: GPT2(config).apply({"params": p}, tokens), lora_config)
  expected = logits_of(load_run(runs / name))
  assert relative_difference(adapted.apply(params, trainable, TOKENS), expected) < 1e-5
  base = GPT2(config).apply({"params": params}, TOKENS)
  assert relative_difference(base, expected) > 1e-2
  check_text_files(tmp_path / "new")
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  assert written["target_modules"] == ["c_attn", "c_proj", "c_fc"]
  assert ("rank_pattern" in written) == (not flags)  # 3 x 4 on the fused weight, 4 elsewhere


@pytest.mark.parametrize("name", ["lora", "dora", "full"])
def test_a_merged_model_for_transformers(runs, name, tmp_path):
  export.main([str(runs / name), str(tmp_path / "new"), "--merged"])
  config, params = load_gpt2(tmp_path / "new")
  got = GPT2(config).apply({"params": params}, TOKENS)
  assert relative_difference(got, logits_of(load_run(runs / name))) < 1e-6
  check_text_files(tmp_path / "new")


def test_a_merged_model_has_the_base_models_dtype(runs, tmp_path, capsys):
  """The base model's folder is copied, and the error of rounding to bfloat16 is printed."""
  shutil.copytree(runs / "lora", tmp_path / "run")
  base = shutil.copytree(tiny_folder(), tmp_path / "base")
  narrow = {
    name: array.astype(ml_dtypes.bfloat16)
    for name, array in load_file(base / "model.safetensors").items()
  }
  save_file(narrow, base / "model.safetensors")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["model"]["folder"] = str(base)
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  with pytest.raises(SystemExit, match="was trained on a base model with fingerprint"):
    export.main([str(tmp_path / "run"), str(tmp_path / "new"), "--merged"])
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  result["base"] = fingerprint(load_gpt2(base)[1])  # as if it had been
  (tmp_path / "run" / "result.json").write_text(json.dumps(result))
  export.main([str(tmp_path / "run"), str(tmp_path / "new"), "--merged"])
  printed = capsys.readouterr().out
  error = float(re.search(r"by at most\n(\S+) of their largest element \(h_", printed)[1])
  assert 1e-4 < error < 2**-8
  merged = load_file(tmp_path / "new" / "model.safetensors")
  assert {array.dtype for array in merged.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_what_cannot_be_exported(runs, tmp_path):
  with pytest.raises(SystemExit, match="is a run of full_finetuning, which has no adapter"):
    export.main([str(runs / "full"), str(tmp_path / "new")])
  with pytest.raises(SystemExit, match="read no DoRA"):
    export.main([str(runs / "dora"), str(tmp_path / "new"), "--server"])
  with pytest.raises(SystemExit, match="is not the folder of a run"):
    export.main([str(tmp_path), str(tmp_path / "new")])
  with pytest.raises(SystemExit, match="exists; nothing is overwritten"):
    export.main([str(runs / "lora"), str(tmp_path)])
