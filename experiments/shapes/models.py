"""The models of the paper's tables at their real sizes, without weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import PyTree

from experiments.harness.fit import count_trained
from experiments.plan import models
from lora_jax.adaptation import Adaptation
from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.models.deberta.model import Deberta, DebertaConfig
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of

Config = GPT2Config | BertConfig | DebertaConfig
Adapt = Callable[[Callable[..., Any]], Adaptation]

SCAN: dict[str, Any] = {"scan_layers": True}
ROBERTA: dict[str, Any] = {
  **{"kind": "roberta", "vocab_size": 50265, "num_positions": 514, "num_token_types": 1},
  **{"layer_norm_epsilon": 1e-5, "pad_id": 1, "pooler": False},
}
GPT2_MEDIUM = dataclasses.replace(models.GPT2_MEDIUM, **SCAN)
GPT2_LARGE = GPT2Config(embed_dim=1280, num_layers=36, num_heads=20, **SCAN)
GPT3 = dataclasses.replace(models.GPT3, **SCAN)
ROBERTA_BASE = BertConfig(**ROBERTA, **SCAN)
ROBERTA_LARGE = BertConfig(
  embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096, **ROBERTA, **SCAN
)
DEBERTA_XXL = dataclasses.replace(models.DEBERTA_XXL, **SCAN)
MODELS: dict[str, Config] = {
  "GPT-2 M": GPT2_MEDIUM,
  "GPT-2 L": GPT2_LARGE,
  "RoBERTa base": ROBERTA_BASE,
  "RoBERTa large": ROBERTA_LARGE,
  "DeBERTa XXL": DEBERTA_XXL,
  "GPT-3": GPT3,
}


def make_module(config: Config) -> nn.Module:
  """Returns the model of a config."""
  kinds = {GPT2Config: GPT2, BertConfig: Bert, DebertaConfig: Deberta}
  return kinds[type(config)](config)


def trainable_shapes(config: Config, method: Adapt, unrolled: bool = False) -> PyTree:
  """Returns the shapes of a method's trainable tree, as its `init` makes it, without weights.

  Args:
    config: of the model.
    method: adapts a function, here from tokens to the hidden states.
    unrolled: whether the method needs layers that are not scanned.
  """
  module: Any = make_module(dataclasses.replace(config, scan_layers=not unrolled))

  def hidden(params: PyTree, tokens: jax.Array) -> Any:
    return module.apply({"params": params}, tokens, method="hidden")

  tokens = jax.ShapeDtypeStruct((1, 1), "int32")
  init = method(hidden).init
  return jax.eval_shape(init, jax.random.key(0), shapes_of(module), tokens)


def count(config: Config, method: Adapt, unrolled: bool = False) -> int:
  """Returns the number of parameters that a method trains; arguments as `trainable_shapes`."""
  return count_trained(trainable_shapes(config, method, unrolled))


def num_weights(config: Config) -> int:
  """Returns the number of a model's weights."""
  return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(make_module(config))))
