"""Folders of encoders: names of tensors, heads and new heads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.fields import read_value
from lora_jax.models.checkpoints.hub import StoredTensor, make_leaf, open_tensors, save_folder
from lora_jax.models.checkpoints.recognize import check_layer_count
from lora_jax.models.checkpoints.stored import Loaded, broadcast, load_params, tensors_of
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.parts.encoder import Encoder

TENSOR = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
FIELDS = {  # of any encoder's config: Hugging Face's
  "vocab_size": "vocab_size",
  "num_positions": "max_position_embeddings",
  "num_token_types": "type_vocab_size",
  "embed_dim": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "mlp_dim": "intermediate_size",
  "pad_id": "pad_token_id",
  "activation": "hidden_act",
  "layer_norm_epsilon": "layer_norm_eps",
  "hidden_dropout": "hidden_dropout_prob",
  "attention_dropout": "attention_probs_dropout_prob",
}


def stored_by_module(
  model: Encoder,
  prefix: str,
  outside: Mapping[str, str],
  head: Mapping[str, str],
  layer: Mapping[str, str],
) -> list[StoredTensor]:
  """Returns the tensors of a model, given Hugging Face's names of its modules.

  Args:
    model: with its config.
    prefix: of all names except the head's, if there is a head.
    outside: names of the modules outside the layers, by our paths.
    head: names of the head's modules.
    layer: names of the modules in a layer.
  """
  prefix = "" if model.config.num_labels is None else prefix
  outside = {**{path: prefix + name for path, name in outside.items()}, **head}
  stored = []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(model)):
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    module, kind = path.rsplit("/", 1)
    traits = {"transposed": kind == "kernel", "is_embedding": kind == "embedding"}
    if module in outside:
      stored.append(StoredTensor(f"{outside[module]}.{TENSOR[kind]}", (path,), **traits))
      continue
    stack, inside = module.split("/", 1)
    name = f"{layer[inside]}.{TENSOR[kind]}"
    stacked = stack == "layers"
    for i in range(leaf.shape[0]) if stacked else [int(stack.removeprefix("layers_"))]:
      tensor = f"{prefix}encoder.layer.{i}.{name}"
      stored.append(StoredTensor(tensor, (path,), i if stacked else None, **traits))
  return stored


def head_size(
  fields: Mapping[str, Any], names: Iterable[str], num_labels: int | None, is_new: bool
) -> int | None:
  """Returns the number of labels of a model's head; None for no head.

  Args:
    fields: the contents of config.json.
    names: of the folder's tensors.
    num_labels: the requested labels; None takes the folder's head, or none.
    is_new: whether to make a new head.
  Raises:
    ValueError: if the folder has no such head, and no new one is requested.
  """
  if is_new:
    if num_labels is None:
      raise ValueError("a key makes a new head; expected num_labels with it")
    return num_labels
  size = None
  kinds = read_value(tuple[str, ...] | None, fields.get("architectures"), "architectures")
  kinds = kinds or ["ForSequenceClassification"]
  is_classifier = any(kind.endswith("ForSequenceClassification") for kind in kinds)
  if is_classifier and any(name.startswith("classifier.") for name in names):
    labels = fields.get("id2label")
    size = len(labels) if isinstance(labels, dict) else fields.get("num_labels", 2)
  if num_labels is not None and num_labels != size:
    head = "no head" if size is None else f"a head of {size} labels"
    raise ValueError(
      f"the folder has {head}, not one of {num_labels}. Give a key to make a new one: "
      f"num_labels={num_labels}, key=jax.random.key(0)"
    )
  return size


def tensor_names(folder: Path, prefix: str = "") -> set[str]:
  """Returns the names of a folder's tensors, without a prefix that some may have."""
  with open_tensors(folder) as tensors:
    return {name.removeprefix(prefix) for name in tensors}


def check_depth(folder: Path, config: Any, names: Iterable[str]) -> None:
  """Raises ValueError if a config's number of layers is not that of a folder's tensors."""
  key = FIELDS["num_layers"]
  check_layer_count(folder, names, "encoder.layer", key, config.num_layers)


def load_encoder(
  folder: Path,
  model: Encoder,
  stored: Sequence[StoredTensor],
  prefix: str,
  shardings: PyTree | Callable[[PyTree], PyTree] | None,
  ignored: Callable[[str], bool],
  new_parts: Sequence[str],
  key: jax.Array | None,
) -> Loaded:
  """Returns an encoder's config and params: those of its folder, and new parts.

  Args:
    folder: with safetensors.
    model: with its config.
    stored: the tensors that hold the leaves, by their names without the prefix.
    prefix: of the encoder's names in some files, removed first.
    shardings: as in `load_params`.
    ignored: whether a tensor of this name in the files is not read.
    new_parts: top-level names of the parts of the tree to initialize from the key.
    key: None if there are none.
  """
  shapes = shapes_of(model)
  names = tensor_names(folder)
  by_name = {name.removeprefix(prefix): name for name in sorted(names, key=len)}
  for current, old in OLD_NAMES.items():
    renamed = [name for name in by_name if name.endswith(old)]
    by_name |= {name.removesuffix(old) + current: by_name[name] for name in renamed}
  read = [
    tensor._replace(name=by_name.get(tensor.name.removeprefix(prefix), tensor.name))
    for tensor in stored
    if tensor.paths[0].split("/")[0] not in new_parts
  ]
  by_leaf = broadcast(shardings, shapes)
  stored_shapes, stored_shardings = (
    {part: tree[part] for part in shapes if part not in new_parts} for tree in (shapes, by_leaf)
  )
  params = load_params(folder, read, stored_shapes, stored_shardings, ignored)
  tokens = jnp.zeros((1, 1), jnp.int32)
  for part in new_parts:
    leaves = jax.jit(lambda key, part=part: model.init(key, tokens)["params"][part])(key)
    params[part] = jax.tree.map(_sharded, leaves, by_leaf[part])
  return Loaded(model.config, {part: params[part] for part in shapes})


def save_encoder(
  folder: str | Path,
  model: Encoder,
  params: PyTree,
  stored: Sequence[StoredTensor],
  fields: Mapping[str, Any],
  tokenizer_from: str | Path | None,
  max_shard_bytes: int,
  labels: Sequence[str] | None,
) -> None:
  """Writes a folder; arguments as in `save_bert`, and:

  Args:
    stored: the tensors to write.
    fields: of config.json, in addition to those of any encoder; `architectures` is the name of the
      family.
  """
  config = model.config
  (family,) = fields["architectures"]
  kind = "Model" if config.num_labels is None else "ForSequenceClassification"
  written = {
    **fields,
    "architectures": [family + kind],
    **{key: getattr(config, name) for name, key in FIELDS.items()},
    "torch_dtype": str(jnp.result_type(*jax.tree.leaves(params))),
  }
  if config.num_labels is not None:  # `transformers` derives the size of a head from its labels
    names = labels or [f"LABEL_{i}" for i in range(config.num_labels)]
    if len(set(names)) != config.num_labels:
      raise ValueError(f"expected {config.num_labels} labels, each once, got {', '.join(names)}")
    written["id2label"] = {str(i): name for i, name in enumerate(names)}
    written["label2id"] = {name: i for i, name in enumerate(names)}
  tensors = tensors_of(stored, shapes_of(model), params)
  save_folder(folder, written, tensors, tokenizer_from, max_shard_bytes)


def _sharded(leaf: jax.Array, sharding: Any) -> jax.Array:
  return make_leaf(leaf.shape, leaf.dtype, lambda index: np.asarray(leaf)[index], sharding)
