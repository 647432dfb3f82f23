"""What a train step of each arm costs: time, floating-point operations, memory.

The arms take turns, so that other work on the machine slows all of them; `step_ratio` is the median
over the turns of an arm's time to the control's, `cpu_ratio` that of CPU time, all threads. The
operations are those of the matmuls of the compiled step, each iteration of a loop counted. The
memory is that of the compiled step: its arguments, which include the base model, its results and
its temporaries.
"""

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.configs import Config
from experiments.harness.config import read_config
from experiments.harness.fit import initialize
from experiments.harness.flops import compiled_flops
from experiments.harness.methods import adapt, find_method
from experiments.harness.optimizer import run_optimizer
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import load_data
from lora_jax.adaptation import Adaptation
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

  def run(self) -> tuple[tuple[float, float], "Step"]:
    """Returns the wall-clock and CPU seconds of one step, and the step with its next state."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    state, _ = jax.block_until_ready(self.compiled(self.state, self.frozen, self.batch))
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return seconds, self._replace(state=state)


def compile_step(
  settings: E2EConfig, loss: Adaptation, params: PyTree, trainable: PyTree, batch: Any, mesh: Mesh
) -> Step:
  """Compiles the train step of a run.

  Args:
    settings: of the run; its folder is not read.
    loss: its method, applied to the loss of a language model.
    params: the base params; the trainable tree itself if the method trains them.
    trainable: the initial trainable tree, which the step donates.
    batch: of the first step.
    mesh: as `make_mesh` returns it.
  """
  method = find_method(settings.method)
  optimizer, _ = run_optimizer(settings, method, params, trainable, num_train_steps=100)
  state, frozen, optimizer = start(params, trainable, optimizer, jax.random.key(0), mesh)
  placed = place_batch(mesh, batch, 1)
  step: Any = make_train_step(loss, optimizer, state, 1)
  return Step(step.lower(state, frozen, placed).compile(), state, frozen, placed)


def measure_costs(
  configs: Mapping[str, Config], control: str, turns: int = TURNS
) -> dict[str, dict[str, Any]]:
  """Returns the costs of a train step of each arm, from the configs of their runs.

  Returns:
    As `measure_steps`.
  """
  steps, shared = {}, None
  for arm, config in configs.items():
    settings = read_config(E2EConfig, config)
    mesh = settings.mesh.make()
    owns_base = find_method(settings.method).owns_base  # its step donates the base's arrays
    shared = shared or load_base(settings, mesh)
    base = load_base(settings, mesh) if owns_base else shared
    batch = load_data(settings, base).train[0]
    loss = adapt(settings)(language_model_loss(base.module))
    trainable = initialize(settings, loss, base.params, batch)
    steps[arm] = compile_step(settings, loss, base.params, trainable, batch, mesh)
  return measure_steps(steps, control, turns)


def measure_steps(
  steps: Mapping[str, Step], control: str, turns: int = TURNS
) -> dict[str, dict[str, Any]]:
  """Runs compiled steps in turns, every second time in reverse order.

  Args:
    steps: by arm. They are donated.
    control: the arm of the ratios' denominators.
    turns: the number of measured steps of each arm.

  Returns:
    By arm: `gflop` and `step_megabytes`; `step_seconds`, the median; `step_ratio` and `cpu_ratio`.
  """
  latest = {arm: step.run()[1] for arm, step in steps.items()}  # the first one is slower
  seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in steps}
  for turn in range(turns):
    for arm in list(steps)[:: -1 if turn % 2 else 1]:
      taken, latest[arm] = latest[arm].run()
      seconds[arm].append(taken)

  def ratio(arm: str, clock: int) -> float:
    pairs = zip(seconds[arm], seconds[control], strict=True)
    return statistics.median(
      arm_time[clock] / control_time[clock] for arm_time, control_time in pairs
    )

  costs = {}
  for arm, step in steps.items():
    memory = step.compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    costs[arm] = {
      "gflop": compiled_flops(step.compiled.as_text()) / 1e9,
      "step_megabytes": (size - memory.alias_size_in_bytes) / 1e6,
      "step_seconds": statistics.median(wall for wall, _ in seconds[arm]),
      "step_ratio": ratio(arm, 0),
      "cpu_ratio": ratio(arm, 1),
    }
  return costs
