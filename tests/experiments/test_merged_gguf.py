"""A run of QA-LoRA on a quantized GGUF file, exported as another such file."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

import lora_jax as lj
from experiments import export, finetune
from experiments.configs.finetune import get_config
from experiments.harness.config import read_config, replace_fields
from experiments.harness.launch import apply
from experiments.harness.methods import adapt
from experiments.harness.workdir import write_json
from experiments.nlg import base as nlg_base
from experiments.nlg import merged_gguf
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.restore import trainable_shapes
from lora_jax.interop import load_peft
from lora_jax.models.checkpoints.gguf import open_gguf, write_gguf
from lora_jax.models.llama import gguf as llama_gguf
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.zoo import load_causal_lm
from lora_jax.training.checkpoint import save_adapter
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh

from tests.gguf_files import quantized
from tests.served.tiny_models import LLAMA, TOKENIZER, Tiny, arrays_of, random_params
from tests.tiny_e2e import tiny_config
from tests.toy_models import randomized, relative_difference

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


@pytest.mark.long
def test_the_base_model_of_an_e2e_run_is_read_once(tmp_path, monkeypatch):
  changes = {
    **{"method": "qa_lora", "lora.rank": 2, "lora.target": r"layers.*/kernel"},
    **{"model.folder": str(write_base(tmp_path / "base.gguf")), "data.prompt": "newline"},
    **{"data.max_length": 128, "data.row_length": 128, "data.loss_length": 128},
    **{"decoding.num_inputs": 0, "model.param_dtype": "bfloat16"},
  }
  settings = read_config(E2EConfig, apply(tiny_config(tmp_path / "run"), changes))
  base = load_base(settings, make_mesh())
  loss = adapt(settings)(language_model_loss(base.module))
  trained = randomized(trainable_shapes(loss, base.params))
  save_adapter(tmp_path / "run" / "adapter", trained)
  write_json(tmp_path / "run" / "config.json", dataclasses.asdict(settings))
  write_json(tmp_path / "run" / "result.json", {"base": fingerprint(base.params)})
  reads = []

  def load(*args, **options):
    reads.append(options["param_dtype"])
    return load_causal_lm(*args, **options)

  monkeypatch.setattr(nlg_base, "load_causal_lm", load)
  monkeypatch.setattr(merged_gguf, "load_causal_lm", load)
  export.main([str(tmp_path / "run"), str(tmp_path / "merged.gguf"), "--merged"])
  assert reads == ["stored"]
  in_gguf = load_causal_lm(tmp_path / "merged.gguf")
  merged = loss.merge(load_causal_lm(tmp_path / "base.gguf").params, trained)
  assert relative_difference(in_gguf.params, merged) < 0.02
  nf4 = replace_fields(settings, {"model.param_dtype": "nf4"})
  with pytest.raises(ValueError, match=r"adapts nf4 weights, .* Give a folder"):
    merged_gguf.export_merged_gguf(nf4, tmp_path / "other.gguf")
