"""Makes tests/golden/optimizers with PEFT: python -m tests.make_optimizers_golden

Each file has the adapter of three linear layers, the gradients of a few steps, and the adapter
after each step: by PEFT's LoRA-FA optimizer, and by SGD with PEFT's AdaLoRA, whose penalty is added
to these gradients. A name is `step/layer/array`; arrays are as PEFT stores them.
"""

from types import SimpleNamespace
from typing import Any

from tests.paths import ROOT

GOLDEN = ROOT / "tests" / "golden" / "optimizers"
SHAPES = {"up": (6, 9), "gate": (6, 5), "down": (9, 6)}
RANK, ALPHA, LEARNING_RATE = 4, 6, 0.1
LORA_FA_STEPS = 4
ADALORA = {"target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": 14}
ARRAYS = ("lora_A", "lora_E", "lora_B")


def base() -> Any:
  """Returns a module whose loss is 0 and that uses no layer."""
  import torch

  class Base(torch.nn.Module):
    def __init__(self):
      super().__init__()
      for name, (inputs, outputs) in SHAPES.items():
        setattr(self, name, torch.nn.Linear(inputs, outputs, bias=False))

    def forward(self):
      return SimpleNamespace(loss=torch.zeros(()))

  return Base()


def adapter(model: Any) -> dict[str, Any]:
  """Returns the adapter's parameters by `layer/array`."""
  found = {}
  for name, parameter in model.named_parameters():
    parts = name.split(".")
    array = next((part for part in parts if part in ARRAYS), None)
    if array:
      found[f"{parts[parts.index(array) - 1]}/{array}"] = parameter
  return found


def arrays(step: Any, parameters: dict[str, Any]) -> dict[str, Any]:
  return {f"{step}/{name}": p.detach().numpy().copy() for name, p in parameters.items()}


def draw(parameters: dict[str, Any], scale: float) -> None:
  import torch

  with torch.no_grad():
    for parameter in parameters.values():
      parameter.copy_(scale * torch.randn(parameter.shape))


def lora_fa() -> dict[str, Any]:
  import peft
  import torch
  from peft.optimizers import create_lorafa_optimizer, lorafa

  lorafa.is_bf16_available = lambda: False  # else the preconditioner is multiplied in bfloat16
  config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(SHAPES))
  model = peft.get_peft_model(base(), config)
  parameters = adapter(model)
  draw(parameters, 0.5)
  made = arrays(0, parameters)
  optimizer = create_lorafa_optimizer(model, RANK, ALPHA, LEARNING_RATE)
  optimizer.param_groups[0]["eps"] = 1e-12  # with 1e-6, Adam of transformers is not optax's
  for step in range(1, LORA_FA_STEPS + 1):
    for name, parameter in parameters.items():
      if "lora_B" in name:
        parameter.grad = torch.randn(parameter.shape)
        made[f"{step}/{name}/gradient"] = parameter.grad.numpy().copy()
    optimizer.step()
    made |= arrays(step, {n: p for n, p in parameters.items() if "lora_B" in n})
  return made


def adalora() -> dict[str, Any]:
  import peft
  import torch

  settings = {"init_r": RANK, "lora_alpha": ALPHA, "target_modules": list(SHAPES)}
  model = peft.get_peft_model(base(), peft.AdaLoraConfig(**settings, **ADALORA))
  parameters = adapter(model)
  draw(parameters, 0.3)
  made = arrays(0, parameters)
  optimizer = torch.optim.SGD(parameters.values(), LEARNING_RATE)
  for step in range(1, ADALORA["total_step"] + 1):
    optimizer.zero_grad()
    model.base_model().loss.backward()
    for name, parameter in parameters.items():
      gradient = torch.randn(parameter.shape)
      made[f"{step}/{name}/gradient"] = gradient.numpy()
      parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    optimizer.step()
    model.base_model.update_and_allocate(step)
    made |= arrays(step, parameters)
    allocator = model.base_model.rankallocator
    for name in (n for n in allocator.exp_avg_ipt if "lora_E" in n):
      short = name.split(".lora_E")[0].split(".")[-1]
      score = allocator._element_score(name)
      made[f"{step}/{short}/importance_of_E"] = score.detach().numpy().copy()
  return made


def main() -> None:
  import torch
  from safetensors.numpy import save_file

  GOLDEN.mkdir(exist_ok=True)
  for make in (lora_fa, adalora):
    torch.manual_seed(0)
    file = GOLDEN / f"{make.__name__}.safetensors"
    save_file(make(), file)
    file.chmod(0o644)


if __name__ == "__main__":
  main()
