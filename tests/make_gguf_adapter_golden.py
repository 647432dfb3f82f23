"""Makes tests/golden/gguf_adapters: python -m tests.make_gguf_adapter_golden

Adapters of tests/golden/peft as llama.cpp's `convert_lora_to_gguf.py` converts them. They are made
by its rules, with NumPy and the package `gguf`; none of this project's code is used.

    A and B are PEFT's, (rank, in) and (out, rank)
    architecture llama: the rows of B of q_proj and k_proj are permuted, (heads, 2, half, rank)
    alpha is lora_alpha
"""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "gguf_adapters"
NAMES = {
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
ADAPTERS = {  # the name of PEFT's adapter: its base model and llama.cpp's architecture
  "llama": ("llama/llama3", "llama"),
}


def permuted(b: np.ndarray, heads: int) -> np.ndarray:
  """Returns rows in the order of interleaved rotations."""
  return b.reshape(heads, 2, len(b) // heads // 2, *b.shape[1:]).swapaxes(1, 2).reshape(b.shape)


def make(name: str) -> None:
  base, architecture = ADAPTERS[name]
  model = json.loads((GOLDEN / base / "config.json").read_text())
  adapter = json.loads((GOLDEN / "peft" / name / "adapter_config.json").read_text())
  writer = gguf.GGUFWriter(FOLDER / f"{name}.gguf", architecture)
  writer.add_type(gguf.GGUFType.ADAPTER)
  writer.add_name(name)
  writer.add_base_model_count(1)
  writer.add_base_model_name(0, base)
  writer.add_file_type(gguf.LlamaFileType.ALL_F32)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
  writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter["lora_alpha"])
  heads = {
    "attn_q": model["num_attention_heads"],
    "attn_k": model["num_key_value_heads"],
  }
  for key, array in load_file(GOLDEN / "peft" / name / "adapter_model.safetensors").items():
    _, _, _, _, layer, *module, factor, _ = key.split(".")
    tensor = NAMES[".".join(module)]
    if factor == "lora_B" and architecture == "llama" and tensor in heads:
      array = permuted(array, heads[tensor])
    writer.add_tensor(f"blk.{layer}.{tensor}.weight.{factor.lower()}", array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


if __name__ == "__main__":
  FOLDER.mkdir(exist_ok=True)
  for adapter_name in ADAPTERS:
    make(adapter_name)
