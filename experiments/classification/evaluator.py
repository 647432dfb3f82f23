"""The metrics of a task, over every record once, and the predictions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.classification.config import GlueConfig
from experiments.classification.data import Data
from experiments.classification.encoder import Base
from experiments.harness.methods import adapt
from lora_jax.metrics import glue as metrics
from lora_jax.training.classification import classifier, label_loss
from lora_jax.training.loop import Evaluation
from lora_jax.training.mesh import place_batch


class Evaluator:
  """Measures a trainable tree on all records, each exactly once."""

  def __init__(self, config: GlueConfig, base: Base, data: Data, mesh: Mesh):
    adapted = adapt(config)(classifier(base.module))
    self._task, self._data, self._mesh = config.data.task, data, mesh
    self._logits = jax.jit(lambda p, t, batch: adapted.apply(p, t, batch, lora_key=None))

  def __call__(self, params: PyTree, trainable: PyTree) -> Evaluation:
    """Returns the task's metrics; the best checkpoint is that of the highest main metric."""
    outputs, data = self.outputs(params, trainable), self._data
    labels = [record.label for record in data.valid_records]
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
      raise ValueError(f"{self._task}: {len(labels) - len(known)} of {len(labels)} have no label")
    groups = [record.group for record in data.valid_records if record.group is not None]
    answers = [record.answer for record in data.valid_records]
    scores = metrics.score(self._task, outputs, known, groups, answers)
    for name, part in self._parts():
      accuracy = metrics.score(self._task, outputs[part], known[part])["accuracy"]
      scores |= {f"accuracy_{name}": accuracy}
    loss = label_loss(jnp.asarray(outputs), jnp.asarray(known), jnp.ones(len(known)))
    mean = float(loss.total / loss.weight)
    return Evaluation(-scores[metrics.main_metric(self._task)], {"loss": mean, **scores})

  def _parts(self) -> list[tuple[str, slice]]:
    first = self._data.num_matched
    return [("matched", slice(first)), ("mismatched", slice(first, None))] if first else []

  def outputs(self, params: PyTree, trainable: PyTree) -> np.ndarray:
    """Returns the head's outputs (records, L), in the order of the records."""
    batches = self._data.valid
    parts = [
      self._logits(params, trainable, place_batch(self._mesh, batches[i]))
      for i in range(len(batches))
    ]
    outputs = np.zeros((len(self._data.valid_records), parts[0].shape[-1]), np.float32)
    for i, part in enumerate(parts):
      numbers = batches.numbers(i)
      outputs[numbers] = multihost_utils.process_allgather(part, tiled=True)[: len(numbers)]
    return outputs


def write_predictions(path: Path, outputs: np.ndarray) -> None:
  """Writes a line for each record: the class's number, or the score of a regression."""
  if outputs.shape[1] == 1:
    lines = [f"{value:.6g}" for value in outputs[:, 0]]
  else:
    lines = [str(number) for number in np.argmax(outputs, axis=1)]
  path.write_text("\n".join(lines) + "\n", "utf-8")
