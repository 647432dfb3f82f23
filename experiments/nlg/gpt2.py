"""A GPT-2 under an adaptation method: the base, the method, the decoder."""

import functools
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.recipe import lora_config, params_places
from experiments.harness.workdir import Config
from lora_jax.decoding import CachedModel, from_linen
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.gpt2.folder import load_gpt2, params_shapes
from lora_jax.models.gpt2.folder import read_config as read_gpt2_config
from lora_jax.models.gpt2.model import GPT2, GPT2Config, init_cache
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer

PRETRAINING = "pretraining.json"  # of a base that `experiments.gpt2_pretrain` has made


class Base(NamedTuple):
  """A pretrained model as it was found."""

  module: GPT2
  params: PyTree
  tokenizer: Any
  end_of_text: int

  @property
  def config(self) -> GPT2Config:
    return self.module.config


def load_base(config: Config, mesh: Mesh) -> Base:
  """Loads the model that is adapted, placed on the mesh, and its tokenizer."""
  folder = model_folder(config)
  computation = {
    "param_dtype": config.model.param_dtype,
    "dtype": config.model.dtype,
    "scan_layers": config.model.scan_layers,
    "remat": config.model.remat or None,
    "attention": config.model.attention,
  }
  if config.model.start == "random":
    model = read_gpt2_config(folder, **computation)
    params = random_params(model, mesh, jax.random.key(config.seed))
  else:
    model, params = load_gpt2(folder, shardings=params_places(mesh), **computation)
  tokenizer = load_tokenizer(folder, model.vocab_size)
  return Base(GPT2(model), params, tokenizer, end_of_text_id(tokenizer))


def random_params(model: GPT2Config, mesh: Mesh, key: jax.Array) -> PyTree:
  """Returns new weights, made where they lie on the mesh."""
  init = jax.jit(
    lambda key: GPT2(model).init(key, jnp.zeros((1, 1), jnp.int32))["params"],
    out_shardings=params_places(mesh)(params_shapes(model)),
  )
  return init(key)


def model_folder(config: Config) -> Path:
  """Returns the folder of the base; the embedded one if the config names none."""
  if config.model.folder:
    return find_folder(config.model.folder)
  return Path(str(resources.files("lora_jax") / "assets" / "gpt2"))


def pretraining_tokens(config: Config) -> int | None:
  """Returns the tokens that the base was trained on, 0 for new weights; None if it does not say."""
  if config.model.start == "random":
    return 0
  path = model_folder(config) / PRETRAINING
  return json.loads(path.read_text("utf-8"))["train_tokens"] if path.is_file() else None


def method(config: Config) -> Callable[[Callable[..., Any]], lj.Adaptation]:
  """Returns the method of adaptation that a config names, for any function of the params."""
  if config.method == "lora":
    return functools.partial(lj.lora, config=lora_config(config))
  return lj.full_finetuning


@functools.cache
def cached_model(config: GPT2Config) -> CachedModel:
  """Returns a GPT-2 as decoding sees it."""
  return from_linen(GPT2(config), functools.partial(init_cache, config), config.num_positions)
