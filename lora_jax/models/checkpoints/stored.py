"""Converts params from and to the tensors of a Hugging Face folder, given `StoredTensor`s."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from lora_jax.models.checkpoints.hub import (
  Index,
  Parts,
  StoredTensor,
  Tensors,
  check_tensors,
  make_leaf,
  open_tensors,
)

Holding = dict[tuple[int, ...], tuple[StoredTensor, int]]
"""The tensors that hold a leaf by their index into it, and its offset on their last axis."""


class Loaded(NamedTuple):
  """A model's config and params; it prints as one line."""

  config: Any
  params: PyTree

  def __repr__(self) -> str:
    return f"({type(self.config).__name__}, {outline(self.params)})"


def outline(params: PyTree) -> str:
  """Returns the number of parameters and their dtypes, `124,439,808 parameters, float32`."""
  leaves = jax.tree.leaves(params)
  dtypes = sorted({str(leaf.dtype) for leaf in leaves})
  return f"{sum(leaf.size for leaf in leaves):,} parameters, {' and '.join(dtypes)}"


def load_params(
  folder: Path,
  stored: Sequence[StoredTensor],
  shapes: PyTree,
  shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
  ignored: Callable[[str], bool] = lambda name: False,
) -> PyTree:
  """Returns a model's params; each device reads its own part.

  Args:
    folder: with safetensors.
    stored: the tensors that hold the leaves, or the layers and experts of stacked leaves.
    shapes: `ShapeDtypeStruct`s of the params.
    shardings: a tree like `shapes` or a prefix of it, a function from `shapes` to such a tree, or
      None for the default device.
    ignored: whether a tensor of this name may be stored and is not read.
  Raises:
    FileNotFoundError: if weights are missing.
    ValueError: if tensors are missing, unexpected, misshapen, truncated or not floats.
  """
  leaves, structure = jax.tree.flatten(shapes)
  paths = [path for path, _ in _with_path(shapes)]
  sizes = dict(zip(paths, leaves, strict=True))
  holding: dict[str, Holding] = {}
  for tensor in stored:
    start = 0
    for path in tensor.paths:
      holding.setdefault(path, {})[tensor.place] = tensor, start
      start += sizes[path].shape[-1]
  by_leaf = jax.tree.leaves(broadcast(shardings, shapes), is_leaf=lambda x: x is None)
  with open_tensors(folder) as tensors:
    check_tensors(folder, tensors, expected_shapes(stored, sizes), ignored)

    def leaf(path: str, shape: Any, sharding: Any) -> jax.Array:
      def read(index: Index) -> Parts:
        last = range(shape.shape[-1])[index[-1]]  # as numbers, for a part of a fused tensor
        return _read(tensors, holding[path], (*index[:-1], slice(last.start, last.stop)))

      return make_leaf(shape.shape, shape.dtype, read, sharding)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # copies release the GIL
      arrays = list(pool.map(leaf, paths, leaves, by_leaf))
  return jax.tree.unflatten(structure, arrays)


def broadcast(
  shardings: PyTree | Callable[[PyTree], PyTree] | None, shapes: PyTree
) -> dict[str, Any]:
  """Returns a sharding or None for each leaf of `shapes`; arguments as in `load_params`."""
  tree = shardings(shapes) if callable(shardings) else shardings
  return jax.tree.broadcast(tree, shapes, is_leaf=lambda x: x is None)


def expected_shapes(
  stored: Sequence[StoredTensor], shapes: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tensors by name, given those of the leaves by path."""
  return {tensor.name: stored_shape(tensor, shapes) for tensor in stored}


def stored_shape(tensor: StoredTensor, shapes: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns the shape of a tensor, given those of the leaves by path."""
  parts = [tuple(shapes[path].shape)[len(tensor.place) :] for path in tensor.paths]
  return tensor.axes_to_file((*parts[0][:-1], sum(part[-1] for part in parts)))


def _read(tensors: Tensors, holding: Holding, index: Index) -> Parts:
  """Returns a part of a leaf; stacked layers and experts come from one tensor each."""
  if () in holding:
    (tensor, start), last = holding[()], index[-1]
    index = (*index[:-1], slice(start + last.start, start + last.stop))
    return tensor.to_ours(tensors.read(tensor.name, tensor.axes_to_file(index)))
  by_first: dict[int, Holding] = {}
  for (first, *rest), tensor in holding.items():
    by_first.setdefault(first, {})[tuple(rest)] = tensor
  numbers = range(len(by_first))[index[0]]
  return [_read(tensors, by_first[i], index[1:]) for i in numbers]


def tensors_of(
  stored: Sequence[StoredTensor], shapes: PyTree, params: PyTree
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields params by their tensors' names, one by one.

  Raises:
    ValueError: if the params' paths or shapes are not those of `shapes`.
  """
  leaves = dict(_with_path(params))
  expected = {(path, tuple(leaf.shape)) for path, leaf in _with_path(shapes)}
  actual = {(path, tuple(leaf.shape)) for path, leaf in leaves.items()}
  if expected != actual:
    raise ValueError(
      "the params are not those of the config: expected "
      f"{sorted(expected - actual)[:3]}, got {sorted(actual - expected)[:3]}"
    )
  for tensor in stored:
    parts = [np.asarray(leaves[path][tensor.place]) for path in tensor.paths]
    yield tensor.name, tensor.to_file(np.concatenate(parts, axis=-1))


def _with_path(tree: PyTree) -> list[tuple[str, Any]]:
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in flat]
