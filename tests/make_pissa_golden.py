"""Makes tests/golden/pissa with PEFT: python -m tests.make_pissa_golden

Each file is a linear layer that PEFT has initialized by PiSSA or OLoRA, with alpha / rank = 2: its
weight, the initial A and B, other values of them as after training, an input, and the outputs of
the layer with both.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "pissa"
INITS = ("pissa", "olora")
RANK, ALPHA, INPUTS, OUTPUTS = 3, 6, 12, 10


def arrays(init: str) -> dict[str, np.ndarray]:
  import torch
  from peft import LoraConfig, get_peft_model

  draw = np.random.default_rng(0)
  weight = draw.standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
  x = draw.standard_normal((4, INPUTS)).astype(np.float32)
  model = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS, bias=False))
  model[0].weight.data = torch.tensor(weight)
  adapted = get_peft_model(
    model,
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=init),
  )
  layer = adapted.base_model.model[0]
  factors = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}

  def numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())

  result = {"weight": weight, "x": x, "first": numpy(adapted(torch.tensor(x)))}
  result |= {f"initial_{name}": numpy(factor).copy() for name, factor in factors.items()}
  for factor in factors.values():
    factor.data += torch.tensor(0.3 * draw.standard_normal(factor.shape).astype(np.float32))
  result |= {name: numpy(factor) for name, factor in factors.items()}
  return result | {"trained": numpy(adapted(torch.tensor(x)))}


def main() -> None:
  GOLDEN.mkdir(parents=True, exist_ok=True)
  for init in INITS:
    save_file(arrays(init), GOLDEN / f"{init}.safetensors")


if __name__ == "__main__":
  main()
