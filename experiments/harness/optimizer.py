"""AdamW as in the paper, and the schedule of its learning rate."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from experiments.harness.config import Optimizer, TrainingConfig
from experiments.harness.methods import Method, Setup
from lora_jax.trees import key_parts


def run_optimizer(
  config: TrainingConfig,
  method: Method,
  params: PyTree,
  trainable: PyTree,
  num_train_steps: int,
  decays: Callable[[PyTree], PyTree] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns the optimizer of a run, as its method wraps it, and the schedule of its learning rate.

  Args:
    config: the run's config.
    method: its row of `harness.methods`.
    params: the base params, or their shapes.
    trainable: the initial trainable tree, or its shapes.
    num_train_steps, decays: as in `make_optimizer`.
  """
  make = functools.partial(make_schedule, config.optimizer)
  schedule = method.schedule(make, num_train_steps)
  optimizer, _ = make_optimizer(config.optimizer, num_train_steps, decays, schedule)
  if method.wrap is not None:
    optimizer = method.wrap(optimizer, Setup(config, params, trainable, num_train_steps))
  return optimizer, schedule


def make_optimizer(
  config: Optimizer,
  num_train_steps: int,
  decays: Callable[[PyTree], PyTree] | None = None,
  schedule: optax.Schedule | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns AdamW and the schedule of its learning rate.

  Args:
    config: the optimizer's section.
    num_train_steps: the length of the schedule.
    decays: a function from the trainable tree to a mask of the leaves that have weight decay; None
      is all.
    schedule: of the learning rate; None is the config's.
  """
  schedule = schedule or make_schedule(config, num_train_steps)
  adamw = optax.adamw(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decays,
  )
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, adamw), schedule


def make_schedule(config: Optimizer, num_train_steps: int) -> optax.Schedule:
  """Returns the config's schedule for this number of steps."""
  warmup_steps = min(config.warmup_steps, num_train_steps)
  other_steps = max(num_train_steps - warmup_steps, 1)
  after = {
    "linear": optax.linear_schedule(config.learning_rate, 0.0, other_steps),
    "cosine": optax.cosine_decay_schedule(config.learning_rate, other_steps),
    "constant": optax.constant_schedule(config.learning_rate),
  }
  warmup = optax.linear_schedule(0.0, config.learning_rate, warmup_steps)
  return optax.join_schedules([warmup, after[config.schedule]], [warmup_steps])


def decays(trainable: PyTree) -> PyTree:
  """Returns a mask of the leaves that have weight decay: all but biases and normalizations."""

  def decay(keys: Any, leaf: Any) -> bool:
    del leaf
    return key_parts(keys)[-1] not in ("bias", "scale")

  return jax.tree_util.tree_map_with_path(decay, trainable)
