"""What would fit, if a step does not."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.plan.chips import CHIPS, GIB, Chip
from experiments.plan.config import PlanConfig
from experiments.plan.models import has_logits_of_tokens
from experiments.plan.step import Costs


def advice(config: PlanConfig, cost: Costs, chip: Chip, result: Mapping[str, Any]) -> str:
  """Returns a sentence on what exceeds a chip's memory, and changes by which a step may fit.

  By arithmetic: weights, optimizer and gradients shrink with the number of chips, all else with the
  rows of a chip. Only compiling the changed plan shows whether it fits.
  """
  chips = math.prod(result["mesh"].values())
  memory, room = chip.memory / GIB, 0.9 * chip.memory
  problem = f"needs {cost.peak / GIB:.1f} GiB of the {memory:g} GiB of a chip."
  least = cost.arguments + cost.gradients
  changes = _smaller_activations(config, result)
  if least > room:
    needed = math.ceil(chips * least / room)
    changes = [
      f"weights, optimizer and gradients are {least / GIB:.1f} GiB: take at least {needed} chips"
    ]
    if config.base in ("bfloat16", "float32"):
      changes.append("for LoRA quantize the frozen weights, --base=int8 or nf4")
  larger = [name for name, other in CHIPS.items() if cost.peak <= 0.9 * other.memory]
  if larger:
    changes.append(f"take as many chips of {' or '.join(larger)}")
  return f"{problem} What may fit: {'; or '.join(changes)}"


def _smaller_activations(config: PlanConfig, result: Mapping[str, Any]) -> list[str]:
  """Returns the changes that leave a chip less to compute at once."""
  mesh = result["mesh"]
  changes: list[str] = []
  if config.remat != "nothing_saveable":
    changes.append("keep only the layers' inputs, --config.remat=nothing_saveable")
  rows = result["batch_size"] // (mesh["data"] * mesh["fsdp"])
  if rows > 1:
    changes.append(f"give a chip fewer rows than {rows}, --config.data.batch_size")
  if has_logits_of_tokens(config.model) and not config.data.loss_chunk:
    changes.append("compute the logits of some tokens at once, --config.data.loss_chunk=64")
  chips, tensor = "" if mesh["fsdp"] % 2 == 0 else ", on twice the chips", 2 * mesh["tensor"]
  return [*changes, f"split layers further, --config.mesh.tensor={tensor}{chips}"]
