"""Makes tests/golden/prefix with PEFT: python -m tests.make_prefix_golden

NAME/ is an adapter of prompt tuning with random vectors, written by PEFT's `save_pretrained`, and
NAME.safetensors has the logits of the adapted model, those at the virtual tokens included.

past_NAME.safetensors has `vectors` (layers, slots, D) and the logits at the real tokens of PEFT's
prefix tuning, whose keys and values are those that the model computes from these vectors.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.make_peft_golden import MODELS, base_model, inputs_of, is_encoder, logits, tokens_of

GOLDEN = MODELS / "prefix"
NUM_SLOTS = 3
PROMPT = {
  "gpt2": "gpt2/tied",
  "llama": "llama/llama3",
  "gemma": "llama/gemma",
  "bert": "bert/bert_classifier",
  "roberta": "bert/roberta_regression",
}
PAST = {"gpt2": "gpt2/tied", "llama": "llama/llama3"}


def prompt_tuning(base: str, folder: Path) -> np.ndarray:
  """Writes an adapter of PEFT's prompt tuning, and returns the logits of the adapted model."""
  import peft
  import torch

  torch.manual_seed(0)
  task: Any = "SEQ_CLS" if is_encoder(base) else "CAUSAL_LM"
  config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=NUM_SLOTS)
  model: Any = peft.get_peft_model(base_model(base), config).eval()
  inputs = inputs_of(base)[:2] if is_encoder(base) else (tokens_of(base),)
  model.save_pretrained(folder)
  (folder / "README.md").unlink(missing_ok=True)
  path = folder / "adapter_config.json"
  path.write_text(path.read_text().replace(str(MODELS), "golden") + "\n")
  return logits(model, *inputs)


def prefix_tuning(base: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns vectors for each layer, and the logits of PEFT's prefix tuning made of them."""
  import peft
  import torch

  torch.manual_seed(1)
  model: Any = peft.get_peft_model(
    base_model(base),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_SLOTS),  # pyright: ignore
  ).eval()
  config = model.base_model.config
  vectors = torch.randn(config.num_hidden_layers, NUM_SLOTS, config.hidden_size)
  pasts = keys_and_values(model.base_model, vectors)
  with torch.no_grad():  # (slots, layers * 2 * heads * size)
    embedding = model.prompt_encoder["default"].embedding.weight
    embedding.copy_(torch.stack(pasts, dim=1).reshape(embedding.shape))
  return vectors.numpy(), logits(model, tokens_of(base))


def keys_and_values(model: Any, vectors: Any) -> list[Any]:
  """Returns each layer's keys and then its values, (slots, heads * size), of its inputs."""
  import torch
  from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

  rows = []
  with torch.no_grad():
    for i, x in enumerate(vectors):
      if model.config.model_type == "gpt2":
        block = model.transformer.h[i]
        _, key, value = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
      else:
        block, size = model.model.layers[i], model.config.head_dim
        x = block.input_layernorm(x)
        key, value = block.self_attn.k_proj(x), block.self_attn.v_proj(x)
        heads = key.reshape(1, len(x), -1, size).transpose(1, 2)
        rotation = model.model.rotary_emb(heads, torch.arange(len(x))[None])
        _, heads = apply_rotary_pos_emb(heads, heads, *rotation)
        key = heads.transpose(1, 2).reshape(len(x), -1)
      rows += [key, value]
  return rows


def main() -> None:
  GOLDEN.mkdir(exist_ok=True)
  for name, base in PROMPT.items():
    save_file({"logits": prompt_tuning(base, GOLDEN / name)}, GOLDEN / f"{name}.safetensors")
  for name, base in PAST.items():
    vectors, outputs = prefix_tuning(base)
    save_file({"vectors": vectors, "logits": outputs}, GOLDEN / f"past_{name}.safetensors")
  for path in GOLDEN.rglob("*.safetensors"):
    path.chmod(0o644)


if __name__ == "__main__":
  main()
