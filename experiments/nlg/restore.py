"""Finished runs of `experiments.gpt2_e2e`: their weights, ready for use."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.gpt2_e2e import generate
from experiments.harness.recipe import make_optimizer
from experiments.harness.workdir import Config, read_config, read_result
from experiments.nlg.gpt2 import Base, load_base, method
from lora_jax.adaptation import Adaptation
from lora_jax.data.batches import fill
from lora_jax.training.checkpoint import Checkpoints, Restored, restore_adapter
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh
from lora_jax.training.step import start, trainable_tree


class Finished(NamedTuple):
  """A finished run: `load_run(folder).generate([...])`.

  Attributes:
    config: of the run.
    base: that it adapted.
    params: the base's, with what was trained merged into them.
    mesh: that they lie on.
  """

  config: Config
  base: Base
  params: PyTree
  mesh: Mesh

  def generate(self, contexts: list[str]) -> list[str]:
    """Returns one text for each context, by the run's beam search."""
    return generate(self.config, self.base, self.params, contexts, self.mesh)


def load_run(folder: str | Path) -> Finished:
  """Loads a finished run, whatever its method, on one device.

  Raises:
    FileNotFoundError: if the folder is no run's, or what was trained is not there.
    ValueError: if the run is not finished.
  """
  config: Config = read_config(folder)
  mesh = make_mesh()
  base = load_base(config, mesh)
  params, _ = restore_params(folder, config.fit.keep, base, mesh)
  return Finished(config, base, params, mesh)


def restore_params(
  folder: str | Path, checkpoint: str, base: Base, mesh: Mesh
) -> tuple[PyTree, float | None]:
  """Returns what a finished run trained, merged into its base, and its validation loss.

  Args:
    folder: of the run, whatever its method.
    checkpoint: best or last.
    base: that the run adapted, as `load_base` returns it.
    mesh: that the base lies on.
  Raises:
    FileNotFoundError: if there is no adapter or no such checkpoint.
    ValueError: if they are of another base or another method.
  """
  folder, result = Path(folder), read_result(folder)
  config: Config = read_config(folder)
  if result is None:
    raise ValueError(f"{folder} is not finished: start its command again, which goes on with it")
  if config.method == "frozen_base":
    return base.params, result["valid_loss"]
  adaptation, trainable = _begun(config, base)
  if config.method == "lora" and checkpoint == config.fit.keep:  # which adapter/ holds
    check_base(folder, base.params)
    adapter = restore_adapter(folder / "adapter", trainable)
    return adaptation.merge(base.params, adapter), result["valid_loss"]
  optimizer, _ = make_optimizer(config, result["num_train_steps"])
  state, frozen, _ = start(base.params, trainable, optimizer, jax.random.key(0), mesh)
  found = read_checkpoint(folder, checkpoint, result, state, fingerprint(base.params))
  return adaptation.merge(base.params, trainable_tree(found.state, frozen)), found.loss


def load_adapter(folder: str | Path, base: Base) -> PyTree:
  """Returns the trainable tree of a finished LoRA run.

  Raises:
    FileNotFoundError: if there is no adapter.
    ValueError: if the run was of another method or another base.
  """
  config: Config = read_config(folder)
  if config.method != "lora":
    raise ValueError(f"{folder} is a run of {config.method}, which has no adapter")
  check_base(folder, base.params)
  return restore_adapter(Path(folder) / "adapter", _begun(config, base)[1])


def check_base(folder: str | Path, params: PyTree) -> None:
  """Raises ValueError if a finished run's result names another base than `params`."""
  made = (read_result(folder) or {}).get("base")
  if made is not None and made != (found := fingerprint(params)):
    raise ValueError(
      f"{folder} was trained on a base with fingerprint {made}, and its folder has {found} by now. "
      "Restore that base; on another one the adapter means nothing"
    )


def _begun(config: Config, base: Base) -> tuple[Adaptation, PyTree]:
  """Returns a run's method, applied to the loss, and the trainable tree as it began."""
  adaptation = method(config)(language_model_loss(base.module))
  batch = jax.eval_shape(lambda: fill([], batch_size=1, row_length=2, loss_length=2))
  return adaptation, adaptation.init(jax.random.key(0), base.params, batch)


def read_checkpoint(
  folder: Path, checkpoint: str, result: dict[str, Any], like: PyTree, base: str
) -> Restored:
  """Returns a finished run's checkpoint.

  Args:
    folder: of the run.
    checkpoint: best or last.
    result: of the run.
    like: the train state, as `start` returns it.
    base: the fingerprint of the run's base.
  Raises:
    FileNotFoundError: if it is not there.
    ValueError: if it is of another base or another method.
  """
  step = result["best_step" if checkpoint == "best" else "num_train_steps"]
  path = folder / "checkpoints" / str(step)
  if not path.is_dir():
    raise FileNotFoundError(f"the {checkpoint} checkpoint of {folder} is not there: {path}")
  with Checkpoints(folder / "checkpoints") as checkpoints:
    return checkpoints.restore(step, like, base)
