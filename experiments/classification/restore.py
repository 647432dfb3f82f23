"""Loads the trained weights of finished runs of `experiments.glue`."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from experiments.classification.config import GlueConfig
from experiments.classification.data import encode_records
from experiments.classification.encoder import (
  Base,
  label_names,
  load_base,
  model_folder,
  num_labels,
)
from experiments.harness.methods import adapt, exported_adapter, find_method, lora_config
from experiments.harness.optimizer import decays
from experiments.harness.restore import initial_shapes, restore_trained
from experiments.harness.workdir import read_finished, read_run
from lora_jax.data.classification import fill
from lora_jax.data.sets.glue import Record
from lora_jax.interop import merged_params, save_peft
from lora_jax.models.bert import folder as bert_folder
from lora_jax.models.bert.model import Bert
from lora_jax.models.checkpoints.hub import dtype_of
from lora_jax.models.deberta import folder as deberta_folder
from lora_jax.training.classification import classification_loss, classifier
from lora_jax.training.mesh import make_mesh


class FinishedEncoder(NamedTuple):
  """A finished run: `load_encoder(folder).classify([("A text.", None)])`.

  Attributes:
    config: the run's config.
    base: the model that it adapted, with the initial head.
    trainable: the trained tree of the run's best step.
    params: the base model's params with the trained tree merged, if the method's can be.
  """

  config: GlueConfig
  base: Base
  trainable: PyTree
  params: PyTree

  def __repr__(self) -> str:
    return f"FinishedEncoder({self.config.workdir}, {self.base!r})"

  def classify(self, texts: Sequence[tuple[str, str | None]]) -> Float[np.ndarray, "N L"]:
    """Returns the head's outputs for pairs of texts; the second of a single text is None."""
    records = [Record(first, second, None) for first, second in texts]
    examples = encode_records(self.config, self.base, records)
    batch = fill(examples, len(examples), max(len(example.tokens) for example in examples))
    logits = classifier(self.base.module)
    if find_method(self.config.method).merges:
      return np.asarray(jax.jit(logits)(self.params, batch))
    adapted = functools.partial(adapt(self.config)(logits).apply, lora_key=None)
    return np.asarray(jax.jit(adapted)(self.params, self.trainable, batch))

  def save_adapter(
    self, folder: str | Path, base_model: str | None = None, for_server: bool = False
  ) -> None:
    """Writes the adapter and the head in PEFT's format, with the arguments of `save_peft`.

    Raises:
      ValueError: if PEFT has no format for the run's method.
    """
    if not find_method(self.config.method).exports_adapter:
      raise ValueError(f"a run of {self.config.method} has no adapter; export it with --merged")
    module = self.base.module
    if isinstance(module, Bert):
      stored = bert_folder.stored_tensors(module.config)
    else:
      stored = deberta_folder.stored_tensors(module.config)
    save_peft(
      folder,
      *exported_adapter(self.config, self.trainable, self.base.params),
      stored,
      self.base.params,
      base_model=base_model,
      for_server=for_server,
    )

  def save_merged(self, folder: str | Path) -> dict[str, float]:
    """Writes the whole model as a folder for `transformers`, with the names of its labels.

    Returns:
      The rounding error of each merged leaf, if the run has an adapter: the model then has the
      dtype of its base model's folder. Other weights are written as they are.
    Raises:
      ValueError: if the method's adapters cannot be merged.
    """
    if not find_method(self.config.method).merges:
      raise ValueError(
        f"a run of {self.config.method} cannot be merged: its adapter is no change of weights. Use "
        "classify"
      )
    module, params = self.base.module, self.params
    source, labels = model_folder(self.config), label_names(self.config)
    errors: dict[str, float] = {}
    if find_method(self.config.method).exports_adapter:
      lora = lora_config(self.config)
      params, errors = merged_params(lora, self.trainable, self.base.params, dtype_of(source))
    if isinstance(module, Bert):
      bert_folder.save_bert(folder, module.config, params, source, labels=labels)
    else:
      deberta_folder.save_deberta(folder, module.config, params, source, labels=labels)
    return errors


def load_encoder(folder: str | Path) -> FinishedEncoder:
  """Loads a finished run of `experiments.glue`, whatever its method, on one device.

  Raises:
    FileNotFoundError: if the folder is not a run's, or the trained weights are missing.
    ValueError: if the run is not finished, or its base model has changed.
  """
  config, mesh = read_run(GlueConfig, folder), make_mesh()
  read_finished(folder)
  base = load_base(config, mesh)
  adapted = adapt(config)(classification_loss(base.module))
  batch = fill([], batch_size=1, row_length=2, label_type=float if num_labels(config) == 1 else int)
  shapes = initial_shapes(adapted, base.params, batch)
  trained, _ = restore_trained(config, base.params, shapes, mesh, decays=decays)
  merges = find_method(config.method).merges
  params = adapted.merge(base.params, trained) if merges else base.params
  return FinishedEncoder(config, base, trained, params)
