"""Trains an arm without a run's folder, for measurements on its way."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.fit import count, initialize
from experiments.harness.methods import adapt, find_method
from experiments.harness.optimizer import run_optimizer
from experiments.nlg.base import Base
from experiments.nlg.config import E2EConfig
from experiments.nlg.from_data import read_start, start_from_data
from lora_jax.data.batches import Batches
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import place_batch
from lora_jax.training.step import TrainState, TrainStep, make_train_step, start


class Started(NamedTuple):
  """An arm before its first step.

  Attributes:
    loss: its method, applied to the loss of a language model.
    state, frozen: as `lora_jax.training.step.start` returns them; a step donates the state.
    step: the train step.
    mesh: the devices.
  """

  loss: lj.Adaptation
  state: TrainState
  frozen: PyTree
  step: TrainStep
  mesh: Mesh

  @property
  def size(self) -> int:
    """The number of trained parameters."""
    return count(self.state.part)


def start_training(config: E2EConfig, base: Base, batches: Batches, mesh: Mesh) -> Started:
  """Initializes an arm's adapter and optimizer as a run of `experiments.gpt2_e2e` does.

  Args:
    config: the arm's config; its workdir takes an initial adapter that is made from data.
    base: the base model, whose params training donates if the method trains them.
    batches: the training batches, one for each step.
    mesh: as `make_mesh` returns it.
  """
  fn = language_model_loss(base.module)
  start_from_data(config, fn, base.params, batches, mesh)
  loss, method = adapt(config)(fn), find_method(config.method)
  trainable = read_start(config, initialize(config, loss, base.params, batches[0]))
  optimizer, _ = run_optimizer(config, method, base.params, trainable, len(batches))
  key = jax.random.split(jax.random.key(config.seed))[1]
  state, frozen, optimizer = start(base.params, trainable, optimizer, key, mesh)
  return Started(loss, state, frozen, make_train_step(loss, optimizer, state), mesh)


def train(run: Started, batches: Batches, num_steps: int) -> TrainState:
  """Returns the state after some steps.

  Raises:
    FloatingPointError: if the loss is not finite in the last step.
  """
  state, loss = run.state, 0.0
  for i in range(num_steps):
    state, metrics = run.step(state, run.frozen, place_batch(run.mesh, batches[i]))
    loss = metrics.loss
  if not np.isfinite(loss):
    raise FloatingPointError(f"the loss of step {num_steps} is {float(loss)}")
  return state
