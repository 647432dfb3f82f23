"""Adapters on disk: plain arrays, and their axes as JSON beside them.

Version 1 knew plain LoRA alone: pairs lora_a, lora_b. Version 2 has each array's axes.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax.adapters.delta import (
  LORA_TABLE,
  ArraySpec,
  LoraWeight,
  Table,
  is_lora_weight,
)
from lora_jax.axes import LoraAxes
from lora_jax.trees import key_parts, leaves_with_path, nest

VERSION = 2


def pack(trainable: PyTree) -> tuple[dict[str, Any], str]:
  """Returns the arrays of a trainable tree by path, and its axes as JSON.

  The axes must be kept with the arrays: a square kernel with swapped axes would otherwise
  load without a word, and merge transposed.

  >>> import jax.numpy as jnp
  >>> weight = LoraWeight(jnp.zeros((3, 2)), jnp.zeros((2, 4)), LoraAxes((), (0,), (1,)))
  >>> arrays, axes = pack({"query": {"kernel": weight}})
  >>> sorted(arrays)
  ['query/kernel/lora_a', 'query/kernel/lora_b']
  """
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
    else:
      leaves = {path: node}
      entries[path] = {"keys": keys}
    entries[path]["shapes"] = {name: list(array.shape) for name, array in leaves.items()}
    arrays |= leaves
  return arrays, json.dumps({"format": "lora_jax", "version": VERSION, "leaves": entries})


def unpack(arrays: Mapping[str, Any], axes: str, like: PyTree | None = None) -> PyTree:
  """Returns the trainable tree that `pack` took apart.

  Args:
    arrays: path to array.
    axes: the JSON that `pack` returned with them.
    like: a trainable tree (arrays or `ShapeDtypeStruct`s) that the result must agree with in
      paths, axes and shapes; None takes what is there.
  Raises:
    ValueError: if the JSON is not of this form, leaves are missing or unexpected, or the
      result differs from `like`; every difference is listed.
  """
  entries = _entries(axes)
  expected = {name: shape for e in entries.values() for name, shape in e["shapes"].items()}
  problems = [f"missing: {name}" for name in sorted(set(expected) - set(arrays))]
  problems += [f"unexpected: {name}" for name in sorted(set(arrays) - set(expected))]
  problems += [
    f"mis-shaped: {name} is {tuple(arrays[name].shape)}, expected {tuple(shape)}"
    for name, shape in expected.items()
    if name in arrays and list(arrays[name].shape) != shape
  ]
  _raise_if(problems, "the arrays do not fit their axes")
  items = []
  for entry in entries.values():
    leaves = [arrays[name] for name in entry["shapes"]]
    if "axes" in entry:
      node_axes = LoraAxes(**{name: tuple(dims) for name, dims in entry["axes"].items()})
      layers = None if entry["layers"] is None else tuple(entry["layers"])
      table = Table(entry["variant"], tuple(ArraySpec(**spec) for spec in entry["arrays"]))
      named = dict(zip((spec.name for spec in table), leaves, strict=True))
      node = LoraWeight.from_arrays(named, table, node_axes, layers)
      items.append((tuple(entry["keys"]), node))
    else:
      items.append((tuple(entry["keys"]), leaves[0]))
  trainable = nest(items)
  if like is not None:
    _raise_if(list(_differences(trainable, like)), "the stored adapter is not the expected one")
  return trainable


def packed_shapes(axes: str) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the arrays by path, from the JSON that `pack` returned with them."""
  entries = _entries(axes).values()
  return {name: tuple(shape) for e in entries for name, shape in e["shapes"].items()}


def _entries(axes: str) -> dict[str, Any]:
  try:
    data = json.loads(axes)
    if data["format"] != "lora_jax" or data["version"] not in (1, VERSION):
      raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
    leaves = data["leaves"]
    if data["version"] == 1:
      plain = {
        "arrays": [spec._asdict() for spec in LORA_TABLE],
        "variant": LORA_TABLE.variant,
      }
      leaves = {path: e | plain if "axes" in e else e for path, e in leaves.items()}
    return leaves
  except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"expected the axes of a lora_jax adapter, version 1 or {VERSION}, as JSON; got "
      f"{axes[:80]!r} ({error})"
    ) from error


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
    shapes = [[tuple(x.shape) for x in jax.tree.leaves(node)] for node in (node, like_node)]
    if shapes[0] != shapes[1]:
      yield f"mis-shaped: {path} is {shapes[0]}, expected {shapes[1]}"


def _raise_if(problems: list[str], summary: str) -> None:
  if problems:
    raise ValueError(f"{summary}:\n  " + "\n  ".join(problems))
