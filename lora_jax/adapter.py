"""The trainable tree: an adapted weight's node, its checks, and its form on disk."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.factored import RANK, Factor
from lora_jax.trees import key_parts, leaves_with_path, nest

PyTree = Any


class LoraAxes(NamedTuple):
  """The axes of an adapted weight, as indices into its shape.

  Attributes:
    batch: the axes that both A and B have: the layers of a stack, the experts of a mixture.
    inputs: the axes of A besides the batch and rank.
    outputs: the axes of B besides the batch and rank.
  """

  batch: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def a_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns the shape of `lora_a`: (batch..., in..., rank)."""
    return (*(shape[d] for d in (*self.batch, *self.inputs)), rank)

  def b_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns the shape of `lora_b`: (batch..., rank, out...)."""
    return (*(shape[d] for d in self.batch), rank, *(shape[d] for d in self.outputs))

  def sides(self, shape: Sequence[int]) -> tuple[int, int]:
    """Returns the sizes of the two sides; a rank above the smaller one adds nothing."""
    inputs, outputs = ([shape[d] for d in side] for side in (self.inputs, self.outputs))
    return math.prod(inputs), math.prod(outputs)

  def check(self, ndim: int, path: str) -> None:
    """Raises ValueError unless every axis of a weight of `ndim` axes has one role."""
    if sorted((*self.batch, *self.inputs, *self.outputs)) != list(range(ndim)):
      raise ValueError(
        f"{path}: axes must give each of the {ndim} axes of the weight one role, got {self}"
      )
    if not self.inputs or not self.outputs:
      raise ValueError(f"{path}: axes need an input and an output axis, got {self}")


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["lora_a", "lora_b"],
  meta_fields=["axes", "layers"],
)
@dataclass(frozen=True)
class LoraWeight:
  """The trained factors of one weight; stands where the weight stands in `params`.

  Attributes:
    lora_a: (batch..., in..., rank), float32.
    lora_b: (batch..., rank, out...), float32.
    axes: which axes of the weight these are; static.
    layers: of a stacked weight, the layers that are adapted, None for all; static.
  """

  lora_a: Any
  lora_b: Any
  axes: LoraAxes
  layers: tuple[int, ...] | None = None

  @property
  def rank(self) -> int:
    return self.lora_a.shape[-1]


def is_lora_weight(node: Any) -> bool:
  return isinstance(node, LoraWeight)


def adapter_weights(trainable: PyTree) -> dict[str, LoraWeight]:
  """Returns the adapted weights of a trainable tree by path."""
  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  return {path: node for path, node in nodes if is_lora_weight(node)}


def adapter_extra(trainable: PyTree) -> dict[str, Any]:
  """Returns the leaves of a trainable tree that are trained whole, by path."""
  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  return {path: node for path, node in nodes if not is_lora_weight(node)}


def copied(name: str, leaf: Any) -> jax.Array:
  """Returns a copy of a leaf that is trained whole, which has to be an array."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError(f"{name} is copied by init and needs a real array, got {leaf}")
  return jnp.copy(leaf)


def stored_shape(shape: Sequence[int], axes: LoraAxes, layers: Sequence[int] | None):
  """Returns the weight's shape with the layer axis cut to the adapted layers."""
  shape = list(shape)
  if layers is not None:
    shape[axes.batch[0]] = len(layers)
  return tuple(shape)


def weight_factors(weight: LoraWeight, shape: Sequence[int]) -> tuple[Factor, Factor]:
  """Returns A and B with labelled axes, for a weight of `shape`.

  Layers of a stack that are not adapted get zeros: the small factors are padded, the stack
  itself is left as it is.
  """
  a, b = weight.lora_a, weight.lora_b
  axes = weight.axes
  if weight.layers is not None:
    a, b = (_among_zeros(x, weight.layers, shape[axes.batch[0]]) for x in (a, b))
  return (
    Factor(a, (*axes.batch, *axes.inputs, RANK)),
    Factor(b, (*axes.batch, RANK, *axes.outputs)),
  )


def _among_zeros(x: Any, layers: Sequence[int], count: int) -> jax.Array:
  """Returns `count` layers: those of x in the places `layers`, zeros elsewhere."""
  zero = jnp.zeros_like(x[:1])  # of x's sharding
  place = {layer: i for i, layer in enumerate(layers)}
  pieces = [x[place[i] : place[i] + 1] if i in place else zero for i in range(count)]
  return jnp.concatenate(pieces)


def check_adapter(trainable: PyTree, targets: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
  """Checks a trainable tree against the weights it is for.

  Args:
    trainable: the tree to check.
    targets: path to `Target`, whose `leaf` is the weight.
    extra: path to `(keys, leaf)` of the leaves trained whole.
  Raises:
    ValueError: listing every missing, unexpected and mis-shaped leaf.
  """
  weights, whole = adapter_weights(trainable), adapter_extra(trainable)
  problems = [f"missing: {path}" for path in targets if path not in weights]
  problems += [f"missing: {path}" for path in extra if path not in whole]
  problems += [f"unexpected: {path}" for path in weights if path not in targets]
  problems += [f"unexpected: {path}" for path in whole if path not in extra]
  for path, weight in weights.items():
    if path in targets:
      problems += _misshaped(path, weight, targets[path].leaf.shape)
  for path, leaf in whole.items():
    if path in extra and jnp.shape(leaf) != jnp.shape(extra[path][1]):
      expected = jnp.shape(extra[path][1])
      problems.append(f"mis-shaped: {path} is {jnp.shape(leaf)}, expected {expected}")
  if problems:
    raise ValueError(
      "the trainable tree is not for these params and this config:\n  " + "\n  ".join(problems)
    )


def _misshaped(path: str, weight: LoraWeight, shape: Sequence[int]) -> list[str]:
  axes = weight.axes
  if len(axes.batch) + len(axes.inputs) + len(axes.outputs) != len(shape):
    return [f"mis-shaped: {path} has {axes}, but the weight has shape {tuple(shape)}"]
  shape = stored_shape(shape, axes, weight.layers)
  rank = weight.lora_a.shape[-1]
  expected = {"lora_a": axes.a_shape(shape, rank), "lora_b": axes.b_shape(shape, rank)}
  got = {"lora_a": tuple(weight.lora_a.shape), "lora_b": tuple(weight.lora_b.shape)}
  return [
    f"mis-shaped: {path}/{name} is {got[name]}, expected {expected[name]}"
    for name in expected
    if got[name] != expected[name]
  ]


# ---- on disk: plain arrays, and the axes as JSON beside them ---------------------------


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
      own = {f"{path}/lora_a": node.lora_a, f"{path}/lora_b": node.lora_b}
      layers = None if node.layers is None else list(node.layers)
      axes = {name: list(dims) for name, dims in node.axes._asdict().items()}
      entries[path] = {"keys": keys, "axes": axes, "layers": layers}
    else:
      own = {path: node}
      entries[path] = {"keys": keys}
    entries[path]["shapes"] = {name: list(array.shape) for name, array in own.items()}
    arrays |= own
  return arrays, json.dumps({"format": "lora_jax", "version": 1, "leaves": entries})


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
      items.append((tuple(entry["keys"]), LoraWeight(leaves[0], leaves[1], node_axes, layers)))
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
    if data["format"] != "lora_jax" or data["version"] != 1:
      raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
    return data["leaves"]
  except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"expected the axes of a lora_jax adapter, version 1, as JSON; got {axes[:80]!r} ({error})"
    ) from error


def _differences(trainable: PyTree, like: PyTree) -> Iterable[str]:
  got = dict(leaves_with_path(trainable, is_leaf=is_lora_weight))
  expected = dict(leaves_with_path(like, is_leaf=is_lora_weight))
  yield from (f"missing: {path}" for path in expected if path not in got)
  yield from (f"unexpected: {path}" for path in got if path not in expected)
  for path in (path for path in expected if path in got):
    ours, theirs = got[path], expected[path]
    if type(ours) is not type(theirs) and is_lora_weight(ours) != is_lora_weight(theirs):
      yield f"other kind: {path} is a {type(ours).__name__}"
      continue
    if is_lora_weight(ours) and (ours.axes, ours.layers) != (theirs.axes, theirs.layers):
      yield f"other axes: {path} has {ours.axes}, expected {theirs.axes}"
    shapes = [[tuple(x.shape) for x in jax.tree.leaves(node)] for node in (ours, theirs)]
    if shapes[0] != shapes[1]:
      yield f"mis-shaped: {path} is {shapes[0]}, expected {shapes[1]}"


def _raise_if(problems: list[str], what: str) -> None:
  if problems:
    raise ValueError(f"{what}:\n  " + "\n  ".join(problems))
