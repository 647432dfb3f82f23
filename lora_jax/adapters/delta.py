"""Variants of LoRA, and the node of a trainable tree that holds one weight's arrays.

A variant is a table of axes and two pure functions:

    arrays                      {"lora_a": "batch in rank", "lora_b": "batch rank out"}
    start(key, site)            the arrays at step 0, by name
    weight(w, p, scaling)       the paper's equation: w + scaling * (p.lora_a @ p.lora_b)

In `weight`, w is the frozen weight, a `Factored`; each `p.name` is a `Factor` with labelled axes,
`p.axes` tells which of the weight's axes are inputs and outputs, and `p.sum_with_weight(factor,
labels)` contracts a factor with the weight itself. Everything else follows from the table: shapes
and their checks, shardings, the format on disk, the summary, the optimizer's mask. `apply` passes
the result of `weight` to the engine, and `merge` materializes it.

Arrays that all weights of a variant share (`Shared`) are in the tree once, under the key
`lora_shared`; `weight` sees each weight's part of them among its own arrays.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from lora_jax.adapters.initializers import Initializer
from lora_jax.adapters.layers import adapted_layers, stored_shape
from lora_jax.axes import RANK, LoraAxes
from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.factored import Factored
from lora_jax.trees import FrozenKey, leaves_with_path

SHARED = "lora_shared"
"""The key of a trainable tree under which the shared arrays are, by variant."""

SHARED_AXES = LoraAxes((), (0,), (1,))


@dataclass(frozen=True)
class Site:
  """One weight that a variant adapts, as its `start` gets it.

  Attributes:
    path: of the weight.
    leaf: the whole weight, or its shape.
    axes: which of its axes are inputs, outputs and shared.
    rank: of its adapter.
    layers: the adapted layers of a stacked weight; None is all.
    initialize: draws A and B, `(key, a_shape, b_shape, num_inputs) -> (lora_a, lora_b)`.
    is_lookup: whether its rows are looked up, as an embedding's.
    scaling: of its low-rank term, the config's.
  """

  path: str
  leaf: Any
  axes: LoraAxes
  rank: int
  layers: tuple[int, ...] | None
  initialize: Initializer
  is_lookup: bool = False
  scaling: float = 1.0

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the weight, its layer axis reduced to the adapted layers."""
    return stored_shape(self.leaf.shape, self.axes, self.layers)

  @property
  def num_inputs(self) -> int:
    return self.axes.counts(self.shape)[0]

  def array_shape(self, words: str, **sizes: int) -> tuple[int, ...]:
    """Returns the shape of an array with these axes; `sizes` are those of further inner axes."""
    return self.axes.array_shape(words, self.shape, {"rank": self.rank, **sizes})

  @property
  def weight(self) -> jax.Array:
    """The adapted layers of the weight.

    Raises:
      ValueError: if `leaf` is only a shape.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(self.leaf)):
      raise ValueError(
        f"{self.path}: this variant is initialized from the weight's values, and init got only its "
        "shape. Give real params, or call init inside jax.eval_shape to get shapes"
      )
    leaf = self.leaf.dequantize() if is_quantized(self.leaf) else jnp.asarray(self.leaf)
    return adapted_layers(leaf, self.axes, self.layers)


def no_sizes(site: Site) -> Mapping[str, int]:
  """Returns the sizes of a variant without inner axes other than rank."""
  del site
  return {}


class Shared(NamedTuple):
  """The arrays that all weights of a variant share: the layers of a stack, too.

  They are trained, unless the variant's `frozen` names them.

  Each weight gets the first entries along each axis: as many as it has inputs and outputs, in the
  shape of its own axes, and as many along an inner axis as its own arrays have.

  Attributes:
    arrays: the axes of each array, by name, without `batch`; `in` and `out` are one axis each, of
      the largest number of inputs and outputs.
    start: `start(key, sites) -> {name: array}`, the initial values, from all weights of the
      variant; `largest_site(sites)` gives the shapes.
  """

  arrays: Mapping[str, str]
  start: Callable[[PRNGKeyArray, Sequence[Site]], Mapping[str, jax.Array]]


def largest_site(sites: Sequence[Site]) -> Site:
  """Returns a site of the largest number of inputs, number of outputs and rank."""
  shape = largest_shape((site.axes, site.shape) for site in sites)
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  rank = max(site.rank for site in sites)
  return Site(SHARED, leaf, SHARED_AXES, rank, None, sites[0].initialize)


def largest_shape(weights: Iterable[tuple[LoraAxes, Sequence[int]]]) -> tuple[int, int]:
  """Returns the largest number of inputs and of outputs of weights, from their axes and shapes."""
  inputs, outputs = zip(*(axes.counts(shape) for axes, shape in weights), strict=True)
  return max(inputs), max(outputs)


class BiasGain(NamedTuple):
  """The gain over the outputs of a layer that multiplies its bias, too.

  Attributes:
    array: its name among the variant's arrays.
    paths: the path of the bias by that of the weight, None for a weight without one; of others, the
      leaf `bias` or `b` next to the weight is taken.
  """

  array: str
  paths: Mapping[str, str | None] = {}


class Variant(NamedTuple):
  """A variant of LoRA: its arrays, their initial values, and the weight they make.

  Attributes:
    name: for messages, files, and the place of shared arrays in the tree.
    arrays: the axes of each array, by name.
    start: `start(key, site) -> {name: array}`, the initial values. Its docstring says if the weight
      of step 0 is not the base model's, to the bit.
    weight: `weight(w, p, scaling) -> Factored`, the paper's equation on the adapted layers.
    frozen: names of arrays that the adapter holds and does not train.
    sizes: of inner axes other than `rank`, by word.
    shared: the arrays that all its weights share, or None. Variants with shared arrays have one
      copy for each name.
    bias: the gain that also multiplies the layer's bias, or None.
    has_dropout: whether LoRA dropout applies to the input of its terms; if not, it is refused.
  """

  name: str
  arrays: Mapping[str, str]
  start: Callable[[PRNGKeyArray, Site], Mapping[str, jax.Array]]
  weight: Callable[[Factored, Any, Any], Factored]
  frozen: Collection[str] = ()
  sizes: Callable[[Site], Mapping[str, int]] = no_sizes
  shared: Shared | None = None
  bias: BiasGain | None = None
  has_dropout: bool = True

  @property
  def table(self) -> "Table":
    """The static data of a variant that a node carries."""
    return self._table(self.arrays)

  @property
  def shared_table(self) -> "Table | None":
    """The same of its shared arrays."""
    return None if self.shared is None else self._table(self.shared.arrays)

  def _table(self, arrays: Mapping[str, str]) -> "Table":
    specs = (ArraySpec(name, words, name in self.frozen) for name, words in arrays.items())
    return Table(self.name, tuple(specs))

  def __hash__(self) -> int:
    return hash(self.name)


class ArraySpec(NamedTuple):
  """One array of a variant: its axes, in the words of `LoraAxes`, and whether it is frozen."""

  name: str
  words: str
  frozen: bool = False


@dataclass(frozen=True)
class Table:
  """The arrays of a variant, in order, and the variant's name."""

  variant: str
  specs: tuple[ArraySpec, ...]

  def __iter__(self) -> Iterator[ArraySpec]:
    return iter(self.specs)

  def __str__(self) -> str:
    return f"{self.variant} ({', '.join(spec.name for spec in self.specs)})"


LORA_TABLE = Table(
  "LoRA", (ArraySpec("lora_a", "batch in rank"), ArraySpec("lora_b", "batch rank out"))
)


@jax.tree_util.register_pytree_with_keys_class
class LoraWeight:
  """The arrays of one adapted weight, in the place that the weight has in `params`.

  `LoraWeight(lora_a, lora_b, axes, layers)` is plain LoRA's; `from_arrays` makes any variant's.
  The arrays, float32, are attributes: `.lora_a`, `.lora_b`, DoRA's `.magnitude`.

  Attributes:
    arrays: by name.
    axes: which of the weight's axes are inputs, outputs and shared; static.
    layers: the adapted layers of a stacked weight; None is all; static.
    table: the axes of each array, and whether it is frozen; static.
    weight_shape: the shape of the adapted layers of the weight, where the arrays lack some of its
      axes; static. Otherwise None, and in adapters that were stored without it.
  """

  arrays: dict[str, Any]
  axes: LoraAxes
  layers: tuple[int, ...] | None
  table: Table
  weight_shape: tuple[int, ...] | None

  def __init__(
    self, lora_a: Any, lora_b: Any, axes: LoraAxes, layers: tuple[int, ...] | None = None
  ):
    self.arrays, self.table = {"lora_a": lora_a, "lora_b": lora_b}, LORA_TABLE
    self.axes, self.layers, self.weight_shape = axes, layers, None

  @classmethod
  def from_arrays(
    cls,
    arrays: Mapping[str, Any],
    table: Table,
    axes: LoraAxes,
    layers: tuple[int, ...] | None,
    weight_shape: tuple[int, ...] | None = None,
  ) -> "LoraWeight":
    """Returns the node of a variant.

    Args:
      arrays: by name, one for each entry of `table`.
      table: a variant's `table`.
      axes: of the weight.
      layers: the adapted layers of a stacked weight; None is all.
      weight_shape: as `for_weight` sets it.
    """
    node = cls.__new__(cls)
    node.arrays, node.table = {spec.name: arrays[spec.name] for spec in table}, table
    node.axes, node.layers, node.weight_shape = axes, layers, weight_shape
    return node

  def __getattr__(self, name: str) -> Any:
    try:
      return self.__dict__["arrays"][name]
    except KeyError:
      raise AttributeError(f"this adapted weight has no array {name!r}") from None

  def __eq__(self, other: object) -> bool:
    return isinstance(other, LoraWeight) and vars(self) == vars(other)

  __hash__ = None  # pyright: ignore[reportAssignmentType]

  def __repr__(self) -> str:
    arrays = ", ".join(f"{name}={array!r}" for name, array in self.arrays.items())
    return f"LoraWeight({arrays}, axes={self.axes}, layers={self.layers})"

  def tree_flatten_with_keys(self):
    keys = [
      FrozenKey(spec.name) if spec.frozen else jax.tree_util.GetAttrKey(spec.name)
      for spec in self.table
    ]
    return list(zip(keys, self.arrays.values(), strict=True)), self._static

  def tree_flatten(self):
    return list(self.arrays.values()), self._static

  @classmethod
  def tree_unflatten(cls, static, arrays):
    table, *others = static
    named = dict(zip((spec.name for spec in table), arrays, strict=True))
    return cls.from_arrays(named, table, *others)

  @property
  def _static(self) -> tuple[Any, ...]:
    return self.table, self.axes, self.layers, self.weight_shape

  def replace(self, **arrays: Any) -> "LoraWeight":
    """Returns the same node with other arrays."""
    return LoraWeight.from_arrays(self.arrays | arrays, *self._static)

  def for_weight(self, shape: Sequence[int]) -> "LoraWeight":
    """Returns the same node with the weight's shape, if the arrays lack some of its axes."""
    labels = {label for spec in self.table for label in self.axes.labels(spec.words)}
    if labels >= set(range(len(shape))):
      return self
    adapted = stored_shape(tuple(shape), self.axes, self.layers)
    return LoraWeight.from_arrays(self.arrays, self.table, self.axes, self.layers, adapted)

  @property
  def is_plain(self) -> bool:
    """Whether it is a node of plain LoRA."""
    return self.table == LORA_TABLE

  @property
  def has_rank(self) -> bool:
    return any(RANK in self.axes.labels(spec.words) for spec in self.table)

  @property
  def rank(self) -> int:
    for spec in self.table:
      labels = self.axes.labels(spec.words)
      if RANK in labels:
        return self.arrays[spec.name].shape[labels.index(RANK)]
    raise ValueError(f"the arrays of {self.table} have no rank")


def is_lora_weight(node: Any) -> bool:
  return isinstance(node, LoraWeight)


def adapter_weights(trainable: PyTree) -> dict[str, LoraWeight]:
  """Returns the adapted weights of a trainable tree by path, without the shared arrays."""
  return {path: node for path, node in _nodes(trainable).items() if not is_shared(path)}


def shared_arrays(trainable: PyTree) -> dict[str, LoraWeight]:
  """Returns the nodes of shared arrays of a trainable tree by path.

  Each is as the node of a weight with the largest number of inputs and outputs of its variant.
  """
  return {path: node for path, node in _nodes(trainable).items() if is_shared(path)}


def shared_path(variant: str) -> str:
  """Returns the path of a variant's shared arrays, from its name."""
  return f"{SHARED}/{variant}"


def is_shared(path: str) -> bool:
  return path.startswith(f"{SHARED}/")


def _nodes(trainable: PyTree) -> dict[str, LoraWeight]:
  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  return {path: node for path, node in nodes if is_lora_weight(node)}


def whole_weights(trainable: PyTree, shapes: Mapping[str, Sequence[int]]) -> dict[str, LoraWeight]:
  """Returns the adapted weights by path, each with its part of the arrays that it shares.

  Args:
    trainable: a trainable tree that was checked.
    shapes: of the weights, by path.
  """
  shared = shared_arrays(trainable)
  return {
    path: _with_shared(weight, shared.get(shared_path(weight.table.variant)), shapes[path])
    for path, weight in adapter_weights(trainable).items()
  }


def _with_shared(weight: LoraWeight, shared: LoraWeight | None, shape: Sequence[int]) -> LoraWeight:
  if shared is None:
    return weight
  inner = {
    label: size
    for spec in weight.table
    for label, size in zip(
      weight.axes.labels(spec.words), weight.arrays[spec.name].shape, strict=True
    )
    if label < 0
  }
  axes = {0: weight.axes.inputs, 1: weight.axes.outputs}  # of SHARED_AXES' labels
  parts = {}
  for spec in shared.table:
    part, sizes = shared.arrays[spec.name], []
    for axis, label in enumerate(shared.axes.labels(spec.words)):
      dims = [shape[d] for d in axes[label]] if label >= 0 else [inner.get(label, part.shape[axis])]
      part = jax.lax.slice_in_dim(part, 0, math.prod(dims), axis=axis)
      sizes += dims
    parts[spec.name] = part.reshape(sizes)
  table = Table(weight.table.variant, (*weight.table.specs, *shared.table.specs))
  arrays = weight.arrays | parts
  return LoraWeight.from_arrays(arrays, table, weight.axes, weight.layers, weight.weight_shape)


def adapter_extra(trainable: PyTree) -> dict[str, Any]:
  """Returns the fully trained leaves of a trainable tree, by path."""
  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  return {path: node for path, node in nodes if not is_lora_weight(node)}
