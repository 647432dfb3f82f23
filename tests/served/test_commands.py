"""From a GGUF file to a served adapter by the commands of the README."""

import json

import pytest

import lora_jax as lj
from experiments import export, finetune
from experiments.configs.finetune import get_config
from experiments.harness.launch import apply
from lora_jax.interop import load_gguf_adapter, load_peft
from lora_jax.models.zoo import load_causal_lm

from tests.served.agreement import NUM_GREEDY, compare
from tests.served.llama_cpp import Adapter
from tests.served.tiny_models import make_tiny

pytestmark = pytest.mark.served
PROMPT = [*b"the cat"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_finetune_export_serve(name, llama_cpp, report, tmp_path):
  tiny, data, run = make_tiny(tmp_path, name), tmp_path / "data.jsonl", tmp_path / "run"
  lines = [{"prompt": f"the cat {i} ", "completion": f"sat {i % 3}"} for i in range(24)]
  data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  changes = {
    **{"model.folder": str(tiny.path), "model.param_dtype": "stored", "data.file": str(data)},
    **{"workdir": str(run), "lora.rank": 4, "optimizer.learning_rate": 3e-2, "samples.count": 1},
  }
  finetune.run(apply(get_config(), changes))
  path = tmp_path / "served" / "adapter.gguf"
  export.main([str(run), str(path)])
  base = load_causal_lm(tiny.path, param_dtype="stored")
  for config, trainable in (
    load_peft(run / "peft", base.stored, base.params),
    load_gguf_adapter(path, base.module.config, base.params),
  ):
    lora, arguments = lj.lora(base.call, config), (base.params, trainable)
    got = compare(llama_cpp, tiny.path, lora.apply, arguments, PROMPT, Adapter(path))
    report(f"{f'finetune and export, {name}':35} {got}")
    assert got.difference < 1e-3
    assert got.num_equal == NUM_GREEDY
