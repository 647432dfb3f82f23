"""Loads the trained weights of finished runs of `experiments.gpt2_e2e`."""

from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.methods import adapt, find_method
from experiments.harness.restore import check_base, initial_shapes, restore_trained
from experiments.harness.workdir import read_finished, read_run
from experiments.nlg.base import Base, load_base
from experiments.nlg.config import Checkpoint, E2EConfig
from experiments.nlg.e2e import generate, served
from lora_jax.adaptation import Adaptation
from lora_jax.data.batches import fill
from lora_jax.training.checkpoint import restore_adapter
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh


class Finished(NamedTuple):
  """A finished run: `load_run(folder).generate([...])`.

  Attributes:
    config: the run's config.
    base: the model that it adapted.
    params: as `served` returns them.
    mesh: the devices of the params.
  """

  config: E2EConfig
  base: Base
  params: PyTree
  mesh: Mesh

  def __repr__(self) -> str:
    return f"Finished({self.config.workdir}, {self.base!r})"

  def generate(self, contexts: list[str]) -> list[str]:
    """Returns one text for each context, by the run's beam search."""
    return generate(self.config, self.base, self.params, contexts, self.mesh)


def load_run(folder: str | Path) -> Finished:
  """Loads a finished run, whatever its method, on one device.

  Raises:
    FileNotFoundError: if the folder is not a run's, or the trained weights are missing.
    ValueError: if the run is not finished, or has no model.
  """
  config, mesh = read_run(E2EConfig, folder), make_mesh()
  check_has_model(config)
  base = load_base(config, mesh)
  params, _ = restore_params(config, config.fit.keep, base, mesh)
  return Finished(config, base, params, mesh)


def check_has_model(config: E2EConfig) -> None:
  """Raises ValueError if a run's texts do not come from a model."""
  if find_method(config.method).is_floor:
    raise ValueError(
      f"{config.workdir} is a run of {config.method}, which has no model; expected another method's"
    )


def restore_params(
  config: E2EConfig, checkpoint: Checkpoint, base: Base, mesh: Mesh, params: PyTree | None = None
) -> tuple[PyTree, float | None]:
  """Returns a finished run's params as they are served, and its validation loss.

  Args:
    config: the run's config; any method.
    checkpoint: best or last.
    base: the run's base model, as `load_base` returns it.
    mesh: the devices of the base model.
    params: of the base model that is served with the adapter; None is its own. The loss is always
      that of the base model's own params.
  Raises:
    FileNotFoundError: if there is no adapter or no such checkpoint.
    ValueError: if they belong to another base model or another method.
  """
  result = read_finished(config.workdir)
  params = base.params if params is None else params
  if not find_method(config.method).trains:
    return lj.dequantize(params), result["valid_loss"]
  adaptation = _adaptation(config, base)
  shapes = trainable_shapes(adaptation, base.params)
  trained, loss = restore_trained(
    config, base.params, shapes, mesh, checkpoint=checkpoint, saved=config.fit.keep
  )
  return served(config, adaptation, params, trained), loss


def load_adapter(config: E2EConfig, base: Base) -> PyTree:
  """Returns the trainable tree of a finished run with an adapter.

  Raises:
    FileNotFoundError: if there is no adapter.
    ValueError: if the run's method has none, or it belongs to another base model.
  """
  if not find_method(config.method).saves_adapter:
    raise ValueError(f"{config.workdir} is a run of {config.method}, which has no adapter")
  check_base(config.workdir, base.params)
  shapes = trainable_shapes(_adaptation(config, base), base.params)
  return restore_adapter(Path(config.workdir) / "adapter", shapes)


def trainable_shapes(adaptation: Adaptation, params: PyTree) -> PyTree:
  """Returns `initial_shapes` for the loss of a language model."""
  batch = jax.eval_shape(lambda: fill([], batch_size=1, row_length=2, loss_length=2))
  return initial_shapes(adaptation, params, batch)


def _adaptation(config: E2EConfig, base: Base) -> Adaptation:
  """Returns a run's method, applied to the loss."""
  return adapt(config)(language_model_loss(base.module))
