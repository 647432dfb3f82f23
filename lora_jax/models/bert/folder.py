"""Loads and saves BERT and RoBERTa as Hugging Face folders, with and without heads."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.models.checkpoints.config_fields import (
  check_supported,
  read_fields,
  read_model_json,
)
from lora_jax.models.checkpoints.encoder_folder import (
  FIELDS,
  check_depth,
  head_size,
  load_encoder,
  save_encoder,
  stored_by_module,
  tensor_names,
)
from lora_jax.models.checkpoints.hub import StoredTensor, find_folder
from lora_jax.models.parts.causal_lm import shapes_of

CLASSES = {"bert": "Bert", "roberta": "Roberta"}
DEFAULTS = {  # of `transformers`, where a config leaves them out
  "type_vocab_size": 2,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "hidden_dropout_prob": 0.1,
  "attention_probs_dropout_prob": 0.1,
}
PAD_ID = {"bert": 0, "roberta": 1}
SUPPORTED = {
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "add_cross_attention": False,
}
OUTSIDE = {  # our modules: Hugging Face's
  "token_embedding": "embeddings.word_embeddings",
  "position_embedding": "embeddings.position_embeddings",
  "token_type_embedding": "embeddings.token_type_embeddings",
  "embed_norm": "embeddings.LayerNorm",
  "pooler": "pooler.dense",
}
HEAD = {
  "bert": {"head/out": "classifier"},
  "roberta": {"head/dense": "classifier.dense", "head/out": "classifier.out_proj"},
}
LAYER = {
  "attn/query": "attention.self.query",
  "attn/key": "attention.self.key",
  "attn/value": "attention.self.value",
  "attn/out": "attention.output.dense",
  "attn_norm": "attention.output.LayerNorm",
  "mlp/up": "intermediate.dense",
  "mlp/down": "output.dense",
  "mlp_norm": "output.LayerNorm",
}
OTHER_HEADS = re.compile(r"(cls|lm_head)\..*|(.*\.)?position_ids")  # and constants of old files


def load_bert(
  name: str | Path,
  *,
  num_labels: int | None = None,
  key: jax.Array | None = None,
  param_dtype: Any = "float32",
  shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
  **computation: Any,
) -> tuple[BertConfig, PyTree]:
  """Loads a BERT or RoBERTa from a local folder or the hub.

  Heads of language models in the folder are left out.

  Args:
    name: a folder with config.json and safetensors, or a hub repository.
    num_labels: of the head; None takes the folder's head, or no head if it has none.
    key: initializes a new head of `num_labels` instead of the folder's, and the pooler that a
      BERT's head needs if the folder has none. None makes nothing.
    param_dtype: to convert the weights to.
    shardings: of the params, each device reading its own part: a tree like theirs or a prefix of
      it, or a function from `params_shapes` to such a tree. None is the default device.
    **computation: fields of `BertConfig` that the folder does not set: `dtype`, `scan_layers`,
      `remat`; or that replace the folder's: `hidden_dropout`, `attention_dropout`,
      `head_dropout`.

  Returns:
    The model's config and params, `Bert(config).apply({"params": params}, tokens)`.
  Raises:
    FileNotFoundError: if config.json or weights are missing.
    ValueError: if the folder is not of a supported model of this type, its tensors are missing,
      unexpected, misshapen or truncated, or it lacks the requested head.
  """
  folder = find_folder(name)
  computation |= {"num_labels": num_labels, "new_head": key is not None}
  config = read_config(folder, param_dtype=param_dtype, **computation)
  prefix = f"{config.kind}."
  names = tensor_names(folder, prefix)
  new_parts = ["head"] if key is not None else []
  if key is not None and config.pooler and "pooler.dense.weight" not in names:
    new_parts.append("pooler")

  def ignored(tensor: str) -> bool:
    short = tensor.removeprefix(prefix)
    replaced = key is not None and short.startswith("classifier.")
    unused = not config.pooler and short.startswith("pooler.")
    return replaced or unused or bool(OTHER_HEADS.fullmatch(tensor))

  model, stored = Bert(config), stored_tensors(config)
  return load_encoder(
    folder, model, stored, prefix, shardings, ignored, new_parts=new_parts, key=key
  )


def params_shapes(config: BertConfig) -> PyTree:
  """Returns the params' tree of `ShapeDtypeStruct`s."""
  return shapes_of(Bert(config))


def stored_tensors(config: BertConfig) -> list[StoredTensor]:
  """Returns the tensors of a model in `transformers`, and the leaves that they hold.

  Names are those of the class for sequence classification, or without a head of the bare model.
  """
  return stored_by_module(Bert(config), f"{config.kind}.", OUTSIDE, HEAD[config.kind], LAYER)


def read_config(
  folder: str | Path,
  num_labels: int | None = None,
  new_head: bool = False,
  **computation: Any,
) -> BertConfig:
  """Returns the config of the model in a local folder, with its head.

  Args:
    folder: with config.json and safetensors, from whose names the parts are known.
    num_labels: of the head, as in `load_bert`.
    new_head: whether to make a new head.
    **computation: as in `load_bert`.
  Raises:
    FileNotFoundError: if config.json or weights are missing.
    ValueError: if it is not such a model, or needs an option that is not supported.
  """
  path, fields = read_model_json(folder, CLASSES)
  kind = fields["model_type"]
  defaults = DEFAULTS | {"pad_token_id": PAD_ID[kind]}
  fields = defaults | {key: value for key, value in fields.items() if value is not None}
  check_supported(path, fields, SUPPORTED)
  names = tensor_names(path.parent, f"{kind}.")
  head_dropout = "classifier_dropout" if "classifier_dropout" in fields else "hidden_dropout_prob"
  try:
    num_labels = head_size(fields, names, num_labels, new_head)
    has_pooler = "pooler.dense.weight" in names
    read = {
      **read_fields(BertConfig, fields, FIELDS | {"head_dropout": head_dropout}),
      "kind": kind,
      "pooler": has_pooler if num_labels is None else kind == "bert",
      "num_labels": num_labels,
    }
    config = BertConfig(**read | computation)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  check_depth(path.parent, config, names)
  return config


def save_bert(
  folder: str | Path,
  config: BertConfig,
  params: PyTree,
  tokenizer_from: str | Path | None = None,
  max_shard_bytes: int = 5_000_000_000,
  labels: Sequence[str] | None = None,
) -> None:
  """Writes a model as a new folder that `transformers` and `load_bert` read.

  Args:
    folder: the new folder.
    config: of the model.
    params: of the model, unrolled or scanned, in the dtype to save; merged, if it was adapted.
    tokenizer_from: a folder to copy the tokenizer's files from.
    max_shard_bytes: the largest size of one file.
    labels: the names of the head's outputs; None is LABEL_0, LABEL_1, ...
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the params are not those of the config.
  """
  fields = {
    "model_type": config.kind,
    "architectures": [CLASSES[config.kind]],
    "classifier_dropout": config.head_dropout,
  }
  model, stored = Bert(config), stored_tensors(config)
  save_encoder(folder, model, params, stored, fields, tokenizer_from, max_shard_bytes, labels)
