"""Makes tests/golden/shared with PEFT: python -m tests.make_shared_golden

Each file is an adapter with random weights of VeRA, RandLoRA, Uni-LoRA, TinyLoRA, (IA)^3, trainable
tokens or LayerNorm tuning, for a small model of tests/golden: the tensors by PEFT's names, and the
adapted model's `logits`.
"""

from typing import Any

from tests.make_peft_golden import MODELS, write_adapters

GOLDEN = MODELS / "shared"
TOKENS = [3, 17, 60]
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
  "vera": (
    "llama/llama_biased",
    "VeraConfig",
    {"r": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "save_projection": True},
  ),
  "randlora": (
    "llama/llama_biased",
    "RandLoraConfig",
    {"r": 8, "randlora_alpha": 2, "target_modules": ["q_proj", "down_proj"]},
  ),
  "unilora": (
    "llama/llama_biased",
    "UniLoraConfig",
    {
      "r": 3,
      "theta_d_length": 40,
      "target_modules": ["q_proj", "v_proj", "down_proj"],
      "save_indices": True,
    },
  ),
  "tinylora": (
    "llama/llama_biased",
    "TinyLoraConfig",
    {"r": 3, "u": 5, "weight_tying": 1.0, "target_modules": ["q_proj", "v_proj", "down_proj"]},
  ),
  "ia3": (
    "llama/llama_biased",
    "IA3Config",
    {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
  ),
  "trainable_tokens": (
    "gpt2/tied",
    "TrainableTokensConfig",
    {"target_modules": ["wte"], "token_indices": TOKENS},
  ),
  "ln_tuning": ("gpt2/tied", "LNTuningConfig", {"target_modules": ["ln_1", "ln_2", "ln_f"]}),
}


def main() -> None:
  write_adapters(GOLDEN, ADAPTERS, lambda parameter, drawn: parameter.add_(drawn))


if __name__ == "__main__":
  main()
