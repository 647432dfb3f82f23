"""What experiments read alike from their configs: LoRA, the optimizer, steps, and places."""

from collections.abc import Callable

import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.workdir import Config
from lora_jax.training.loop import FitConfig
from lora_jax.training.mesh import Rules, params_shardings
from lora_jax.trees import leaves_with_path, matches

SHARDING: Rules = (  # of all models of the zoo, whose leaves have the same names
  (r".*/(query|key|value|gate|up)/kernel", P("fsdp", "tensor")),
  (r".*/(query|key|value|gate|up)/bias", P("tensor")),
  (r".*/(attn/out|down)/kernel", P("tensor", "fsdp")),
  (r".*/experts/(gate|up)", P("fsdp", "tensor")),
  (r".*/experts/down", P("tensor", "fsdp")),
  (r".*embedding|wte/.*|wpe/.*", P(None, ("fsdp", "tensor"))),
  (r"lm_head/kernel", P("fsdp", "tensor")),
  (r".*", P()),
)


def params_places(mesh: Mesh) -> Callable[[PyTree], PyTree]:
  """Returns a function from a model's params, or their shapes, to where each lies on a mesh."""

  def places(params: PyTree) -> PyTree:
    paths = [path for path, _ in leaves_with_path(params)]
    rules = [rule for rule in SHARDING if any(matches(rule[0], path) for path in paths)]
    return params_shardings(mesh, params, rules)

  return places


def lora_config(config: Config) -> lj.LoraConfig:
  """Returns the LoRA of a config."""
  return lj.LoraConfig(**config.lora.to_dict())


def make_optimizer(
  config: Config,
  num_train_steps: int,
  decays: Callable[[PyTree], PyTree] | None = None,
  warmup_steps: int | None = None,
):
  """Returns AdamW as the paper has it, and the schedule of its learning rate.

  Args:
    config: of the run.
    num_train_steps: of the schedule.
    decays: from the trainable tree to which of its leaves have weight decay; None is all.
    warmup_steps: of the schedule; None takes the config's.
  """
  given = config.optimizer
  warmup = min(given.warmup_steps if warmup_steps is None else warmup_steps, num_train_steps)
  rest = max(num_train_steps - warmup, 1)
  after = {
    "linear": optax.linear_schedule(given.learning_rate, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(given.learning_rate, rest),
    "constant": optax.constant_schedule(given.learning_rate),
  }
  if given.schedule not in after:
    raise ValueError(f"schedule must be one of {', '.join(after)}, got {given.schedule!r}")
  schedule = optax.join_schedules(
    [optax.linear_schedule(0.0, given.learning_rate, warmup), after[given.schedule]], [warmup]
  )
  adamw = optax.adamw(
    schedule,
    b1=given.b1,
    b2=given.b2,
    eps=given.eps,
    weight_decay=given.weight_decay,
    mask=decays,
  )
  clip = optax.clip_by_global_norm(given.clip_norm) if given.clip_norm else optax.identity()
  return optax.chain(clip, adamw), schedule


def fit_config(config: Config, num_train_steps: int) -> FitConfig:
  """Returns the steps of `fit` as a config has them; a short run is evaluated at its end."""
  given = config.fit
  return FitConfig(
    num_train_steps=num_train_steps,
    eval_every_steps=min(given.eval_every_steps, num_train_steps),
    checkpoint_every_steps=given.checkpoint_every_steps,
    log_every_steps=given.log_every_steps,
    accumulation_steps=given.accumulation_steps,
  )
