"""AdamW as in the paper, and the schedule of its learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from experiments.harness.config import Optimizer
from lora_jax.trees import key_parts


def make_optimizer(
  config: Optimizer,
  num_train_steps: int,
  decays: Callable[[PyTree], PyTree] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns AdamW and the schedule of its learning rate.

  Args:
    config: the optimizer's section.
    num_train_steps: the length of the schedule.
    decays: a function from the trainable tree to a mask of the leaves that have weight decay; None
      is all.
  """
  warmup_steps = min(config.warmup_steps, num_train_steps)
  other_steps = max(num_train_steps - warmup_steps, 1)
  after = {
    "linear": optax.linear_schedule(config.learning_rate, 0.0, other_steps),
    "cosine": optax.cosine_decay_schedule(config.learning_rate, other_steps),
    "constant": optax.constant_schedule(config.learning_rate),
  }
  warmup = optax.linear_schedule(0.0, config.learning_rate, warmup_steps)
  schedule = optax.join_schedules([warmup, after[config.schedule]], [warmup_steps])
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


def decays(trainable: PyTree) -> PyTree:
  """Returns a mask of the leaves that have weight decay: all but biases and normalizations."""

  def decay(keys: Any, leaf: Any) -> bool:
    del leaf
    return key_parts(keys)[-1] not in ("bias", "scale")

  return jax.tree_util.tree_map_with_path(decay, trainable)
