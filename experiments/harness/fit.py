"""The training that all experiments share: from a loss under a method to what the run keeps."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.harness.config import TrainingConfig
from experiments.harness.methods import Method
from experiments.harness.optimizer import make_optimizer
from lora_jax.adaptation import Adaptation
from lora_jax.data.batches import BatchSource, as_grain
from lora_jax.training.checkpoint import save_adapter
from lora_jax.training.loop import Evaluation, FitConfig, Fitted, fit
from lora_jax.trees import partition, trainable_mask


class Trained(NamedTuple):
  """What a run has trained.

  Attributes:
    fitted: the result of `fit`.
    kept: the trainable tree of the best step or the last one, as the config wants.
    loss: its validation loss, nats per token; or what else the evaluation has minimized.
    fields: what `result.json` holds about training.
  """

  fitted: Fitted
  kept: PyTree
  loss: float
  fields: dict[str, Any]


def count(tree: PyTree) -> int:
  """Returns the number of elements of a tree of arrays, or of their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_trained(trainable: PyTree) -> int:
  """Returns the number of trained parameters, without arrays that a variant holds frozen."""
  tree = {"base": None, "adapter": trainable}
  return count(partition(tree, trainable_mask(tree))[0])


def initialize(config: TrainingConfig, loss: Adaptation, params: PyTree, batch: Any) -> PyTree:
  """Returns the trainable tree that a run starts with, drawn from its seed."""
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
    config: of the run.
    method: of `harness.methods`.
    loss: the method applied to a function `fn(params, batch) -> LossSum`.
    params: of the base, placed on `mesh`.
    trainable: as `initialize` returns it. It is donated.
    batches: of training.
    mesh: as `make_mesh` returns it.
    examples: what it is trained on, for the printed line: "4,000 lines".
    num_train_steps: 0 is one for each batch.
    keep: which checkpoint counts.
    decays: as of `make_optimizer`.
    eval_loss: as of `lora_jax.training.loop.fit`, as the two that follow.
    eval_batches: see there.
    evaluate: see there.
  """
  workdir, steps = Path(config.workdir), num_train_steps or len(batches)
  optimizer, schedule = make_optimizer(config.optimizer, steps, decays)
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
    config=FitConfig(
      num_train_steps=steps,
      eval_every_steps=min(config.fit.eval_every_steps, steps),
      checkpoint_every_steps=config.fit.checkpoint_every_steps,
      log_every_steps=config.fit.log_every_steps,
      accumulation_steps=config.fit.accumulation_steps,
    ),
    eval_loss=eval_loss,
    eval_batches=eval_batches,
    evaluate=evaluate,
    workdir=workdir,
    key=jax.random.split(jax.random.key(config.seed))[1],
    mesh=mesh,
    schedule=schedule,
  )
  best = keep == "best"
  kept = fitted.best if best else fitted.last
  if method.saves_adapter and not (workdir / "adapter").exists():
    save_adapter(workdir / "adapter", kept)
  fields = {
    "trainable_parameters": size,
    "num_train_steps": steps,
    "best_step": fitted.best_step,
    "train_seconds": fitted.seconds,
    "train_tokens": fitted.tokens,
    "base": fitted.base,
  }
  return Trained(fitted, kept, fitted.best_loss if best else fitted.last_loss, fields)
