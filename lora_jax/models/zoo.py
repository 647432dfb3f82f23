"""Loads a language model of any family, from a folder with config.json or from a GGUF file."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, PyTree

from lora_jax.models.checkpoints import gguf_config
from lora_jax.models.checkpoints.config_fields import read_config_json
from lora_jax.models.checkpoints.gguf import GGUF, open_gguf
from lora_jax.models.checkpoints.hub import StoredTensor, find_folder
from lora_jax.models.checkpoints.loaded_weights import (
  float_dtype,
  weights_format,
  with_shardings,
)
from lora_jax.models.checkpoints.recognize import describe_folder
from lora_jax.models.checkpoints.stored import load_params, outline, plan_params
from lora_jax.models.gpt2 import folder as gpt2_folder
from lora_jax.models.gpt2 import gguf as gpt2_gguf
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.llama import config_json as llama_json
from lora_jax.models.llama import folder as llama_folder
from lora_jax.models.llama import gguf as llama_gguf
from lora_jax.models.llama.model import Llama
from lora_jax.models.parts.causal_lm import Cache, CausalLM, init_cache


class LanguageModel(NamedTuple):
  """A loaded language model; it prints as one line.

  Attributes:
    module: `module.apply({"params": params}, tokens)` returns logits.
    params: its weights; only their shapes if they were not loaded.
    stored: its tensors in `transformers`, and the leaves that they hold.
    folder: its local folder, or its GGUF file.
    model_type: of config.json, or what `transformers` calls the model in the GGUF file.
    init_cache: `init_cache(batch_size, num_slots)` returns an empty cache for decoding.
    num_positions: the longest sequence, tokens.
    save: `save(folder, params, tokenizer_from=None, end_of_text_id=None, max_shard_bytes=...)`
      writes a new folder with other weights of these shapes.
    stored_in_folder: returns the tensors of the folder's files, where each expert of a mixture may
      have its own, or those of the GGUF file. For `save_merged`.
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
  is_unused: Callable[[str, Any], bool]
  save: Callable[..., None]
  type_of: Callable[[Any], str]
  read_gguf: Callable[..., Any]
  gguf_tensors: Callable[[Any, str], list[StoredTensor]]


_GPT2 = Family(
  GPT2,
  gpt2_folder.read_config,
  gpt2_folder.load_gpt2,
  gpt2_folder.params_shapes,
  gpt2_folder.stored_tensors,
  gpt2_folder.stored_in,
  gpt2_folder.is_unused,
  gpt2_folder.save_gpt2,
  lambda config: "gpt2",
  gpt2_gguf.read_config,
  gpt2_gguf.gguf_tensors,
)
_LLAMA = Family(
  Llama,
  llama_json.read_config,
  llama_folder.load_llama,
  llama_folder.params_shapes,
  llama_folder.stored_tensors,
  llama_folder.stored_in,
  llama_folder.is_unused,
  llama_folder.save_llama,
  llama_json.family_of,
  llama_gguf.read_config,
  llama_gguf.gguf_tensors,
)
ENCODERS = ("bert", "roberta", "deberta-v2")
CAUSAL_LMS: dict[str, Family] = {"gpt2": _GPT2, **dict.fromkeys(llama_json.FAMILIES, _LLAMA)}
ARCHITECTURES: dict[str, Family] = {  # of GGUF files
  gpt2_gguf.ARCHITECTURE: _GPT2,
  **dict.fromkeys(llama_gguf.ARCHITECTURES, _LLAMA),
}


def load_causal_lm(
  name: str | Path, *, shardings: Any = None, param_dtype: Any = "float32", **computation: Any
) -> LanguageModel:
  """Loads a language model of any family of the zoo.

  Args:
    name: a folder with config.json and safetensors, a GGUF file, the first part of a split one, a
      hub repository, or a named model such as `smollm2`.
    shardings: as in `load_gpt2`.
    param_dtype: the dtype to convert all weights to; or `stored`, `int8` or `nf4`. `stored` keeps
      weights as they are in the files: floats in their dtype, a GGUF file's blocks as `Quantized`
      leaves. The other two quantize the layers' linear weights, and store the others as the files.
    **computation: fields of the family's config that the folder does not set: `dtype`,
      `scan_layers`, `remat`, `attention`.
  Raises:
    FileNotFoundError: if there is no such folder, file or repository, or files are missing.
    ValueError: if the zoo has no such model, or the folder's files do not fit together.
  """
  path = find_folder(name, weights=False)
  if path.is_file():
    file, family = _open_gguf(path)
    config = family.read_gguf(file, param_dtype=float_dtype(param_dtype), **computation)
    params = load_params(
      file.path,
      family.gguf_tensors(config, file.architecture),
      family.params_shapes(config),
      shardings,
      lambda tensor: _is_unused(tensor, config),
      weights_format(param_dtype),
    )
    return _gguf_model(file, family, config, params)
  model_type, family = _find(path)
  folder = find_folder(name)
  config, params = family.load(folder, shardings=shardings, param_dtype=param_dtype, **computation)
  return _model(folder, model_type, config, params)


def plan_causal_lm(
  name: str | Path, *, shardings: Any = None, param_dtype: Any = "float32", **computation: Any
) -> LanguageModel:
  """Returns the model of `load_causal_lm` with the shapes of its params instead of the params.

  Args:
    shardings: a function from the params' shapes to a tree of their shardings, or None.

  Other arguments and errors as in `load_causal_lm`; the weights are not read, and not downloaded
  unless `param_dtype` is a format, which takes the dtypes from the files.
  """
  weights = weights_format(param_dtype)
  path = find_folder(name, weights=weights is not None)
  if path.is_file():
    file, family = _open_gguf(path)
    config = family.read_gguf(file, param_dtype=float_dtype(param_dtype), **computation)
    shapes, stored = family.params_shapes(config), family.gguf_tensors(config, file.architecture)
    planned = plan_params(
      file.path, stored, shapes, lambda tensor: _is_unused(tensor, config), weights
    )
    return _gguf_model(file, family, config, _planned(planned, shapes, shardings))
  model_type, family = _find(path)
  config = family.read_config(path, param_dtype=float_dtype(param_dtype), **computation)
  shapes = planned = family.params_shapes(config)
  if weights is not None:
    stored = family.stored_in(path, config)
    planned = plan_params(
      path, stored, shapes, lambda tensor: family.is_unused(tensor, config), weights
    )
  return _model(path, model_type, config, _planned(planned, shapes, shardings))


def _planned(planned: PyTree, shapes: PyTree, shardings: Any) -> PyTree:
  return planned if shardings is None else with_shardings(planned, shardings(shapes))


def _is_unused(tensor: str, config: Any) -> bool:
  """Returns whether a tensor of a GGUF file is not read: the config has it, or it is a copy."""
  return tensor == llama_gguf.ROPE_FACTORS or (config.tie_head and tensor == gguf_config.HEAD)


def _open_gguf(path: Path) -> tuple[GGUF, Family]:
  """Opens a GGUF file of a model of the zoo.

  Raises:
    ValueError: if it is of another kind or architecture.
  """
  file = open_gguf(path)
  if file.kind == "adapter":
    raise ValueError(
      f"{path} is an adapter of an architecture {file.architecture}, expected a model. Give the "
      "base model's GGUF file"
    )
  if file.kind != "model":
    raise ValueError(f"{path}: general.type is {file.kind!r}, expected a model")
  if file.architecture not in ARCHITECTURES:
    raise ValueError(
      f"{path}: the zoo has no architecture {file.architecture!r}; it has "
      f"{', '.join(sorted(ARCHITECTURES))}"
    )
  return file, ARCHITECTURES[file.architecture]


def _find(folder: Path) -> tuple[str, Family]:
  """Returns the type and the family of the model in a folder, which may lack the weights."""
  path, fields = read_config_json(folder)
  model_type = fields.get("model_type")
  if isinstance(model_type, str) and model_type in CAUSAL_LMS:
    return model_type, CAUSAL_LMS[model_type]
  names = ", ".join(sorted(CAUSAL_LMS))
  if model_type in ENCODERS:
    raise ValueError(
      f"{path}: {model_type} is an encoder, expected a language model, of type {names}. Encoders "
      "are loaded by load_bert and load_deberta, and fine-tuned by python -m experiments.glue"
    )
  if model_type is None and (kind := describe_folder(folder)):
    raise ValueError(f"{folder} has no language model: {kind}")
  raise ValueError(
    f"{path}: the zoo has no language model of type {model_type!r}; it has {names}. Any other "
    "model in JAX can be adapted as it is: lora_jax.lora(fn, config), where fn(params, *args) is "
    "your own function"
  )


def _gguf_model(file: GGUF, family: Family, config: Any, params: PyTree) -> LanguageModel:
  model = _model(file.path, family.type_of(config), config, params)
  return model._replace(stored_in_folder=lambda: family.gguf_tensors(config, file.architecture))


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
