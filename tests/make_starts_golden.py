"""Makes tests/golden/starts.safetensors with PEFT: python -m tests.make_starts_golden

It has A and B of adapters that PEFT initializes from data, as EVA, LoRA-GA and CorDA, for the small
model of tests/golden/llama/llama3 and the tokens in the file: `eva/<module>/a`, and so on.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tests.make_peft_golden import MODELS, base_model

GOLDEN = MODELS / "starts.safetensors"
MODEL = "llama/llama3"
SETTINGS = {"r": 8, "lora_alpha": 16, "target_modules": ["o_proj", "down_proj"]}
EVA_RANK = 14  # with these ranks PEFT's randomized decompositions are whole ones
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")


def tokens() -> np.ndarray:
  """Returns tokens, (rows, time): more than there are inputs."""
  return np.random.default_rng(0).integers(0, 64, (8, 40))


def inputs() -> dict[str, Any]:
  import torch

  return {"input_ids": torch.tensor(tokens())}


def eva() -> Any:
  import peft

  config = peft.LoraConfig(
    **SETTINGS | {"r": EVA_RANK},
    init_lora_weights="eva",
    eva_config=peft.EvaConfig(rho=2.0, tau=0.9999),
  )
  model = peft.get_peft_model(base_model(MODEL), config)
  peft.initialize_lora_eva_weights(model, [inputs()], show_progress_bar=False)
  return model


def lora_ga(direction: str) -> Any:
  import peft
  from peft.tuners.lora.config import LoraGAConfig
  from peft.tuners.lora.loraga import preprocess_loraga

  config = peft.LoraConfig(
    **SETTINGS,
    init_lora_weights="lora_ga",
    lora_ga_config=LoraGAConfig(direction=direction),
  )
  model, batch = base_model(MODEL), inputs()

  def step() -> None:
    model(**batch, labels=batch["input_ids"]).loss.backward()

  preprocess_loraga(model, config, step)
  return peft.get_peft_model(model, config)


def corda(method: str) -> Any:
  import peft
  from peft.tuners.lora.config import CordaConfig
  from peft.tuners.lora.corda import preprocess_corda

  config = peft.LoraConfig(
    **SETTINGS, init_lora_weights="corda", corda_config=CordaConfig(corda_method=method)
  )
  model, batch = base_model(MODEL), inputs()

  def run() -> None:
    model(input_ids=batch["input_ids"][:1])  # PEFT scales each row by its largest value

  preprocess_corda(model, config, run)
  return peft.get_peft_model(model, config)


def factors(model: Any) -> dict[str, np.ndarray]:
  """Returns A, (rank, in), B, (out, rank), and the scaling of each adapted module."""
  arrays = {}
  for name, module in model.named_modules():
    if hasattr(module, "lora_A"):
      path = name.removeprefix("base_model.model.model.")
      arrays[f"{path}/a"] = module.lora_A["default"].weight.detach().numpy().copy()
      arrays[f"{path}/b"] = module.lora_B["default"].weight.detach().numpy().copy()
      arrays[f"{path}/scaling"] = np.float32(module.scaling["default"])
  return arrays


def main() -> None:
  import torch
  from safetensors.numpy import save_file

  torch.manual_seed(0)
  starts = {"eva": eva(), "corda_ipm": corda("ipm"), "corda_kpm": corda("kpm")}
  starts |= {f"lora_ga_{direction}": lora_ga(direction) for direction in DIRECTIONS}
  arrays = {
    f"{start}/{name}": np.ascontiguousarray(array)
    for start, model in starts.items()
    for name, array in factors(model).items()
  }
  save_file(arrays, GOLDEN)
  Path(GOLDEN).chmod(0o644)


if __name__ == "__main__":
  main()
