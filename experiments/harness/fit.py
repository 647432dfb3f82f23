"""The training shared by all experiments, from an adapted loss to the run's result."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.harness.config import Fit, RunConfig, TrainingConfig
from experiments.harness.methods import Method
from experiments.harness.optimizer import run_optimizer
from experiments.harness.workdir import trained_together
from lora_jax.adaptation import Adaptation
from lora_jax.data.batches import BatchSource, as_grain
from lora_jax.quantization.leaf import is_quantized
from lora_jax.training.checkpoint import save_adapter
from lora_jax.training.loop import Evaluation, FitConfig, Fitted, fit
from lora_jax.training.processes import from_first
from lora_jax.trees import partition, trainable_mask


class Training(NamedTuple):
  """The arguments of `fit_run`: the training of one run of a language model."""

  config: Any  # an AdaptationConfig, whose section `fit` has more fields
  method: Method
  loss: Adaptation
  params: PyTree
  trainable: PyTree
  batches: BatchSource[Any]
  mesh: Mesh
  examples: str
  num_train_steps: int
  keep: Literal["best", "last"]
  eval_loss: Adaptation
  eval_batches: Callable[[], Iterable[Any]]


class Trained(NamedTuple):
  """The outcome of a run's training.

  Attributes:
    fitted: the result of `fit`.
    kept: the trainable tree of the best step or of the last one, as the config chooses.
    loss: its validation loss, nats per token; or the evaluation's criterion.
    fields: the fields of `result.json` about training.
  """

  fitted: Fitted
  kept: PyTree
  loss: float
  fields: dict[str, Any]


def count(tree: PyTree) -> int:
  """Returns the number of weights of a tree of arrays, or of their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_quantized))


def count_trained(trainable: PyTree) -> int:
  """Returns the number of trained parameters, without arrays that a variant keeps frozen."""
  tree = {"base": None, "adapter": trainable}
  return count(partition(tree, trainable_mask(tree))[0])


def initialize(config: TrainingConfig, loss: Adaptation, params: PyTree, batch: Any) -> PyTree:
  """Returns a run's initial trainable tree, drawn from its seed."""
  key, _ = jax.random.split(jax.random.key(config.seed))
  trainable = loss.init(key, params, batch)
  jax.block_until_ready(trainable)  # so that its time is not that of the first step
  return trainable


def fit_run(
  config: TrainingConfig,
  method: Method,
  loss: Adaptation,
  params: PyTree,
  trainable: PyTree,
  batches: BatchSource[Any],
  mesh: Mesh,
  *,
  examples: str,
  num_train_steps: int = 0,
  keep: Literal["best", "last"] = "best",
  decays: Callable[[PyTree], PyTree] | None = None,
  eval_loss: Adaptation | None = None,
  eval_batches: Callable[[], Iterable[Any]] | None = None,
  evaluate: Callable[[PyTree, PyTree], Evaluation] | None = None,
) -> Trained:
  """Trains in the run's folder, and saves the adapter if the method has one.

  Args:
    config: the run's config.
    method: a row of `harness.methods`.
    loss: the method applied to a function `fn(params, batch) -> LossSum`.
    params: the base params, placed on `mesh`.
    trainable: as `initialize` returns it. It is donated.
    batches: the training batches.
    mesh: as `make_mesh` returns it.
    examples: the amount of training data for the printed line, such as "4,000 examples".
    num_train_steps: number of updates; 0 means one for each batch.
    keep: the checkpoint that is kept.
    decays: as in `make_optimizer`.
    eval_loss, eval_batches, evaluate: as in `lora_jax.training.loop.fit`.
  """
  workdir, steps = Path(config.workdir), num_train_steps or len(batches)
  optimizer, schedule = run_optimizer(config, method, params, trainable, steps, decays)
  size = count_trained(trainable)
  print(
    f"{method.label} in {workdir}: {size:,} trainable parameters, {examples}, {steps:,} steps",
    flush=True,
  )
  fitted = fit(
    loss,
    params,
    trainable,
    optimizer,
    iter(as_grain(batches)),  # pyright: ignore[reportArgumentType]
    config=fit_config(config.fit, steps),
    eval_loss=eval_loss,
    eval_batches=eval_batches,
    evaluate=evaluate,
    workdir=workdir,
    key=run_key(config),
    mesh=mesh,
    schedule=schedule,
  )
  best = keep == "best"
  kept = fitted.best if best else fitted.last
  if method.saves_adapter and not from_first((workdir / "adapter").exists):
    save_adapter(workdir / "adapter", kept)
  fields = {
    "trainable_parameters": size,
    "num_train_steps": steps,
    "best_step": fitted.best_step,
    "train_seconds": fitted.seconds,
    "train_tokens": fitted.tokens,
    "base": fitted.base,
    **trained_together(workdir),
  }
  return Trained(fitted, kept, fitted.best_loss if best else fitted.last_loss, fields)


def run_key(config: RunConfig) -> jax.Array:
  """Returns the key of a run's dropout, drawn from its seed."""
  return jax.random.split(jax.random.key(config.seed))[1]


def fit_config(fit: Fit, num_train_steps: int) -> FitConfig:
  """Returns the part of a run's config that `lora_jax.training.loop.fit` takes."""
  return FitConfig(
    num_train_steps=num_train_steps,
    eval_every_steps=min(fit.eval_every_steps, num_train_steps),
    checkpoint_every_steps=fit.checkpoint_every_steps,
    log_every_steps=fit.log_every_steps,
    accumulation_steps=fit.accumulation_steps,
    checkpoint_every_seconds=fit.checkpoint_every_seconds,
  )
