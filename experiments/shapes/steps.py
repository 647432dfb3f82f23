"""One train step of a model at its real size, compiled from shapes: operations and memory.

Nothing of the model's size is allocated. Layers are scanned and recomputed in the backward pass,
the optimizer is AdamW, all numbers are float32.
"""

import dataclasses
from typing import NamedTuple

from experiments.harness.flops import compiled_flops
from experiments.plan.config import PlanLora
from experiments.plan.models import Planned, make_plan
from experiments.plan.step import lower_step
from experiments.shapes.models import MODELS, make_module
from experiments.shapes.rows import target_of
from lora_jax.models.gpt2.model import GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.training.mesh import make_mesh

METHODS = {"FT": "full_finetuning", "LoRA": "lora"}


class Cost(NamedTuple):
  """A compiled step.

  Attributes:
    arguments: of weights, optimizer and batch, bytes.
    temporaries: of activations, gradients and updates that are not arguments, bytes.
    flops: of its matmuls, operations, each iteration of a loop counted.
  """

  arguments: float
  temporaries: float
  flops: float


def step_cost(model: str, method: str, rank: int, batch_size: int, length: int) -> Cost:
  """Compiles a train step.

  Args:
    model: a key of `MODELS`; RoBERTa and DeBERTa have a head of two labels.
    method: a key of `METHODS`; LoRA is that of q and v.
    rank: of LoRA.
    batch_size: rows.
    length: tokens of a row, with a loss at every one for language models.
  """
  lora = PlanLora(rank, float(rank), 0.0, target_of("qv"))
  step = lower_step(
    *(plan(model), METHODS[method], "float32", lora, batch_size, length, make_mesh())
  )
  compiled = step.lowered.compile()
  memory = compiled.memory_analysis()
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  return Cost(arguments, temporaries, compiled_flops(compiled.as_text()))


def plan(model: str) -> Planned:
  """Returns a model with its loss and the arrays of its batches."""
  config = dataclasses.replace(MODELS[model], remat="nothing_saveable")
  if not isinstance(config, GPT2Config):
    config = dataclasses.replace(config, num_labels=2)
  module = make_module(config)
  return make_plan(module, lambda dtype: shapes_of(module))
