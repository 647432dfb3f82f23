"""Params from and to the tensors of a Hugging Face folder, by a table of which holds which."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.models.hub import Index, StoredTensor, Tensors, check_tensors, make_leaf, open_tensors

PyTree = Any


def load_params(
  folder: Path,
  stored: Sequence[StoredTensor],
  shapes: PyTree,
  shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
  ignored: Callable[[str], bool] = lambda name: False,
) -> PyTree:
  """Returns a model's params, each device reading its own part of them.

  Args:
    folder: with safetensors.
    stored: which tensors hold which leaves; each tensor one leaf, or one layer of a stacked one.
    shapes: of the params, `ShapeDtypeStruct`s.
    shardings: where they lie: a tree like theirs or a prefix of it, a function from `shapes` to
      such a tree, or None for the default device.
    ignored: tells the names of tensors that may be there and are not read.
  Raises:
    FileNotFoundError: if weights are missing.
    ValueError: if tensors are missing, unexpected, mis-shaped, truncated or no floats.
  """
  leaves, structure = jax.tree.flatten(shapes)
  paths = [path for path, _ in _with_path(shapes)]
  holding: dict[str, dict[int | None, StoredTensor]] = {}
  for one in stored:
    (path,) = one.paths
    holding.setdefault(path, {})[one.layer] = one
  places = shardings(shapes) if callable(shardings) else shardings
  places = jax.tree.broadcast(places, shapes, is_leaf=lambda x: x is None)
  places = jax.tree.leaves(places, is_leaf=lambda x: x is None)
  expected = expected_shapes(stored, dict(zip(paths, leaves, strict=True)))
  with open_tensors(folder) as tensors:
    check_tensors(folder, tensors, expected, ignored)

    def leaf(path: str, shape: Any, place: Any) -> jax.Array:
      def read(index: Index) -> np.ndarray:
        return _read(tensors, holding[path], index)

      return make_leaf(shape.shape, shape.dtype, read, place)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # copies let go of the interpreter
      new = list(pool.map(leaf, paths, leaves, places))
  return jax.tree.unflatten(structure, new)


def expected_shapes(
  stored: Sequence[StoredTensor], shapes: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tensors by name, from those of the leaves by path."""
  expected = {}
  for one in stored:
    parts = [tuple(shapes[path].shape)[one.layer is not None :] for path in one.paths]
    shape = (*parts[0][:-1], sum(part[-1] for part in parts))
    expected[one.name] = shape[::-1] if one.transposed else shape
  return expected


def _read(tensors: Tensors, of: Mapping[int | None, StoredTensor], index: Index) -> np.ndarray:
  if None in of:
    return _part(tensors, of[None], index)
  layers = range(len(of))[index[0]]
  return np.stack([_part(tensors, of[i], index[1:]) for i in layers])


def _part(tensors: Tensors, one: StoredTensor, index: Index) -> np.ndarray:
  return tensors.read(one.name, index[::-1]).T if one.transposed else tensors.read(one.name, index)


def tensors_of(
  stored: Sequence[StoredTensor], shapes: PyTree, params: PyTree
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields params under their tensors' names, one after another.

  Raises:
    ValueError: if the params' paths or shapes are not those of `shapes`.
  """
  leaves = dict(_with_path(params))
  expected = {(path, tuple(leaf.shape)) for path, leaf in _with_path(shapes)}
  found = {(path, tuple(leaf.shape)) for path, leaf in leaves.items()}
  if expected != found:
    raise ValueError(
      "the params are not those of the config: expected "
      f"{sorted(expected - found)[:3]}, got {sorted(found - expected)[:3]}"
    )
  for one in stored:
    index = () if one.layer is None else (one.layer,)
    array = np.concatenate([np.asarray(leaves[path][index]) for path in one.paths], axis=-1)
    yield one.name, array.T if one.transposed else array


def _with_path(tree: PyTree) -> list[tuple[str, Any]]:
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in flat]
