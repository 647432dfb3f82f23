"""Compiles the train step of GPT-3 175B, or another model, for a TPU pod without one.

    python -m experiments.gpt3_plan --topology=v5p:4x4x4 --config.lora.rank=4
    python -m experiments.gpt3_plan --topology=v5e:16x16 --base=int8
    python -m experiments.gpt3_plan --model=llama3_70b       # or deberta_xxl, or a model's folder
    python -m experiments.gpt3_plan --topology=cpu:8 --model=gpt2_medium

The step is that of all runs: `lora_jax.training.step` with AdamW. The real compiler of TPUs, from
the extra `tpu-plan`, compiles it for devices that are only described; nothing of the model's size
is allocated. Printed are, for each chip, the bytes of weights, optimizer and gradients, the
compiler's peak memory, operations, bytes sent to other chips, and the time that a step takes at
least, by the published rates: docs/scale.md explains each.

Time: 1.5 minutes of CPU time a method, for any number of layers.
Expect: 6.36 GB a chip for LoRA and 50.49 GB for full fine-tuning, on v5p:4x4x4 with libtpu 0.0.42.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.harness.config import read_config
from experiments.harness.launch import launch
from experiments.harness.methods import find_method
from experiments.harness.table import aligned
from experiments.harness.workdir import provenance, run_once
from experiments.plan.advice import advice
from experiments.plan.chips import CHIPS, Chip, find_devices
from experiments.plan.collectives import KINDS
from experiments.plan.config import PlanConfig
from experiments.plan.models import find_model
from experiments.plan.step import Costs, lower_step, plan_step
from lora_jax.training.mesh import make_mesh, num_row_parts

PAPER_MEMORY = {"LoRA": 350e9, "full fine-tuning": 1.2e12}  # bytes, of GPT-3 175B


def run(config: ConfigDict) -> dict[str, Any]:
  """Plans a step with each method; returns the content of `result.json`."""
  settings = read_config(PlanConfig, config)
  result = run_once(settings, lambda workdir: _run(settings))
  print(report(settings, result))
  return result


def _run(config: PlanConfig) -> dict[str, Any]:
  devices, _ = find_devices(config.topology)
  data, tensor = config.mesh.data, config.mesh.tensor
  if len(devices) % (data * tensor):
    raise ValueError(
      f"mesh.data={data} x mesh.tensor={tensor} must divide the {len(devices)} chips of "
      f"{config.topology}; fsdp is the rest"
    )
  mesh = make_mesh(data, len(devices) // (data * tensor), tensor, devices)
  batch_size = config.data.batch_size or num_row_parts(mesh)
  if batch_size % num_row_parts(mesh):
    raise ValueError(
      f"data.batch_size={batch_size} must be a multiple of the {num_row_parts(mesh)} parts of the "
      "mesh's data x fsdp; or 0, which is one row for each"
    )
  model = find_model(
    config.model,
    config.data.loss_chunk or None,
    dtype="bfloat16",
    scan_layers=True,
    remat=config.remat or None,
  )
  methods = {}
  for method in config.methods:
    print(
      f"compiling a step of {find_method(method).label} for {len(devices)} devices ...", flush=True
    )
    step = lower_step(
      model, method, config.base, config.lora, batch_size, config.data.row_length, mesh
    )
    methods[method] = plan_step(step)._asdict()
  return {
    "experiment": config.experiment,
    "mesh": dict(mesh.shape),
    "batch_size": batch_size,
    "methods": methods,
    **provenance(),
  }


def report(config: PlanConfig, result: Mapping[str, Any]) -> str:
  """Returns the table of a plan, and what would fit if something does not."""
  chip = CHIPS.get(config.topology.partition(":")[0])
  mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
  costs = {method: Costs(**fields) for method, fields in result["methods"].items()}
  kinds = [kind for kind in KINDS if any(kind in cost.sent for cost in costs.values())]
  columns = [_cells(config, cost, kinds, chip, result) for cost in costs.values()]
  rows = [["per chip", *(find_method(method).label for method in costs)]]
  rows += [[name, *(column[name] for column in columns)] for name in columns[0]]
  lines = [
    f"## {config.model} on {config.topology}: {mesh}, {result['batch_size']} rows of "
    f"{config.data.row_length} tokens, base {config.base}, LoRA rank {config.lora.rank}",
    aligned(rows),
  ]
  if len(costs) > 1:
    ratio = costs["lora"].peak / costs["full_finetuning"].peak
    lines.append(f"peak memory of LoRA: {ratio:.3f} of that of full fine-tuning")
  if config.model == "gpt3":
    chips = math.prod(result["mesh"].values())
    sizes = (f"{name} {_bytes(size)}" for name, size in PAPER_MEMORY.items())
    arguments = (
      f"{find_method(method).label} {_bytes(cost.arguments * chips)}"
      for method, cost in costs.items()
    )
    lines.append(
      f"memory in section 4.2 of the paper: {', '.join(sizes)}; arguments of all chips here: "
      f"{', '.join(arguments)}"
    )
  lines += [
    f"{find_method(method).label}: {advice(config, cost, chip, result)}"
    for method, cost in costs.items()
    if chip is not None and (cost.peak > chip.memory or not cost.fits)
  ]
  return "\n\n".join(lines)


def _cells(
  config: PlanConfig,
  cost: Costs,
  kinds: Sequence[str],
  chip: Chip | None,
  result: Mapping[str, Any],
) -> dict[str, str]:
  """Returns a method's column of the table."""
  chips = math.prod(result["mesh"].values())
  sent = sum(cost.sent.values())
  cells = {
    "trained parameters": f"{cost.trained_parameters:,}",
    "weights": _bytes(cost.weights),
    "optimizer": _bytes(cost.optimizer),
    "gradients": _bytes(cost.gradients),
    "arguments, by the compiler": _bytes(cost.arguments),
    "activations and other temporaries": _bytes(cost.temporaries),
    "peak memory": _bytes(cost.peak) + ("" if cost.fits else " (does not fit)"),
    "arguments of all chips": _bytes(cost.arguments * chips),
    "operations": f"{cost.flops / 1e12:.2f} TFLOP",
    "sent to other chips": _bytes(sent),
    **{f"- {kind}": _bytes(cost.sent.get(kind, 0.0)) for kind in kinds},
  }
  if chip is not None:
    floors = {
      "operations": cost.flops / chip.flops,
      "links": sent / chip.link_rate,
      "memory": cost.arguments / chip.memory_rate,
    }
    cells |= {f"floor by {name}": f"{1e3 * time:.0f} ms" for name, time in floors.items()}
    tokens = result["batch_size"] * config.data.row_length / max(floors.values())
    cells |= {"tokens/s at the highest floor": f"{tokens:,.0f}"}
  return cells | {"compiled in": f"{cost.seconds:.0f} s"}


def _bytes(size: float) -> str:
  """Returns a size in the largest decimal unit below it."""
  for unit, scale in {"TB": 1e12, "GB": 1e9}.items():
    if size >= scale:
      return f"{size / scale:.2f} {unit}"
  return f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
  launch(
    run,
    "gpt3_plan.py",
    shorthands={"topology": "topology", "model": "model", "base": "base"},
  )
