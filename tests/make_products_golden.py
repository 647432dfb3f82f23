"""Makes tests/golden/products with PEFT: python -m tests.make_products_golden

Each file is an adapter with random weights of HiRA, LoHa, LoKr or MiSS for a small Llama of
tests/golden: the tensors by PEFT's names, and the adapted model's `logits`.
"""

from typing import Any

from tests.make_peft_golden import MODELS, write_adapters

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
  adapters = {
    name: (BASE, kind, {"target_modules": TARGETS, **settings})
    for name, (kind, settings) in ADAPTERS.items()
  }
  write_adapters(GOLDEN, adapters, lambda parameter, drawn: parameter.copy_(drawn))


if __name__ == "__main__":
  main()
