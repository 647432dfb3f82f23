"""Makes tests/golden/shared with PEFT: python -m tests.make_shared_golden

Each file is an adapter with random weights of VeRA, (IA)^3, trainable tokens or LayerNorm tuning,
for a small model of tests/golden: the tensors by PEFT's names, and the adapted model's `logits`.
"""

from typing import Any

from tests.make_peft_golden import MODELS, base_model, logits, tokens_of

GOLDEN = MODELS / "shared"
TOKENS = [3, 17, 60]
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
  "vera": (
    "llama/llama_biased",
    "VeraConfig",
    {"r": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "save_projection": True},
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
  import peft
  import torch
  from safetensors.numpy import save_file

  GOLDEN.mkdir(exist_ok=True)
  for name, (base, kind, settings) in ADAPTERS.items():
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(base_model(base), config)
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.requires_grad:
          parameter.add_(0.3 * torch.randn(parameter.shape))
    arrays = {n: x.numpy() for n, x in peft.get_peft_model_state_dict(model).items()}
    file = GOLDEN / f"{name}.safetensors"
    save_file(arrays | {"logits": logits(model.eval(), tokens_of(base))}, file)
    file.chmod(0o644)


if __name__ == "__main__":
  main()
