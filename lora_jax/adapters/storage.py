"""Adapters on disk: plain arrays, and their axes as JSON.

Version 1 knew only plain LoRA: pairs lora_a, lora_b. Version 2 has each array's axes, and the
weight's shape if the arrays lack some of its axes; adapters that were stored without are read.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from lora_jax.adapters.copies import is_float
from lora_jax.adapters.delta import (
  LORA_TABLE,
  ArraySpec,
  LoraWeight,
  Table,
  is_lora_weight,
)
from lora_jax.axes import INNER, LoraAxes
from lora_jax.fields import CountOrZero, read_section, read_value
from lora_jax.files import parse_json
from lora_jax.trees import key_parts, leaves_with_path, nest

VERSION = 2


def pack(trainable: PyTree) -> tuple[dict[str, Any], str]:
  """Returns the arrays of a trainable tree by path, and its axes as JSON.

  The axes must be kept with the arrays: otherwise a square kernel with swapped axes would load
  without an error, and merge transposed.

  >>> import jax.numpy as jnp
  >>> weight = LoraWeight(jnp.zeros((3, 2)), jnp.zeros((2, 4)), LoraAxes((), (0,), (1,)))
  >>> arrays, axes = pack({"query": {"kernel": weight}})
  >>> sorted(arrays)
  ['query/kernel/lora_a', 'query/kernel/lora_b']
  """
  if not jax.tree.leaves(trainable):
    raise ValueError(f"the trainable tree has no arrays, got {trainable!r:.100}")
  flat, _ = jax.tree_util.tree_flatten_with_path(trainable, is_leaf=is_lora_weight)
  arrays, entries = {}, {}
  for key_path, node in flat:
    keys = key_parts(key_path)
    path = "/".join(keys)
    if is_lora_weight(node):
      leaves = {f"{path}/{name}": array for name, array in node.arrays.items()}
      layers = None if node.layers is None else list(node.layers)
      axes = {name: list(dims) for name, dims in node.axes._asdict().items()}
      table = [spec._asdict() for spec in node.table]
      entries[path] = {"keys": keys, "axes": axes, "layers": layers, "arrays": table}
      entries[path]["variant"] = node.table.variant
      if node.weight_shape is not None:
        entries[path]["weight_shape"] = list(node.weight_shape)
    else:
      leaves = {path: node}
      entries[path] = {"keys": keys}
    for name, leaf in leaves.items():
      if name in arrays:
        raise ValueError(f"two leaves of the trainable tree have the path {name!r}; rename one")
      if not hasattr(leaf, "shape"):
        raise ValueError(f"{name} is {leaf!r:.100}, expected an array")
    entries[path]["shapes"] = {name: list(array.shape) for name, array in leaves.items()}
    arrays |= leaves
  return arrays, json.dumps({"format": "lora_jax", "version": VERSION, "leaves": entries})


def unpack(arrays: Mapping[str, Any], axes: str, like: PyTree | None = None) -> PyTree:
  """Returns the trainable tree that `pack` took apart.

  Args:
    arrays: path to array.
    axes: the JSON that `pack` returned with them.
    like: a trainable tree (arrays or `ShapeDtypeStruct`s) that the result must agree with in
      paths, axes, shapes and dtypes; None accepts any.
  Raises:
    ValueError: if the JSON is not of this format, arrays are missing, unexpected, not of
      floating-point numbers or not finite, or the result differs from `like`; every difference is
      listed.
  """
  entries = _entries(axes) if like is None else _with_weight_shapes(_entries(axes), like)
  expected = {name: shape for e in entries.values() for name, shape in e.shapes.items()}
  problems = [f"missing: {name}" for name in sorted(set(expected) - set(arrays))]
  problems += [f"unexpected: {name}" for name in sorted(set(arrays) - set(expected))]
  problems += [
    f"mis-shaped: {name} is {tuple(arrays[name].shape)}, expected {shape}"
    for name, shape in expected.items()
    if name in arrays and tuple(arrays[name].shape) != shape
  ]
  _raise_if(problems, "the arrays do not fit their axes")
  _raise_if(list(_unusable(arrays)), "the adapter cannot be used")
  trainable = nest((entry.keys, _node(entry, arrays)) for entry in entries.values())
  if like is not None:
    _raise_if(list(_differences(trainable, like)), "the stored adapter is not the expected one")
  return trainable


def packed_shapes(axes: str) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the arrays by path, from the JSON that `pack` returned with them."""
  return {name: shape for e in _entries(axes).values() for name, shape in e.shapes.items()}


@dataclasses.dataclass(frozen=True)
class _Axes:
  batch: tuple[CountOrZero, ...]
  inputs: tuple[CountOrZero, ...]
  outputs: tuple[CountOrZero, ...]


@dataclasses.dataclass(frozen=True)
class _Array:
  name: str
  words: str
  frozen: bool


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One leaf of a stored trainable tree: an adapted weight, or without axes a fully trained leaf.

  Attributes:
    keys: of the leaf in nested dicts.
    shapes: of its arrays, by path.
    axes: of the adapted weight.
    layers: of a stacked weight, the adapted ones.
    arrays: the variant's table.
    variant: its name.
    weight_shape: of the adapted layers of the weight, if the arrays lack some of its axes.
  """

  keys: tuple[str, ...]
  shapes: Mapping[str, Any]
  axes: _Axes | None = None
  layers: tuple[CountOrZero, ...] | None = None
  arrays: tuple[_Array, ...] = ()
  variant: str = ""
  weight_shape: tuple[CountOrZero, ...] | None = None


def _with_weight_shapes(entries: Mapping[str, _Entry], like: PyTree) -> dict[str, _Entry]:
  """Returns the leaves with the shapes of `like` for weights that were stored without."""
  nodes = dict(leaves_with_path(like, is_leaf=is_lora_weight))
  return {
    path: dataclasses.replace(entry, weight_shape=nodes[path].weight_shape)
    if entry.weight_shape is None and is_lora_weight(nodes.get(path))
    else entry
    for path, entry in entries.items()
  }


def _node(entry: _Entry, arrays: Mapping[str, Any]) -> Any:
  leaves = [arrays[name] for name in entry.shapes]
  if entry.axes is None:
    return leaves[0]
  table = Table(entry.variant, tuple(ArraySpec(*_values(spec)) for spec in entry.arrays))
  named = dict(zip((spec.name for spec in table), leaves, strict=True))
  axes = LoraAxes(*_values(entry.axes))
  return LoraWeight.from_arrays(named, table, axes, entry.layers, entry.weight_shape)


def _values(record: Any) -> list[Any]:
  return [getattr(record, field.name) for field in dataclasses.fields(record)]


def _entries(axes: str) -> dict[str, _Entry]:
  """Returns the leaves of a stored trainable tree by path.

  Raises:
    ValueError: if the JSON is not that of an adapter.
  """
  try:
    data = parse_json(axes, "the axes")
    if not isinstance(data, Mapping) or data.get("format") != "lora_jax":
      raise ValueError("it lacks the format 'lora_jax'")
    if data.get("version") not in (1, VERSION):
      raise ValueError(f"version {data.get('version')!r}")
    leaves = read_value(Mapping, data.get("leaves"), "leaves")
    if not leaves:
      raise ValueError("it has no leaves")
    entries = {path: _entry(path, entry, data["version"]) for path, entry in leaves.items()}
    for entry in entries.values():
      for end in range(1, len(entry.keys)):
        if (outer := "/".join(entry.keys[:end])) in entries:
          raise ValueError(f"leaves[{outer!r}] contains another leaf")
    return entries
  except ValueError as error:
    raise ValueError(
      f"expected the axes of a lora_jax adapter, version 1 or {VERSION}, as JSON; got "
      f"{axes[:80]!r} ({error})"
    ) from error


def _entry(path: str, value: Any, version: int) -> _Entry:
  name = f"leaves[{path!r}]"
  value = read_value(Mapping, value, name)
  if version == 1 and "axes" in value:
    table = [spec._asdict() for spec in LORA_TABLE]
    value = {**value, "arrays": table, "variant": LORA_TABLE.variant}
  entry = read_section(_Entry, value, f"{name}.")
  shapes = {
    array: read_value(tuple[CountOrZero, ...], shape, f"{name}.shapes[{array!r}]")
    for array, shape in entry.shapes.items()
  }
  names = [f"{path}/{spec.name}" for spec in entry.arrays] if entry.axes else [path]
  if "/".join(entry.keys) != path or list(shapes) != names:
    raise ValueError(
      f"{name} has keys {list(entry.keys)} and the arrays {', '.join(shapes)}, expected "
      f"{', '.join(names)}"
    )
  if entry.axes:
    _check_axes(name, entry, shapes)
  return dataclasses.replace(entry, shapes=shapes)


def _check_axes(name: str, entry: _Entry, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises ValueError if the axes of an adapted weight are not those of its arrays."""
  assert entry.axes is not None, "is checked"
  axes = LoraAxes(*_values(entry.axes))
  axes.check(sum(map(len, axes)), name)
  if entry.weight_shape is not None and len(entry.weight_shape) != sum(map(len, axes)):
    raise ValueError(f"{name}: weight_shape={list(entry.weight_shape)}, expected the axes {axes}")
  for spec, shape in zip(entry.arrays, shapes.values(), strict=True):
    words = spec.words.split()
    if not words or not set(words) <= {"batch", "in", "out", *INNER}:
      raise ValueError(f"{name}: {spec.name} has the axes {spec.words!r}")
    if len(axes.labels(spec.words)) != len(shape):
      raise ValueError(f"{name}: {spec.name} has shape {shape}, expected the axes {spec.words!r}")
  if entry.layers is not None and not axes.batch:
    raise ValueError(f"{name}: layers={list(entry.layers)} without a batch axis")


def _unusable(arrays: Mapping[str, Any]) -> Iterable[str]:
  """Lists the arrays that are not of floating-point numbers, too narrow, or not finite."""
  for name, array in arrays.items():
    if not is_float(array.dtype) or array.dtype.itemsize < 2:
      yield f"other dtype: {name} is {array.dtype}, expected float32, or another of 16 bits or more"
  real = {n: x for n, x in arrays.items() if is_float(x.dtype) and _has_values(x)}
  finite = jax.device_get({name: jnp.isfinite(array).all() for name, array in real.items()})
  yield from (f"not finite: {name} holds NaN or infinity" for name in finite if not finite[name])


def _has_values(array: Any) -> bool:
  return not isinstance(array, jax.ShapeDtypeStruct | Tracer)


def _differences(trainable: PyTree, like: PyTree) -> Iterable[str]:
  got = dict(leaves_with_path(trainable, is_leaf=is_lora_weight))
  expected = dict(leaves_with_path(like, is_leaf=is_lora_weight))
  yield from (f"missing: {path}" for path in expected if path not in got)
  yield from (f"unexpected: {path}" for path in got if path not in expected)
  for path in (path for path in expected if path in got):
    node, like_node = got[path], expected[path]
    if type(node) is not type(like_node) and is_lora_weight(node) != is_lora_weight(like_node):
      yield f"other kind: {path} is a {type(node).__name__}"
      continue
    if is_lora_weight(node) and node.table != like_node.table:
      yield f"other variant: {path} is {node.table}, expected {like_node.table}"
      continue
    if is_lora_weight(node) and (node.axes, node.layers) != (like_node.axes, like_node.layers):
      yield f"other axes: {path} has {node.axes}, expected {like_node.axes}"
    if is_lora_weight(node):
      shapes = node.weight_shape, like_node.weight_shape
      if None not in shapes and shapes[0] != shapes[1]:
        yield (
          f"mis-shaped: {path} is for a weight of shape {shapes[0]}, expected {shapes[1]}. Load "
          "the base model that it was trained on"
        )
    leaves = [jax.tree.leaves(node) for node in (node, like_node)]
    shapes = [[tuple(x.shape) for x in arrays] for arrays in leaves]
    if shapes[0] != shapes[1]:
      yield f"mis-shaped: {path} is {shapes[0]}, expected {shapes[1]}"
    dtypes = [[jnp.dtype(x.dtype).name for x in arrays] for arrays in leaves]
    if dtypes[0] != dtypes[1]:
      got_dtypes, expected_dtypes = (", ".join(dict.fromkeys(names)) for names in dtypes)
      yield (
        f"other dtype: {path} is {got_dtypes}, expected {expected_dtypes}. Read it with the stored "
        "dtype in `like`, then convert it"
      )


def _raise_if(problems: list[str], summary: str) -> None:
  if problems:
    raise ValueError(f"{summary}:\n  " + "\n  ".join(problems))
