"""Loads and saves DeBERTa-v2 and v3 as Hugging Face folders, with and without heads."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from jaxtyping import PyTree

from lora_jax.fields import Within, read_value
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
from lora_jax.models.deberta.model import Deberta, DebertaConfig
from lora_jax.models.parts.causal_lm import shapes_of

PREFIX = "deberta."
DEFAULTS = {  # of `transformers`, where a config leaves them out
  "max_position_embeddings": 512,
  "type_vocab_size": 0,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-7,
  "hidden_dropout_prob": 0.1,
  "attention_probs_dropout_prob": 0.1,
  "pooler_dropout": 0.0,
  "pooler_hidden_act": "gelu",
  "position_biased_input": True,
  "share_att_key": False,
  "norm_rel_ebd": "none",
  "max_relative_positions": -1,
  "position_buckets": -1,
  "conv_kernel_size": 0,
  "conv_act": "tanh",
  "pad_token_id": 0,
}
KEYS = FIELDS | {
  "input_positions": "position_biased_input",
  "share_kernels": "share_att_key",
  "conv_activation": "conv_act",
  "head_activation": "pooler_hidden_act",
  "pooler_dropout": "pooler_dropout",
}
_NONE_IF_0 = Annotated[int, Within("[0, 1000]")]
_NONE_IF_MINUS_1 = Annotated[int, Within("[-1, 10000000]")]
OUTSIDE = {  # our modules: Hugging Face's
  "token_embedding": "embeddings.word_embeddings",
  "position_embedding": "embeddings.position_embeddings",
  "token_type_embedding": "embeddings.token_type_embeddings",
  "embed_norm": "embeddings.LayerNorm",
  "relative_embedding": "encoder.rel_embeddings",
  "relative_norm": "encoder.LayerNorm",
  "conv": "encoder.conv.conv",
  "conv_norm": "encoder.conv.LayerNorm",
}
HEAD = {"head/dense": "pooler.dense", "head/out": "classifier"}
LAYER = {
  "attn/query": "attention.self.query_proj",
  "attn/key": "attention.self.key_proj",
  "attn/value": "attention.self.value_proj",
  "attn/position_key": "attention.self.pos_key_proj",
  "attn/position_query": "attention.self.pos_query_proj",
  "attn/out": "attention.output.dense",
  "attn_norm": "attention.output.LayerNorm",
  "mlp/up": "intermediate.dense",
  "mlp/down": "output.dense",
  "mlp_norm": "output.LayerNorm",
}
OTHER_HEADS = re.compile(  # and constants of old files
  r"(cls|lm_head|lm_predictions|mask_predictions)\..*|(.*\.)?position_ids"
)


def load_deberta(
  name: str | Path,
  *,
  num_labels: int | None = None,
  key: jax.Array | None = None,
  param_dtype: Any = "float32",
  shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
  **computation: Any,
) -> tuple[DebertaConfig, PyTree]:
  """Loads a DeBERTa-v2 or v3 from a local folder or the hub.

  Heads of language models in the folder are left out.

  Args:
    name: a folder with config.json and safetensors, or a hub repository.
    num_labels: of the head; None takes the folder's head, or no head if it has none.
    key: initializes a new head of `num_labels` instead of the folder's. None makes nothing.
    param_dtype: as in `load_bert`.
    shardings: as in `load_bert`.
    **computation: as in `load_bert`, and `pooler_dropout`.

  Returns:
    The model's config and params, `Deberta(config).apply({"params": params}, tokens, mask)`.
  Raises:
    FileNotFoundError: if config.json or weights are missing.
    ValueError: if the folder is not of a supported model of this type, its tensors are missing,
      unexpected, misshapen or truncated, or it lacks the requested head.
  """
  folder = find_folder(name)
  computation |= {"num_labels": num_labels, "new_head": key is not None}
  config = read_config(folder, param_dtype=param_dtype, **computation)

  def ignored(tensor: str) -> bool:
    short = tensor.removeprefix(PREFIX)
    replaced = key is not None and short.startswith(("classifier.", "pooler."))
    unused = not config.input_positions and short == "embeddings.position_embeddings.weight"
    return replaced or unused or bool(OTHER_HEADS.fullmatch(tensor))

  model, stored = Deberta(config), stored_tensors(config)
  new_parts = ["head"] if key is not None else []
  return load_encoder(
    folder, model, stored, PREFIX, shardings, ignored, new_parts=new_parts, key=key
  )


def params_shapes(config: DebertaConfig) -> PyTree:
  """Returns the params' tree of `ShapeDtypeStruct`s."""
  return shapes_of(Deberta(config))


def stored_tensors(config: DebertaConfig) -> list[StoredTensor]:
  """Returns the tensors of a model in `transformers`, and the leaves that they hold.

  Names are those of the class for sequence classification, or without a head of the bare model.
  """
  return stored_by_module(Deberta(config), PREFIX, OUTSIDE, HEAD, LAYER)


def read_config(
  folder: str | Path,
  num_labels: int | None = None,
  new_head: bool = False,
  **computation: Any,
) -> DebertaConfig:
  """Returns the config of the model in a local folder, with its head.

  Arguments and errors as in `bert.folder.read_config`.
  """
  path, fields = read_model_json(folder, ["deberta-v2"])
  fields = DEFAULTS | {key: value for key, value in fields.items() if value is not None}
  names = tensor_names(path.parent, PREFIX)
  head_dropout = "cls_dropout" if "cls_dropout" in fields else "hidden_dropout_prob"
  try:
    read = {
      **read_fields(DebertaConfig, fields, KEYS | {"head_dropout": head_dropout}),
      **_distances(fields),
      "conv_size": read_value(_NONE_IF_0, fields["conv_kernel_size"], "conv_kernel_size") or None,
      "num_labels": head_size(fields, names, num_labels, new_head),
    }
    config = DebertaConfig(**read | computation)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  width = config.embed_dim
  supported = {
    "relative_attention": True,
    "embedding_size": width,
    "pooler_hidden_size": width,
    "attention_head_size": width // config.num_heads,
    "conv_groups": 1,
  }
  check_supported(path, {"relative_attention": False} | fields, supported)
  check_depth(path.parent, config, names)
  return config


def _distances(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the use of distances in attention, as fields of `DebertaConfig`."""
  limit, buckets = (
    read_value(_NONE_IF_MINUS_1, fields[key], key)
    for key in ("max_relative_positions", "position_buckets")
  )
  terms = fields.get("pos_att_type") or []
  terms = [term.strip() for term in terms.lower().split("|")] if isinstance(terms, str) else terms
  terms = read_value(tuple[Literal["c2p", "p2c"], ...], terms, "pos_att_type")
  norm = read_value(str, fields["norm_rel_ebd"], "norm_rel_ebd")
  return {
    "max_distance": fields["max_position_embeddings"] if limit < 1 else limit,
    "num_buckets": buckets if buckets > 0 else None,
    "content_to_position": "c2p" in terms,
    "position_to_content": "p2c" in terms,
    "norm_distances": "layer_norm" in norm.lower(),
  }


def save_deberta(
  folder: str | Path,
  config: DebertaConfig,
  params: PyTree,
  tokenizer_from: str | Path | None = None,
  max_shard_bytes: int = 5_000_000_000,
  labels: Sequence[str] | None = None,
) -> None:
  """Writes a model as a new folder that `transformers` and `load_deberta` read.

  Arguments and errors as in `save_bert`.
  """
  terms = {"p2c": config.position_to_content, "c2p": config.content_to_position}
  fields = {
    "model_type": "deberta-v2",
    "architectures": ["DebertaV2"],
    "relative_attention": True,
    "position_biased_input": config.input_positions,
    "max_relative_positions": config.max_distance,
    "position_buckets": config.num_buckets or -1,
    "pos_att_type": [term for term, is_there in terms.items() if is_there],
    "share_att_key": config.share_kernels,
    "norm_rel_ebd": "layer_norm" if config.norm_distances else "none",
    "conv_kernel_size": config.conv_size or 0,
    "conv_act": config.conv_activation,
    "pooler_hidden_size": config.embed_dim,
    "pooler_hidden_act": config.head_activation,
    "pooler_dropout": config.pooler_dropout,
    "cls_dropout": config.head_dropout,
  }
  model, stored = Deberta(config), stored_tensors(config)
  save_encoder(folder, model, params, stored, fields, tokenizer_from, max_shard_bytes, labels)
