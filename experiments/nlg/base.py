"""Loads the base model: its weights, tokenizer, prompt format and decoder."""

from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.harness.config import replace_fields
from experiments.harness.methods import adapt, find_method, slots_of
from experiments.nlg.config import E2EConfig, E2EModel, FinetuneConfig, Prompt
from experiments.nlg.pretraining import PRETRAINING
from experiments.nlg.rounding import rounded
from experiments.nlg.user_data import Text, load_text
from lora_jax.decoding import CachedModel, adapted, from_linen
from lora_jax.files import read_json
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.checkpoints.loaded_weights import QUANTIZED
from lora_jax.models.checkpoints.stored import outline
from lora_jax.models.parts.causal_lm import CausalLM
from lora_jax.models.sharding import sharding_of
from lora_jax.models.zoo import LanguageModel, load_causal_lm, plan_causal_lm


class Base(NamedTuple):
  """A pretrained language model with its tokenizer.

  Attributes:
    model: the model and its weights.
    text: the tokenizer, the end tokens, and for the format `chat` the chat template.
    prompt: the format of the examples.
    decoder: the functions for decoding, created once so that each is compiled once; the adapted
      model of a method that cannot be merged.
  """

  model: LanguageModel
  text: Text
  prompt: Prompt
  decoder: CachedModel

  def __repr__(self) -> str:
    return f"Base({type(self.module).__name__}, {outline(self.params)})"

  @property
  def module(self) -> CausalLM:
    return self.model.module

  @property
  def params(self) -> PyTree:
    return self.model.params

  @property
  def config(self) -> Any:
    return self.model.module.config

  @property
  def tokenizer(self) -> Any:
    return self.text.tokenizer

  @property
  def end_of_text(self) -> int:
    return self.text.end_id


def load_base(config: E2EConfig, mesh: Mesh) -> Base:
  """Loads the base model, sharded over the mesh, and its tokenizer.

  Raises:
    ValueError: before any weights are read, if the config does not fit the model.
  """
  folder = model_folder(config)
  options: dict[str, Any] = {
    "shardings": sharding_of(mesh),
    "param_dtype": config.model.param_dtype,
    "dtype": config.model.dtype,
    "scan_layers": config.model.scan_layers,
    "remat": config.model.remat or None,
    "attention": config.model.attention,
  }
  model = plan_causal_lm(folder, **options)
  config.check_positions(model.num_slots, slots_of(config).count)
  text = load_text(model, chats=config.data.prompt == "chat")
  if config.model.start == "random":
    model = model._replace(params=random_params(model.module, mesh, jax.random.key(config.seed)))
  else:
    model = load_causal_lm(folder, **options)
  model = model._replace(params=rounded(model.params, config.model.rounded_to))
  decoder = from_linen(model.module, model.init_cache, model.num_slots)
  if not find_method(config.method).merges:
    decoder = adapted(decoder, adapt(config))
  return Base(model, text, config.data.prompt, decoder)


def float_params(config: E2EConfig, mesh: Mesh) -> PyTree:
  """Returns the base params as they are before any quantization or rounding, float32."""
  changes = {"model.param_dtype": "float32", "model.rounded_to": ""}
  return load_base(replace_fields(config, changes), mesh).params


def random_params(module: nn.Module, mesh: Mesh, key: jax.Array) -> PyTree:
  """Returns a language model's random weights; each device initializes its part of them."""

  def init(key: jax.Array) -> PyTree:
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

  return jax.jit(init, out_shardings=sharding_of(mesh)(jax.eval_shape(init, key)))(key)


def model_folder(config: E2EConfig | FinetuneConfig) -> Path:
  """Returns the base model's folder or file; by default that of the embedded model."""
  if config.model.folder:
    return find_folder(config.model.folder)
  return Path(str(resources.files("lora_jax") / "assets" / "gpt2"))


def other_weights(config: E2EConfig | FinetuneConfig) -> str:
  """Returns the kind of weights that a run adapts instead of its base model's own.

  Such as `nf4`, which are quantized after they are read, or `random`; "" are the files' weights.
  """
  model = config.model
  if isinstance(model, E2EModel) and model.start == "random":
    return "random"
  if isinstance(model, E2EModel) and model.rounded_to:
    return model.rounded_to
  return model.param_dtype if model.param_dtype in QUANTIZED else ""


def pretraining_tokens(config: E2EConfig) -> int | None:
  """Returns the number of tokens of the base model's pretraining; None if it is unknown."""
  if config.model.start == "random":
    return 0
  path = model_folder(config) / PRETRAINING
  return read_json(path)["train_tokens"] if path.is_file() else None
