"""What a train step of each arm costs: time, floating-point operations, memory.

The arms take turns, so that other work on the machine slows all of them; `step_ratio` is the median
over the turns of an arm's time to the control's. The operations are those of the matmuls of the
compiled step, each iteration of a loop counted. The memory is that of the compiled step: its
arguments, which include the base model, its results and its temporaries.
"""

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from experiments.configs import Config
from experiments.harness.config import read_config
from experiments.harness.fit import initialize
from experiments.harness.flops import compiled_flops
from experiments.harness.methods import adapt, find_method
from experiments.harness.optimizer import run_optimizer
from experiments.nlg.base import Base, load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import load_data
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import place_batch
from lora_jax.training.step import make_train_step, start

TURNS = 5


class Step(NamedTuple):
  """A compiled train step with its arguments: `state, _ = compiled(state, frozen, batch)`."""

  compiled: Any
  state: Any
  frozen: Any
  batch: Any

  def run(self) -> tuple[float, "Step"]:
    """Returns the seconds of one step, and the step with its next state."""
    gc.collect()
    begin = time.perf_counter()
    state, _ = jax.block_until_ready(self.compiled(self.state, self.frozen, self.batch))
    return time.perf_counter() - begin, self._replace(state=state)


def compile_step(settings: E2EConfig, base: Base, mesh: Mesh) -> Step:
  """Compiles the train step of a run, and gives it the run's first batch."""
  batch = load_data(settings, base).train[0]
  loss = adapt(settings)(language_model_loss(base.module))
  trainable = initialize(settings, loss, base.params, batch)
  method = find_method(settings.method)
  optimizer, _ = run_optimizer(settings, method, base.params, trainable, num_train_steps=100)
  state, frozen, optimizer = start(base.params, trainable, optimizer, jax.random.key(0), mesh)
  placed = place_batch(mesh, batch, 1)
  step: Any = make_train_step(loss, optimizer, state, 1)
  return Step(step.lower(state, frozen, placed).compile(), state, frozen, placed)


def measure_costs(
  configs: Mapping[str, Config], control: str, turns: int = TURNS
) -> dict[str, dict[str, Any]]:
  """Returns the costs of a train step of each arm.

  Returns:
    By arm: `gflop` and `step_megabytes`; `step_seconds`, the median; `step_ratio`, to the control.
  """
  steps, shared = {}, None
  for arm, config in configs.items():
    settings = read_config(E2EConfig, config)
    mesh = settings.mesh.make()
    owns_base = find_method(settings.method).owns_base  # its step donates the base's arrays
    shared = shared or load_base(settings, mesh)
    base = load_base(settings, mesh) if owns_base else shared
    steps[arm] = compile_step(settings, base, mesh)
  steps = {arm: step.run()[1] for arm, step in steps.items()}  # the first one is slower
  seconds: dict[str, list[float]] = {arm: [] for arm in steps}
  for _ in range(turns):
    for arm in steps:
      taken, steps[arm] = steps[arm].run()
      seconds[arm].append(taken)
  costs = {}
  for arm, step in steps.items():
    memory = step.compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    ratios = [own / other for own, other in zip(seconds[arm], seconds[control], strict=True)]
    costs[arm] = {
      "gflop": compiled_flops(step.compiled.as_text()) / 1e9,
      "step_megabytes": (size - memory.alias_size_in_bytes) / 1e6,
      "step_seconds": statistics.median(seconds[arm]),
      "step_ratio": statistics.median(ratios),
    }
  return costs
