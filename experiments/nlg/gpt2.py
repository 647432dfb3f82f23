"""Loads the GPT-2 that is adapted: its weights, tokenizer and decoder."""

import dataclasses
import functools
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.harness.sharding import sharding_of
from experiments.nlg.config import E2EConfig, PretrainConfig
from lora_jax.decoding import CachedModel, from_linen
from lora_jax.files import read_json
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.checkpoints.stored import outline
from lora_jax.models.gpt2.folder import load_gpt2, params_shapes
from lora_jax.models.gpt2.folder import read_config as read_gpt2_config
from lora_jax.models.gpt2.model import GPT2, GPT2Config, init_cache
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer

PRETRAINING = "pretraining.json"  # written by `experiments.gpt2_pretrain`


class Base(NamedTuple):
  """A pretrained model with its tokenizer."""

  module: GPT2
  params: PyTree
  tokenizer: Any
  end_of_text: int

  def __repr__(self) -> str:
    return f"Base({type(self.module).__name__}, {outline(self.params)})"

  @property
  def config(self) -> GPT2Config:
    return self.module.config


def load_base(config: E2EConfig, mesh: Mesh) -> Base:
  """Loads the model that is adapted, placed on the mesh, and its tokenizer.

  Raises:
    ValueError: before any weights are read, if the config does not fit the model.
  """
  folder = model_folder(config)
  computation: dict[str, Any] = {
    "param_dtype": config.model.param_dtype,
    "dtype": config.model.dtype,
    "scan_layers": config.model.scan_layers,
    "remat": config.model.remat or None,
    "attention": config.model.attention,
  }
  model = read_gpt2_config(folder, **computation)
  config.check_positions(model.num_positions)
  if config.model.start == "random":
    params = random_params(model, mesh, jax.random.key(config.seed))
  else:
    model, params = load_gpt2(folder, shardings=sharding_of(mesh), **computation)
  tokenizer = load_tokenizer(folder, model.vocab_size)
  return Base(GPT2(model), params, tokenizer, end_of_text_id(tokenizer))


def pretrained_config(config: PretrainConfig) -> GPT2Config:
  """Returns the model's shape; dtype `auto` is bfloat16, or float32 on CPUs."""
  shape = dataclasses.asdict(config.model)
  if shape["dtype"] == "auto":
    shape["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return GPT2Config(vocab_size=config.data.vocab_size, **shape)


def random_params(model: GPT2Config, mesh: Mesh, key: jax.Array) -> PyTree:
  """Returns random weights; each device initializes its part of them."""
  init = jax.jit(
    lambda key: GPT2(model).init(key, jnp.zeros((1, 1), jnp.int32))["params"],
    out_shardings=sharding_of(mesh)(params_shapes(model)),
  )
  return init(key)


def model_folder(config: E2EConfig) -> Path:
  """Returns the base model's folder; the embedded one if the config names none."""
  if config.model.folder:
    return find_folder(config.model.folder)
  return Path(str(resources.files("lora_jax") / "assets" / "gpt2"))


def pretraining_tokens(config: E2EConfig) -> int | None:
  """Returns the number of tokens of the base model's pretraining; None if it is unknown."""
  if config.model.start == "random":
    return 0
  path = model_folder(config) / PRETRAINING
  return read_json(path)["train_tokens"] if path.is_file() else None


@functools.cache
def cached_model(config: GPT2Config) -> CachedModel:
  """Returns a GPT-2 for decoding."""
  return from_linen(GPT2(config), functools.partial(init_cache, config), config.num_positions)
