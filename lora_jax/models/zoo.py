"""Loads a language model of any family by the `model_type` of its config.json."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, PyTree

from lora_jax.models.checkpoints.config_fields import read_config_json
from lora_jax.models.checkpoints.hub import StoredTensor, find_folder
from lora_jax.models.checkpoints.recognize import describe_folder
from lora_jax.models.checkpoints.stored import outline
from lora_jax.models.gpt2 import folder as gpt2_folder
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.llama import config_json as llama_json
from lora_jax.models.llama import folder as llama_folder
from lora_jax.models.llama.model import Llama
from lora_jax.models.parts.causal_lm import Cache, CausalLM, init_cache


class LanguageModel(NamedTuple):
  """A loaded language model; it prints as one line.

  Attributes:
    module: `module.apply({"params": params}, tokens)` returns logits.
    params: its weights; only their shapes if they were not loaded.
    stored: its tensors in `transformers`, and the leaves that they hold.
    folder: its local folder.
    model_type: of config.json.
    init_cache: `init_cache(batch_size, num_slots)` returns an empty cache for decoding.
    num_positions: the longest sequence, tokens.
    save: `save(folder, params, tokenizer_from=None, end_of_text_id=None, max_shard_bytes=...)`
      writes a new folder with other weights of these shapes.
    stored_in_folder: returns the tensors of the folder's files, where each expert of a mixture may
      have its own. For `save_merged`.
  """

  module: CausalLM
  params: PyTree
  stored: list[StoredTensor]
  folder: Path
  model_type: str
  init_cache: Callable[[int, int], Cache]
  num_positions: int
  save: Callable[..., None]
  stored_in_folder: Callable[[], list[StoredTensor]]

  def __repr__(self) -> str:
    return f"LanguageModel({self.model_type}, {outline(self.params)}, {self.folder})"

  @property
  def num_slots(self) -> int:
    """The longest sequence to decode: `num_positions`, or the sliding window if it is shorter."""
    window = self.module.config.sliding_window
    return self.num_positions if window is None else min(window, self.num_positions)

  def call(self, params: PyTree, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Returns the logits of each next token: the function of the params that methods adapt."""
    return self.module.apply({"params": params}, tokens)  # pyright: ignore[reportReturnType]


class Family(NamedTuple):
  """The functions that read, compute and write models of some types."""

  module: Callable[[Any], CausalLM]
  read_config: Callable[..., Any]
  load: Callable[..., tuple[Any, PyTree]]
  params_shapes: Callable[[Any], PyTree]
  stored_tensors: Callable[[Any], list[StoredTensor]]
  stored_in: Callable[[Path, Any], list[StoredTensor]]
  save: Callable[..., None]


_GPT2 = Family(
  GPT2,
  gpt2_folder.read_config,
  gpt2_folder.load_gpt2,
  gpt2_folder.params_shapes,
  gpt2_folder.stored_tensors,
  lambda folder, config: gpt2_folder.stored_tensors(config),
  gpt2_folder.save_gpt2,
)
_LLAMA = Family(
  Llama,
  llama_json.read_config,
  llama_folder.load_llama,
  llama_folder.params_shapes,
  llama_folder.stored_tensors,
  llama_folder.stored_in,
  llama_folder.save_llama,
)
ENCODERS = ("bert", "roberta", "deberta-v2")
CAUSAL_LMS: dict[str, Family] = {"gpt2": _GPT2, **dict.fromkeys(llama_json.FAMILIES, _LLAMA)}


def load_causal_lm(
  name: str | Path, *, shardings: Any = None, param_dtype: Any = "float32", **computation: Any
) -> LanguageModel:
  """Loads a language model of any family of the zoo.

  Args:
    name: a folder with config.json and safetensors, or a hub repository.
    shardings: as in `load_gpt2`.
    param_dtype: to convert the weights to.
    **computation: fields of the family's config that the folder does not set: `dtype`,
      `scan_layers`, `remat`, `attention`.
  Raises:
    FileNotFoundError: if there is no such folder or repository, or files are missing.
    ValueError: if the zoo has no such model, or the folder's files do not fit together.
  """
  _, model_type, family = _find(name)
  folder = find_folder(name)
  config, params = family.load(folder, shardings=shardings, param_dtype=param_dtype, **computation)
  return _model(folder, model_type, config, params)


def plan_causal_lm(
  name: str | Path, *, shardings: Any = None, param_dtype: Any = "float32", **computation: Any
) -> LanguageModel:
  """Returns the model of `load_causal_lm` with the shapes of its params instead of the params.

  Args:
    shardings: a function from the params' shapes to a tree of their shardings, or None.

  Other arguments and errors as in `load_causal_lm`; the weights are not read.
  """
  folder, model_type, family = _find(name)
  config = family.read_config(folder, param_dtype=param_dtype, **computation)
  shapes = family.params_shapes(config)
  if shardings is not None:
    shapes = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      shapes,
      shardings(shapes),
    )
  return _model(folder, model_type, config, shapes)


def _find(name: str | Path) -> tuple[Path, str, Family]:
  """Returns a model's folder, which may lack the weights, and its type and family."""
  folder = find_folder(name, weights=False)
  path, fields = read_config_json(folder)
  model_type = fields.get("model_type")
  if isinstance(model_type, str) and model_type in CAUSAL_LMS:
    return folder, model_type, CAUSAL_LMS[model_type]
  names = ", ".join(sorted(CAUSAL_LMS))
  if model_type in ENCODERS:
    raise ValueError(
      f"{path}: {model_type} is an encoder, expected a language model, of type {names}. Encoders "
      "are loaded by load_bert and load_deberta, and fine-tuned by python -m experiments.glue"
    )
  kind = describe_folder(folder) if model_type is None else ""
  raise ValueError(
    f"{path}: the zoo has no language model of type {model_type!r}; it has {names}. "
    f"{kind and f'Of the folder: {kind}. '}Any other model in JAX can be adapted as it is: "
    "lora_jax.lora(fn, config), where fn(params, *args) is your own function"
  )


def _model(folder: Path, model_type: str, config: Any, params: PyTree) -> LanguageModel:
  family = CAUSAL_LMS[model_type]

  def save(folder: str | Path, params: PyTree, **options: Any) -> None:
    family.save(folder, config, params, **options)

  return LanguageModel(
    module=family.module(config),
    params=params,
    stored=family.stored_tensors(config),
    folder=folder,
    model_type=model_type,
    init_cache=functools.partial(init_cache, config),
    num_positions=config.num_positions,
    save=save,
    stored_in_folder=lambda: family.stored_in(folder, config),
  )
