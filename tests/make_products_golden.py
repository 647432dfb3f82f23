"""Makes tests/golden/products with PEFT: python -m tests.make_products_golden

Each file is an adapter with random weights of HiRA, LoHa, LoKr or MiSS for a small Llama of
tests/golden: the tensors by PEFT's names, and the adapted model's `logits`.
"""

from typing import Any

from tests.make_peft_golden import MODELS, base_model, logits, tokens_of

GOLDEN, BASE = MODELS / "products", "llama/llama_biased"
TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
  "hira": ("HiraConfig", {"r": 3}),
  "loha": ("LoHaConfig", {"r": 2, "alpha": 4}),
  "lokr": ("LoKrConfig", {"r": 2, "alpha": 4, "decompose_factor": 4}),
  "lokr_whole": ("LoKrConfig", {"r": 8, "alpha": 8}),
  "lokr_both": ("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True}),
  "miss": ("MissConfig", {"r": 3}),
  "miss_mini": ("MissConfig", {"r": 3, "mini_r": 4, "init_weights": "mini"}),
  "miss_bat": ("MissConfig", {"r": 2, "init_weights": "bat"}),
}


def main() -> None:
  import peft
  import torch
  from safetensors.numpy import save_file

  GOLDEN.mkdir(exist_ok=True)
  for name, (kind, settings) in ADAPTERS.items():
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=TARGETS, **settings)
    model = peft.get_peft_model(base_model(BASE), config)
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.requires_grad:
          parameter.copy_(0.3 * torch.randn(parameter.shape))
    arrays = {n: x.numpy() for n, x in peft.get_peft_model_state_dict(model).items()}
    file = GOLDEN / f"{name}.safetensors"
    save_file(arrays | {"logits": logits(model.eval(), tokens_of(BASE))}, file)
    file.chmod(0o644)


if __name__ == "__main__":
  main()
