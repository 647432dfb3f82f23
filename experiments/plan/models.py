"""The models that can be planned: by name, or any language model by its folder's config.json."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from lora_jax.models.deberta.model import Deberta, DebertaConfig
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.parts.encoder import Encoder
from lora_jax.models.zoo import plan_causal_lm
from lora_jax.training.classification import classification_loss
from lora_jax.training.loss import LossSum, language_model_loss
from lora_jax.training.mesh import BATCH

GPT3 = GPT2Config(num_positions=2048, embed_dim=12288, num_layers=96, num_heads=96)
GPT2_MEDIUM = GPT2Config(embed_dim=1024, num_layers=24, num_heads=16)
LLAMA3_8B = LlamaConfig(
  vocab_size=128256,
  num_positions=8192,
  embed_dim=4096,
  num_layers=32,
  num_heads=32,
  num_kv_heads=8,
  mlp_dim=14336,
  rope_theta=500000.0,
)
LLAMA3_70B = dataclasses.replace(
  LLAMA3_8B, embed_dim=8192, num_layers=80, num_heads=64, mlp_dim=28672
)
DEBERTA_XXL = DebertaConfig(embed_dim=1536, num_layers=48, num_heads=24, mlp_dim=6144, conv_size=3)
MODELS: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
  "gpt3": (GPT2, GPT3),
  "gpt2_medium": (GPT2, GPT2_MEDIUM),
  "llama3_8b": (Llama, LLAMA3_8B),
  "llama3_70b": (Llama, LLAMA3_70B),
  "deberta_xxl": (Deberta, dataclasses.replace(DEBERTA_XXL, num_labels=3)),  # for MNLI
}
TOKEN_INPUTS = {"tokens": "int32", "positions": "int32", "segment_ids": "int32"}
TARGETS = {"target_index": "int32", "targets": "int32", "target_weights": "float32"}
PAIR_INPUTS = {"tokens": "int32", "segment_ids": "int32", "token_types": "int32"}
LABELS = {"labels": "int32", "weights": "float32"}


class Planned(NamedTuple):
  """A model that is to be trained.

  Attributes:
    shapes: its params' shapes, in a given dtype.
    loss: its loss, of params and a batch.
    head: patterns of the leaves that LoRA trains fully; empty for language models.
    num_positions: the longest row, tokens.
    rows: the arrays of a batch with an entry for each token.
    labels: those with an entry for each row.
  """

  shapes: Callable[[str], PyTree]
  loss: Callable[..., LossSum]
  head: tuple[str, ...]
  num_positions: int
  rows: dict[str, str]
  labels: dict[str, str]

  def batch(self, batch_size: int, row_length: int, mesh: Mesh) -> dict[str, Any]:
    """Returns the shapes of a batch, split by row over the mesh.

    Raises:
      ValueError: if a row is longer than the model's positions.
    """
    if row_length > self.num_positions:
      raise ValueError(
        f"data.row_length={row_length} must be at most the model's {self.num_positions} positions"
      )
    by_row = NamedSharding(mesh, P(BATCH))
    return {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)
      for shape, arrays in (((batch_size, row_length), self.rows), ((batch_size,), self.labels))
      for name, dtype in arrays.items()
    }


def find_model(name: str, loss_chunk: int | None, **computation: Any) -> Planned:
  """Returns a model by its name in `MODELS`, or by a folder with config.json.

  Args:
    name: its name, or its folder.
    loss_chunk: as in `language_model_loss`.
    **computation: fields of its config: `dtype`, `scan_layers`, `remat`.
  Raises:
    FileNotFoundError, ValueError: if there is no such model.
  """

  def module(param_dtype: str) -> nn.Module:
    if name not in MODELS:
      return _module_of_folder(name, param_dtype=param_dtype, **computation)
    make, config = MODELS[name]
    return make(dataclasses.replace(config, param_dtype=param_dtype, **computation))

  def shapes(param_dtype: str) -> PyTree:
    return shapes_of(module(param_dtype))

  if loss_chunk and not has_logits_of_tokens(name):
    raise ValueError(
      f"data.loss_chunk={loss_chunk} has no effect on {name}, whose logits are of rows, not of "
      "tokens. Leave it out"
    )
  return make_plan(module("float32"), shapes, loss_chunk)


def make_plan(
  model: Any, shapes: Callable[[str], PyTree], loss_chunk: int | None = None
) -> Planned:
  """Returns a model with its loss and the arrays of its batches.

  Args:
    model: a language model, or an encoder with a head.
    shapes: as in `Planned`.
    loss_chunk: as in `language_model_loss`.
  """
  limit = model.config.num_positions
  if isinstance(model, Encoder):
    return Planned(shapes, classification_loss(model), ("head/.*",), limit, PAIR_INPUTS, LABELS)
  loss = language_model_loss(model, chunk_size=loss_chunk)
  return Planned(shapes, loss, (), limit, TOKEN_INPUTS | TARGETS, {})


def has_logits_of_tokens(name: str) -> bool:
  """Tells whether a model has logits for each token of a row, not for the row."""
  return name not in MODELS or MODELS[name][0] is not Deberta


def _module_of_folder(name: str, **computation: Any) -> nn.Module:
  try:
    return plan_causal_lm(name, **computation).module
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{error}. Shapes without a folder: {', '.join(MODELS)}") from error
