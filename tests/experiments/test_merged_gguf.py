"""A run of QA-LoRA on a quantized GGUF file, exported as another such file."""

import json

import jax.numpy as jnp
import pytest

import lora_jax as lj
from experiments import export, finetune
from experiments.configs.finetune import get_config
from experiments.harness.launch import apply
from lora_jax.interop import load_peft
from lora_jax.models.checkpoints.gguf import open_gguf, write_gguf
from lora_jax.models.llama import gguf as llama_gguf
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.zoo import load_causal_lm

from tests.gguf_files import quantized
from tests.served.tiny_models import LLAMA, TOKENIZER, Tiny, arrays_of, random_params
from tests.toy_models import relative_difference

TOKENS = jnp.asarray([[5, 17, 30, 40, 2, 9]])


def write_base(path):
  """Writes a random Llama, 2 layers of 64, its kernels as Q4_1."""
  config = LlamaConfig(**LLAMA | {"embed_dim": 64, "mlp_dim": 64, "num_heads": 4})
  tiny = Tiny(config, random_params(shapes_of(Llama(config))), path)
  tensors = {
    name: quantized(array, "Q4_1") if name.startswith("blk.") and array.ndim == 2 else array
    for name, array in arrays_of(tiny)
  }
  write_gguf(path, "llama", llama_gguf.written_metadata(config) | TOKENIZER, tensors)
  return path


def write_data(path):
  lines = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}"} for i in range(24)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def config_of(folder, **changes):
  settings = {
    "workdir": str(folder / "run"),
    "model.folder": str(write_base(folder / "base.gguf")),
    "model.param_dtype": "stored",
    "data.file": str(write_data(folder / "data.jsonl")),
    "data.batch_size": 4,
    "data.num_epochs": 1,
    "method": "qa_lora",
    "lora.rank": 2,
    "lora.target": r"layers.*/kernel",
    "optimizer.learning_rate": 3e-2,
    "samples.count": 0,
  }
  return apply(get_config(), settings | changes)


@pytest.mark.long
def test_a_run_of_qa_lora_becomes_a_gguf_file(tmp_path, capsys, monkeypatch):
  finetune.run(config_of(tmp_path))
  printed = capsys.readouterr().out
  assert f"# python -m experiments.export {tmp_path / 'run'} merged.gguf --merged" in printed
  merged = tmp_path / "merged.gguf"
  export.main([str(tmp_path / "run"), str(merged), "--merged"])
  printed = capsys.readouterr().out
  assert f"wrote {merged}\nrounding the minima of 14 weights" in printed
  assert "% of its norm (layers_" in printed
  assert "partly lost" not in printed

  base = open_gguf(tmp_path / "base.gguf")
  new = open_gguf(merged)
  assert new.metadata == base.metadata
  assert merged.stat().st_size == base.path.stat().st_size
  in_gguf, before = (
    model.call(model.params, TOKENS) for model in map(load_causal_lm, (merged, base.path))
  )
  model = load_causal_lm(base.path, param_dtype="stored")
  lora, adapter = load_peft(tmp_path / "run" / "peft", model.stored, model.params)
  in_floats = lj.lora(model.call, lora).apply(model.params, adapter, TOKENS)  # QA-LoRA as LoRA
  update = float(jnp.abs(in_floats - before).max())
  assert update > 0.1
  assert float(jnp.abs(in_gguf - in_floats).max()) < 0.1 * update
  assert relative_difference(in_gguf, in_floats) < 0.02

  errors = {"layers_0/mlp/up/kernel": 0.3}
  monkeypatch.setattr(export, "export_merged_gguf", lambda config, out: errors)
  export.main([str(tmp_path / "run"), str(tmp_path / "small.gguf"), "--merged"])
  assert "30.0% of its norm" in (printed := capsys.readouterr().out)
  assert "an update this small is partly lost. Train longer" in printed
  monkeypatch.undo()
  with pytest.raises(SystemExit, match="exists; nothing is overwritten"):
    export.main([str(tmp_path / "run"), str(merged), "--merged"])
  raw = bytearray(base.path.read_bytes())
  raw[-1] ^= 1
  base.path.write_bytes(raw)
  with pytest.raises(SystemExit, match="trained on other weights than are in"):
    export.main([str(tmp_path / "run"), str(tmp_path / "other.gguf"), "--merged"])
