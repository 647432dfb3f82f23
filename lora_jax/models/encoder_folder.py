"""What the folders of the encoders have in common: names of tensors, heads, new heads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.models.hub import StoredTensor, make_leaf, open_tensors
from lora_jax.models.stored import load_params

PyTree = Any

TENSOR = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
FLOATS = {  # fields of any encoder's config: Hugging Face's
  "layer_norm_epsilon": "layer_norm_eps",
  "hidden_dropout": "hidden_dropout_prob",
  "attention_dropout": "attention_probs_dropout_prob",
}


def stored_by_module(
  shapes: PyTree, outside: Mapping[str, str], layer: Mapping[str, str], layers: str
) -> list[StoredTensor]:
  """Returns the tensors of a model whose modules are ours by other names.

  Args:
    shapes: of the params.
    outside: names of the modules outside the layers, by our paths.
    layer: names of those in a layer, by our paths.
    layers: the name of the list of the layers.
  """
  stored = []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
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
      own = StoredTensor(f"{layers}.{i}.{name}", (path,), i if stacked else None, **traits)
      stored.append(own)
  return stored


def head_size(
  path: Path, given: Mapping[str, Any], names: Iterable[str], num_labels: int | None, is_new: bool
) -> int | None:
  """Returns the labels of the head that a model is to have; None is no head.

  Args:
    path: of config.json, for messages.
    given: what stands there.
    names: of the folder's tensors.
    num_labels: that are asked for; None takes the folder's head, or none.
    is_new: whether a new head is asked for.
  Raises:
    ValueError: if the folder has no such head, and no new one is asked for.
  """
  if is_new:
    if num_labels is None:
      raise ValueError("a key makes a new head; expected num_labels beside it")
    return num_labels
  found = None
  kinds = given.get("architectures") or ["ForSequenceClassification"]
  of_sequences = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
  if of_sequences and any(name.startswith("classifier.") for name in names):
    labels = given.get("id2label")
    found = len(labels) if isinstance(labels, dict) else given.get("num_labels", 2)
  if num_labels is not None and num_labels != found:
    has = "no head" if found is None else f"a head of {found} labels"
    raise ValueError(
      f"{path.parent} has {has}, not one of {num_labels}. Give a key to make a new one: "
      f"num_labels={num_labels}, key=jax.random.key(0)"
    )
  return found


def labels_of(num_labels: int | None) -> dict[str, dict[str, Any]]:
  """Returns the fields of config.json from which `transformers` has the size of a head."""
  names = [f"LABEL_{i}" for i in range(num_labels or 0)]
  if not names:
    return {}
  ids = {name: i for i, name in enumerate(names)}
  return {"id2label": {str(i): name for name, i in ids.items()}, "label2id": ids}


def tensor_names(folder: Path) -> set[str]:
  """Returns the names of a folder's tensors."""
  with open_tensors(folder) as tensors:
    return set(tensors)


def load_encoder(
  folder: Path,
  stored: Sequence[StoredTensor],
  prefix: str,
  shapes: PyTree,
  shardings: PyTree | Callable[[PyTree], PyTree] | None,
  ignored: Callable[[str], bool],
  new: Mapping[str, Callable[[], PyTree]],
) -> PyTree:
  """Returns an encoder's params: those of its folder, and new parts.

  Args:
    folder: with safetensors.
    stored: which tensors hold which leaves, by the names that they have below the prefix.
    prefix: of the encoder's names in some files: all those that have it lose it first.
    shapes: of the params.
    shardings: as of `load_params`.
    ignored: tells the names, as they stand in the files, of tensors that are not read.
    new: what makes each part that is not read, by its name in the tree's first level.
  """
  names = tensor_names(folder)
  by_name = {name.removeprefix(prefix): name for name in sorted(names, key=len)}
  for now, old in OLD_NAMES.items():
    of_old = [name for name in by_name if name.endswith(old)]
    by_name |= {name.removesuffix(old) + now: by_name[name] for name in of_old}
  read = [
    one._replace(name=by_name.get(one.name.removeprefix(prefix), one.name))
    for one in stored
    if one.paths[0].split("/")[0] not in new
  ]
  places = shardings(shapes) if callable(shardings) else shardings
  places = jax.tree.broadcast(places, shapes, is_leaf=lambda x: x is None)
  old_shapes, old_places = (
    {part: tree[part] for part in shapes if part not in new} for tree in (shapes, places)
  )
  params = load_params(folder, read, old_shapes, old_places, ignored)
  for part, make in new.items():
    params[part] = jax.tree.map(_placed, make(), places[part])
  return {part: params[part] for part in shapes}


def _placed(leaf: jax.Array, place: Any) -> jax.Array:
  return make_leaf(leaf.shape, leaf.dtype, lambda index: np.asarray(leaf)[index], place)
