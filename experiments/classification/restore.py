"""Finished runs of `experiments.glue`: their weights, ready for use."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from experiments.classification.encoder import (
  Base,
  label_names,
  load_base,
  lora_config,
  method,
  model_folder,
  num_labels,
)
from experiments.glue import decays
from experiments.harness.recipe import make_optimizer
from experiments.harness.workdir import Config, read_config, read_result
from experiments.nlg.restore import check_base, read_checkpoint
from lora_jax.data.classification import encode, fill
from lora_jax.data.sets.glue import Record
from lora_jax.interop import merged_params, save_peft
from lora_jax.models.bert import folder as bert_folder
from lora_jax.models.bert.model import Bert
from lora_jax.models.checkpoints.hub import dtype_of
from lora_jax.models.deberta import folder as deberta_folder
from lora_jax.training.checkpoint import restore_adapter
from lora_jax.training.classification import classification_loss, classifier
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.mesh import make_mesh
from lora_jax.training.step import start, trainable_tree


class FinishedEncoder(NamedTuple):
  """A finished run: `load_encoder(folder).classify([("A text.", None)])`.

  Attributes:
    config: of the run.
    base: that it adapted, with the head as it began.
    trainable: what it trained, as it was at the run's best step.
    params: the base's, with that merged into them.
  """

  config: Config
  base: Base
  trainable: PyTree
  params: PyTree

  def classify(self, texts: Sequence[tuple[str, str | None]]) -> Float[np.ndarray, "N L"]:
    """Returns the head's outputs for texts, or pairs of them; the second is None of single ones."""
    records = [Record(first, second, None) for first, second in texts]
    examples = encode(self.base.tokenizer, records, max(self.config.data.row_lengths))
    batch = fill(examples, len(examples), max(len(example.tokens) for example in examples))
    return np.asarray(jax.jit(classifier(self.base.module))(self.params, batch))

  def save_adapter(
    self, folder: str | Path, base_model: str | None = None, for_server: bool = False
  ) -> None:
    """Writes the adapter and the head in PEFT's form; arguments and errors as of `save_peft`.

    Raises:
      ValueError: if the run was not of LoRA.
    """
    if self.config.method != "lora":
      raise ValueError(f"a run of {self.config.method} has no adapter; export it with --merged")
    module, lora = self.base.module, lora_config(self.config)
    if isinstance(module, Bert):
      stored = bert_folder.stored_tensors(module.config)
    else:
      stored = deberta_folder.stored_tensors(module.config)
    save_peft(
      folder,
      lora,
      self.trainable,
      stored,
      self.base.params,
      base_model=base_model,
      for_server=for_server,
    )

  def save_merged(self, folder: str | Path) -> dict[str, float]:
    """Writes the whole model as a folder for `transformers`, with the names of its labels.

    Returns:
      Of a LoRA run, which is written in the dtype of its base's folder, what rounding cost each
      leaf that was trained; of others nothing: their weights are written as they are.
    """
    module, params = self.base.module, self.params
    source, labels = model_folder(self.config), label_names(self.config)
    errors: dict[str, float] = {}
    if self.config.method == "lora":
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
    FileNotFoundError: if the folder is no run's, or what was trained is not there.
    ValueError: if the run is not finished, or its base is another by now.
  """
  folder, result = Path(folder), read_result(folder)
  config: Config = read_config(folder)
  if result is None:
    raise ValueError(f"{folder} is not finished: start its command again, which goes on with it")
  mesh = make_mesh()
  base = load_base(config, mesh)
  adapted = method(config)(classification_loss(base.module))
  batch = fill([], batch_size=1, row_length=2, label_type=float if num_labels(config) == 1 else int)
  trainable = adapted.init(jax.random.key(config.seed), base.params, batch)
  if config.method == "full_finetuning":
    steps = result["num_train_steps"]
    optimizer, _ = make_optimizer(config, steps, decays)
    state, frozen, _ = start(base.params, trainable, optimizer, jax.random.key(0), mesh)
    found = read_checkpoint(folder, "best", result, state, fingerprint(base.params))
    trainable = trainable_tree(found.state, frozen)
  else:
    check_base(folder, base.params)
    trainable = restore_adapter(folder / "adapter", trainable)
  return FinishedEncoder(config, base, trainable, adapted.merge(base.params, trainable))
