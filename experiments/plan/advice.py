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

  By arithmetic: what a chip is given shrinks with the number of chips, what else it needs with its
  rows. Only compiling the changed plan shows whether it fits.
  """
  mesh = result["mesh"]
  chips = math.prod(mesh.values())
  memory = chip.memory / GIB
  problem = f"needs {cost.peak / GIB:.1f} GiB of the {memory:g} GiB of a chip."
  changes = []
  if cost.arguments > 0.9 * chip.memory:
    needed = math.ceil(chips * cost.arguments / (0.9 * chip.memory))
    larger = [name for name, other in CHIPS.items() if cost.arguments <= 0.9 * other.memory]
    changes.append(
      f"weights and optimizer alone are {cost.arguments / GIB:.1f} GiB: take at least {needed} "
      f"chips" + (f", or as many {' or '.join(larger)}" if larger else "")
    )
    if config.base in ("bfloat16", "float32"):
      changes.append("for LoRA quantize the frozen weights, --base=int8 or nf4")
  else:
    if config.remat != "nothing_saveable":
      changes.append("keep only the layers' inputs, --config.remat=nothing_saveable")
    rows = result["batch_size"] // (mesh["data"] * mesh["fsdp"])
    if rows > 1:
      changes.append(f"give a chip fewer rows than {rows}, --config.data.batch_size")
    if has_logits_of_tokens(config.model) and not config.data.loss_chunk:
      changes.append("compute the logits of some tokens at once, --config.data.loss_chunk=64")
    changes.append(f"split layers further, --config.mesh.tensor={2 * mesh['tensor']}")
  return f"{problem} What may fit: {'; or '.join(changes)}"
