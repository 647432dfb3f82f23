"""Makes tests/golden/llama with `transformers`: python -m tests.make_llama_golden

Each folder is a small random model of the Llama family as `save_pretrained` writes it, the `_fused`
ones with all experts of a layer in one tensor; next to it are tokens and the logits that
`transformers` computes for them.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "llama"
BASE = {
  "vocab_size": 64,
  "max_position_embeddings": 48,
  "hidden_size": 32,
  "intermediate_size": 56,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "bos_token_id": 0,
  "eos_token_id": 0,
  "pad_token_id": 0,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500000.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MIXTURE = {
  "hidden_size": 16,
  "intermediate_size": 12,
  "moe_intermediate_size": 12,
  "num_experts_per_tok": 2,
}
MIXED = {"use_sliding_window": True, "max_window_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
  "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
  "llama_biased": (
    "Llama",
    {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
  ),
  "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 8}),
  "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
  "qwen3": ("Qwen3", {"head_dim": 16}),
  "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
  "mixtral": ("Mixtral", MIXTURE | {"num_local_experts": 4, "sliding_window": 7}),
  "mixtral_fused": ("Mixtral", MIXTURE | {"num_local_experts": 3, "num_experts_per_tok": 1}),
  "qwen2_moe": ("Qwen2Moe", MIXTURE | {"num_experts": 4, "shared_expert_intermediate_size": 20}),
  "qwen3_moe": ("Qwen3Moe", MIXTURE | {"num_experts": 4, "head_dim": 8, "norm_topk_prob": True}),
  "qwen2_mixed": ("Qwen2", MIXTURE | {"sliding_window": 4, **MIXED}),
}


def make_model(name: str, seed: int) -> Any:
  """Returns a random model with logits of about 10, as in a trained model."""
  import torch
  import transformers

  torch.manual_seed(seed)
  family, shape = MODELS[name]
  config = getattr(transformers, f"{family}Config")(**BASE | shape)
  model = getattr(transformers, f"{family}ForCausalLM")(config)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim > 1:
        parameter.copy_(torch.randn(parameter.shape) * 1.5 / parameter.shape[-1] ** 0.5)
      else:
        parameter.add_(0.2 * torch.randn(parameter.shape))
  return model.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
  """Returns the logits of `transformers`."""
  import torch

  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens)).logits.numpy()


def main() -> None:
  from safetensors.numpy import save_file

  shutil.rmtree(GOLDEN, ignore_errors=True)
  for seed, name in enumerate(MODELS):
    model = make_model(name, seed)
    model.save_pretrained(GOLDEN / name, save_original_format=not name.endswith("_fused"))
    (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(seed).integers(1, 64, (2, 13))
    arrays = {"tokens": tokens.astype(np.int32), "logits": logits(model, tokens)}
    save_file(arrays, GOLDEN / f"{name}.safetensors")
    for path in (GOLDEN / f"{name}.safetensors", GOLDEN / name / "model.safetensors"):
      path.chmod(0o644)


if __name__ == "__main__":
  main()
