"""Reads the trained trees of finished runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.config import AdaptationConfig
from experiments.harness.methods import find_method
from experiments.harness.optimizer import run_optimizer
from experiments.harness.workdir import read_finished, read_result
from lora_jax.training.checkpoint import Checkpoints, restore_adapter
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.held import read_held
from lora_jax.training.step import start, trainable_tree


def restore_trained(
  config: AdaptationConfig,
  params: PyTree,
  trainable: PyTree,
  mesh: Mesh,
  *,
  checkpoint: str = "best",
  saved: str = "best",
  decays: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, float | None]:
  """Returns a finished run's trainable tree, and its validation loss if the run has one.

  Args:
    config: the run's config.
    params: the base params, placed on `mesh`.
    trainable: as the method's `init` returns it, or its shapes with their shardings.
    mesh: the mesh of both trees.
    checkpoint: best or last.
    saved: the checkpoint that `adapter/` holds, if the method saves an adapter.
    decays: as in `make_optimizer`.
  Raises:
    FileNotFoundError: if there is no adapter or no such checkpoint.
    ValueError: if the run is not finished, or belongs to another base model or method.
  """
  folder, result = Path(config.workdir), read_finished(config.workdir)
  if find_method(config.method).saves_adapter and checkpoint == saved:
    check_base(folder, params)
    return restore_adapter(folder / "adapter", trainable), result.get("valid_loss")
  step = result["best_step" if checkpoint == "best" else "num_train_steps"]
  path = folder / "checkpoints" / str(step)
  if not path.is_dir():
    raise FileNotFoundError(f"{path} does not exist: the {checkpoint} checkpoint of {folder}")
  method, steps = find_method(config.method), result["num_train_steps"]
  optimizer, _ = run_optimizer(config, method, params, trainable, steps, decays)
  state, frozen, _ = start(params, trainable, optimizer, jax.random.key(0), mesh)
  with Checkpoints(folder / "checkpoints") as checkpoints:
    restored = checkpoints.restore(step, state, fingerprint(params))
  frozen = {**frozen, "adapter": read_held(folder, frozen["adapter"])}
  return trainable_tree(restored.state, frozen), restored.loss


def initial_shapes(adaptation: lj.Adaptation, params: PyTree, batch: Any) -> PyTree:
  """Returns the shapes of a method's trainable tree, with the shardings that `init` gives it.

  Nothing is computed: some methods decompose every weight to initialize theirs.

  Args:
    adaptation: the method applied to the loss.
    params: the base params, or their shapes.
    batch: a batch, or its shapes.
  """
  shapes = jax.eval_shape(adaptation.init, jax.random.key(0), params, batch)
  return jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
    shapes,
    lj.shardings(shapes, params),
  )


def check_base(folder: str | Path, params: PyTree) -> None:
  """Raises ValueError if a finished run was trained on other base params."""
  expected, actual = (read_result(folder) or {}).get("base"), fingerprint(params)
  if expected not in (None, actual):
    raise ValueError(
      f"{folder} was trained on a base model with fingerprint {expected}, and this one has "
      f"{actual}. Load the base model that it was trained on: the adapter fits no other"
    )
