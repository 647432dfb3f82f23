"""Converts params from and to the tensors of a Hugging Face folder, given `StoredTensor`s."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lora_jax.models.checkpoints.gguf import open_gguf
from lora_jax.models.checkpoints.gguf_tensors import GGUFTensors
from lora_jax.models.checkpoints.hub import (
  FLOATS,
  Index,
  Later,
  Parts,
  StoredTensor,
  Tensors,
  make_leaf,
  open_tensors,
)
from lora_jax.models.checkpoints.loaded_weights import BLOCKS, QUANTIZED, loaded_shape
from lora_jax.models.checkpoints.tensor_checks import check_tensors
from lora_jax.quantization.ggml import block_bytes, field
from lora_jax.quantization.leaf import Quantized, is_quantized
from lora_jax.quantization.quantize import quantize
from lora_jax.trees import leaves_with_path

Holding = dict[tuple[int, ...], tuple[StoredTensor, int]]
"""The tensors that hold a leaf by their index into it, and its offset on their last axis."""
_CHUNK = 2**22  # bytes that are copied at once


class Loaded(NamedTuple):
  """A model's config and params; it prints as one line."""

  config: Any
  params: PyTree

  def __repr__(self) -> str:
    return f"({type(self.config).__name__}, {outline(self.params)})"


def outline(params: PyTree) -> str:
  """Returns the number of parameters and their dtypes, `124,439,808 parameters, float32`."""
  leaves = jax.tree.leaves(params, is_leaf=is_quantized)
  dtypes = {leaf.format if is_quantized(leaf) else str(leaf.dtype) for leaf in leaves}
  return f"{sum(leaf.size for leaf in leaves):,} parameters, {' and '.join(sorted(dtypes))}"


@contextmanager
def open_model(
  path: Path, expected: Mapping[str, tuple[int, ...]]
) -> Iterator[Tensors | GGUFTensors]:
  """Opens the tensors of a folder or a GGUF file.

  Args:
    path: of the folder or the file.
    expected: the shapes of the tensors by name.
  """
  if path.is_file():
    yield GGUFTensors(open_gguf(path), expected)
  else:
    with open_tensors(path) as tensors:
      yield tensors


def load_params(
  path: Path,
  stored: Sequence[StoredTensor],
  shapes: PyTree,
  shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
  ignored: Callable[[str], bool] = lambda name: False,
  weights: str | None = None,
) -> PyTree:
  """Returns a model's params; each device reads its own part.

  Args:
    path: of a folder with safetensors, or of a GGUF file.
    stored: the tensors that hold the leaves, or the layers and experts of stacked leaves.
    shapes: `ShapeDtypeStruct`s of the params.
    shardings: a tree like `shapes` or a prefix of it, a function from `shapes` to such a tree, or
      None for the default device.
    ignored: whether a tensor of this name may be stored and is not read.
    weights: `stored`, `int8` or `nf4`, as in `loaded_weights`; None converts to the dtypes of
      `shapes`.
  Raises:
    FileNotFoundError: if weights are missing.
    ValueError: if tensors are missing, unexpected, misshapen, truncated or not floats.
  """
  leaves = dict(_with_path(shapes))
  by_leaf = dict(_with_path(broadcast(shardings, shapes)))
  holding = _holding(stored, leaves)
  expected = expected_shapes(stored, leaves)
  with open_model(path, expected) as tensors:
    check_tensors(path, tensors, expected, ignored)
    loaded = _loaded_shapes(path, tensors, holding, leaves, weights)

    def leaf(name: str) -> Any:
      shape, sharding = loaded[name], by_leaf[name]
      if is_quantized(shape) and shape.format in BLOCKS:
        assert isinstance(tensors, GGUFTensors)
        return _load_blocks(tensors, holding[name], shape, sharding)
      if is_quantized(shape):
        return _load_quantized(tensors, holding[name], name, shape, sharding)
      return _load_floats(tensors, holding[name], shape, sharding)

    one_by_one = weights in QUANTIZED  # for the memory of a dequantized weight
    with ThreadPoolExecutor(1 if one_by_one else os.cpu_count()) as pool:  # copies release the GIL
      arrays = list(pool.map(leaf, leaves))
  return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def plan_params(
  path: Path,
  stored: Sequence[StoredTensor],
  shapes: PyTree,
  ignored: Callable[[str], bool] = lambda name: False,
  weights: str | None = None,
) -> PyTree:
  """Returns the shapes of the params of `load_params`, whose arguments and errors it has.

  Only the names, shapes and types of the tensors are read.
  """
  leaves = dict(_with_path(shapes))
  expected = expected_shapes(stored, leaves)
  with open_model(path, expected) as tensors:
    check_tensors(path, tensors, expected, ignored)
    loaded = _loaded_shapes(path, tensors, _holding(stored, leaves), leaves, weights)
  return jax.tree.unflatten(jax.tree.structure(shapes), list(loaded.values()))


def _holding(stored: Sequence[StoredTensor], leaves: Mapping[str, Any]) -> dict[str, Holding]:
  holding: dict[str, Holding] = {}
  for tensor in stored:
    start = 0
    for path in tensor.paths:
      holding.setdefault(path, {})[tensor.place] = tensor, start
      start += leaves[path].shape[-1]
  return {path: holding[path] for path in leaves}


def _loaded_shapes(
  path: Path,
  tensors: Tensors | GGUFTensors,
  holding: Mapping[str, Holding],
  leaves: Mapping[str, Any],
  weights: str | None,
) -> dict[str, Any]:
  """Returns the shape of each leaf as it is loaded."""
  loaded = {}
  for name, parts in holding.items():
    types = {tensors.dtype(tensor.name) for tensor, _ in parts.values()}
    num_stacked = len(next(iter(parts)))
    try:
      loaded[name] = loaded_shape(name, leaves[name], types, num_stacked, weights)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
  return loaded


def _load_floats(
  tensors: Tensors | GGUFTensors, holding: Holding, shape: Any, sharding: Any
) -> jax.Array:
  def read(index: Index) -> Parts:
    whole = zip(index, shape.shape, strict=True)
    return _read(tensors, holding, tuple(slice(*part.indices(size)[:2]) for part, size in whole))

  return make_leaf(shape.shape, shape.dtype, read, sharding)


def _load_quantized(
  tensors: Tensors | GGUFTensors, holding: Holding, path: str, shape: Quantized, sharding: Any
) -> Quantized:
  """Returns a leaf in a format that the file does not have, quantized layer by layer."""

  def in_format(held: Holding, sizes: tuple[int, ...], sharding: Any) -> Quantized:
    leaf = _load_floats(tensors, held, jax.ShapeDtypeStruct(sizes, shape.dtype), sharding)
    return quantize({path: leaf}, shape.format, re.escape(path), shape.axis)[path]

  if next(iter(holding.values()))[0].layer is None:
    leaf = in_format(holding, shape.shape, sharding)
  else:
    layers = _inner(holding, slice(None))
    inner = None if sharding is None else _without_first_axis(sharding)
    leaf = jax.tree.map(
      lambda *arrays: jnp.stack(arrays),
      *(in_format(held, shape.shape[1:], inner) for held in layers),
    )
  return leaf if sharding is None else jax.device_put(leaf, shape.shardings(sharding))


def _without_first_axis(sharding: Any) -> Any:
  if not isinstance(sharding, NamedSharding):  # of a single device
    return sharding
  return sharding.update(spec=PartitionSpec(*sharding.spec[1:]))


def _load_blocks(
  tensors: GGUFTensors, holding: Holding, shape: Quantized, sharding: Any
) -> Quantized:
  """Returns a leaf with the blocks of the file."""
  shardings = None if sharding is None else shape.shardings(sharding)

  def array(name: str) -> jax.Array:
    def read(index: Index) -> Parts:
      rows, inside = index[: shape.ndim - 1], index[shape.ndim - 1 :]
      whole = zip(rows, shape.stored_shape, strict=False)
      rows = tuple(slice(*part.indices(size)[:2]) for part, size in whole)
      return _read_blocks(tensors, holding, shape, name, rows, inside)

    target = shape.arrays[name]
    placed = None if shardings is None else shardings.arrays[name]
    return make_leaf(target.shape, target.dtype, read, placed)

  arrays = {name: array(name) for name in shape.arrays}
  return Quantized(arrays, shape.format, shape.axis, shape.dtype)


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


def _read(tensors: Tensors | GGUFTensors, holding: Holding, index: Index) -> Parts:
  """Returns a part of a leaf; stacked layers and experts come from one tensor each."""
  if () not in holding:
    return [_read(tensors, inner, index[1:]) for inner in _inner(holding, index[0])]
  tensor, start = holding[()]
  outputs = _outputs(tensors, tensor, start, index[-1])
  first, *others = tensor.axes_to_file((*index[:-1], outputs))
  if tensors.dtype(tensor.name) in FLOATS:
    array = tensor.to_ours(tensors.read(tensor.name, (first, *others)))
    return array.astype(np.float32) - tensor.offset if tensor.offset else array
  rows = np.r_[first]

  def write_to(out: np.ndarray) -> None:
    target = tensor.to_file(out)
    for part in _chunks(len(rows), 4 * math.prod(target.shape[1:])):
      target[part] = tensors.read(tensor.name, (rows[part], *others)) - np.float32(tensor.offset)

  return Later(tuple(part.stop - part.start for part in index), write_to)


def _read_blocks(
  tensors: GGUFTensors, holding: Holding, shape: Quantized, name: str, rows: Index, inside: Index
) -> Parts:
  """Returns a part of an array of a quantized leaf: some rows, and in these some blocks."""
  if () not in holding:
    return [
      _read_blocks(tensors, inner, shape, name, rows[1:], inside)
      for inner in _inner(holding, rows[0])
    ]
  tensor, start = holding[()]
  if tensor.transposed:  # rows are outputs
    rows = (*rows[:-1], _outputs(tensors, tensor, start, rows[-1]))
  kind, (first, *others) = BLOCKS[shape.format], rows
  first = np.r_[first]
  lengths = [len(first), *(part.stop - part.start for part in others)]
  num_blocks, *inner = shape.arrays[name].shape[shape.ndim - 1 :]
  row_bytes = math.prod(lengths[1:]) * num_blocks * block_bytes(kind)
  lengths += [
    len(range(size)[part]) for part, size in zip(inside, (num_blocks, *inner), strict=True)
  ]

  def write_to(out: np.ndarray) -> None:
    for part in _chunks(len(first), row_bytes):
      raw = tensors.blocks(tensor.name, (first[part], *others))
      out[part] = field(kind, name, raw)[(*[slice(None)] * len(rows), *inside)]

  return Later(tuple(lengths), write_to)


def _chunks(num_rows: int, row_bytes: int) -> Iterator[slice]:
  """Yields parts of the rows that are copied at once, so that the file's pages are freed."""
  step = max(_CHUNK // row_bytes, 1)
  for start in range(0, num_rows, step):
    yield slice(start, start + step)


def _inner(holding: Holding, numbers: slice) -> Iterator[Holding]:
  """Yields the tensors that hold each of these layers or experts."""
  by_first: dict[int, Holding] = {}
  for (first, *rest), tensor in holding.items():
    by_first.setdefault(first, {})[tuple(rest)] = tensor
  for i in range(len(by_first))[numbers]:
    yield by_first[i]


def _outputs(
  tensors: Tensors | GGUFTensors, tensor: StoredTensor, start: int, outputs: slice
) -> Any:
  """Returns where in a tensor the outputs of a leaf are, which may be interleaved there."""
  outputs = slice(start + outputs.start, start + outputs.stop)
  if tensor.heads is None:
    return outputs
  return tensor.our_outputs(tensors.shape(tensor.name)[0])[outputs]


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
  return leaves_with_path(tree, is_leaf=lambda x: x is None)
