"""A quantized weight in the engine: an expression that is evaluated where the weight is used.

    kernel -> convert_element_type -> transpose -> dot_general(x, .)

Operations that only move or cast the weight are recorded. The operation that uses it is run
together with the dequantization in one `jax.checkpoint`: the backward pass dequantizes again, and
neither pass keeps the dequantized weight. (If only the dequantization were checkpointed, the cast
after it would be a residual of the weight's size.)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.quantization.leaf import Quantized, is_quantized
from lora_jax.transform import _compat
from lora_jax.transform.factors import Factor
from lora_jax.transform.formed import Formed, is_formed, is_sliceable
from lora_jax.transform.products import Labels

Leaf: TypeAlias = Quantized | Formed

POINTWISE = ("convert_element_type", "copy", "copy_p", "name", "neg", "pvary", "pcast")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """One output of a recorded equation; equal if the operations are, whatever their place.

  Attributes:
    equation: of the jaxpr.
    output: the index among its outputs.
  """

  equation: Any
  output: int = 0

  @functools.cached_property
  def _key(self) -> Any:
    key = self.equation.primitive, tuple(sorted(self.equation.params.items())), self.output
    try:
      hash(key)
    except TypeError:
      return id(self.equation), self.output
    return key

  @property
  def aval(self) -> Any:
    """The output's shape and dtype, in the place of the equation."""
    return self.equation.outvars[self.output].aval

  @property
  def is_pointwise(self) -> bool:
    return self.equation.primitive.name in POINTWISE

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Step) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)


LINEAR = ("dot_general", "ragged_dot_general", "conv_general_dilated")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["step"])
@dataclasses.dataclass(frozen=True)
class Deferred:
  """A weight that is not an array, or the result of operations on it that are not done yet.

  Attributes:
    operands: the leaf alone; or the operands of the step, arrays and `Deferred`s.
    step: the last operation; None for the leaf itself.
  """

  operands: tuple[Any, ...]
  step: Step | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    if self.step is None or self.step.is_pointwise:  # also of a slice of the leaf
      return self.operands[0].shape
    return self.step.aval.shape

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self) -> Any:
    return self.operands[0].dtype if self.step is None else self.step.aval.dtype

  def __jax_array__(self) -> jax.Array:
    return evaluate(self)

  def with_leaf(self, leaf: Any) -> "Deferred":
    """Returns the same pointwise operations on another leaf."""
    if self.step is None:
      return Deferred((leaf,))
    (inner,) = self.operands
    return Deferred((inner.with_leaf(leaf),), self.step)

  @property
  def pointwise_leaf(self) -> Any:
    """The leaf, if only pointwise operations follow; its axes are then those of the result."""
    if self.step is None:
      return self.operands[0]
    (first, *rest) = self.operands
    return first.pointwise_leaf if self.step.is_pointwise and not rest else None


Base: TypeAlias = jax.Array | Deferred
"""The frozen part of a weight."""


def deferred(leaf: Any) -> Any:
  """Returns a quantized leaf as the engine has it; other leaves unchanged."""
  return Deferred((leaf,)) if is_quantized(leaf) else leaf


def evaluate(x: Any) -> Any:
  """Returns a deferred weight as an array, of which the backward pass keeps no other.

  Other values are unchanged.
  """
  return jax.checkpoint(_evaluate)(x) if isinstance(x, Deferred) else x


def _evaluate(x: Any) -> Any:
  if not isinstance(x, Deferred):
    return x
  if x.step is None:
    (leaf,) = x.operands
    return leaf.dequantize() if _is_leaf(leaf) else leaf
  operands = [_evaluate(operand) for operand in x.operands]
  return _compat.bind(x.step.equation, operands)[x.step.output]


def record(equation: Any, operands: Sequence[Any]) -> list[Any]:
  """Returns the outputs of an equation that moves a deferred weight.

  Slices of a stack slice the codes, and rows are looked up in the codes.
  """
  name, first = equation.primitive.name, operands[0]
  if name == "optimization_barrier":
    arrays = iter(lax.optimization_barrier([x for x in operands if not isinstance(x, Deferred)]))
    return [x if isinstance(x, Deferred) else next(arrays) for x in operands]
  if name == "gather":
    rows = _look_up(first, operands[1], **equation.params)
    return consume(equation, operands) if rows is None else [rows]
  if name in ("slice", "dynamic_slice"):
    part = _slice_stack(equation, *operands)
    if part is not None:
      return [part]
  return [Deferred(tuple(operands), Step(equation, i)) for i in range(len(equation.outvars))]


def consume(equation: Any, operands: Sequence[Any]) -> list[Any]:
  """Returns the outputs of an equation that uses deferred weights; none of them is kept."""

  def run(*operands):
    return _run(equation, operands)

  def run_in_branch(*operands):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes or _is_explicit(operands):  # in a shard_map devices would branch alone
      return run(*operands)
    shapes = jax.eval_shape(run, *operands)

    def never(*_):
      return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), shapes)

    return lax.cond(_always(operands), jax.checkpoint(run), never, *operands)

  def platform_run(*operands):
    return lax.platform_dependent(*operands, cpu=run_in_branch, default=run)

  return jax.checkpoint(platform_run)(*operands)


def _run(equation: Any, operands: Sequence[Any]) -> list[Any]:
  """Returns the outputs of an equation, its operands evaluated.

  If an update would be added to its base in less than float32, it is applied by itself: rounding
  the sum to bfloat16, with 8 bits of precision, would lose an update of less than 1/256.
  """
  leaves, tree = jax.tree.flatten(list(operands), is_leaf=is_formed)
  places = [i for i, leaf in enumerate(leaves) if is_formed(leaf)]
  if equation.primitive.name not in LINEAR or sum(map(_is_rounded, operands)) != 1:
    return _compat.bind(equation, [_evaluate(x) for x in operands])

  def run(weights: Sequence[jax.Array], others: Sequence[Any] = leaves) -> list[Any]:
    filled = list(others)
    for i, weight in zip(places, weights, strict=True):
      filled[i] = weight
    return _compat.bind(equation, [_evaluate(x) for x in jax.tree.unflatten(tree, filled)])

  bases = [leaves[i].base_array() for i in places]
  wide = [_widened(base) for base in bases]
  updates = [leaves[i].update_array(base.dtype) for i, base in zip(places, wide, strict=True)]
  inputs = [_widened(leaf) for leaf in leaves]
  _, changes = jax.jvp(lambda *weights: run(weights, inputs), wide, updates)
  return [out + change.astype(out.dtype) for out, change in zip(run(bases), changes, strict=True)]


def _is_rounded(x: Any) -> bool:
  """Whether an update would be added to a base in less than 32 bits, or the sum be cast so."""
  parts = [x, *_parts(x)] if isinstance(x, Deferred) else []
  return any(map(is_formed, parts)) and any(part.dtype.itemsize < 4 for part in parts)


def _parts(x: Deferred) -> list[Any]:
  """Returns the leaves and deferred weights that a weight is computed from."""
  inner = [part for part in x.operands if isinstance(part, Deferred)]
  return [*filter(_is_leaf, x.operands), *inner, *(p for part in inner for p in _parts(part))]


def _widened(x: Any) -> Any:
  """Returns float8 as bfloat16, in which an update is not lost; others unchanged."""
  is_array = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
  return x.astype(jnp.bfloat16) if is_array and x.dtype.itemsize == 1 else x


def _leaves(operands: Sequence[Any]) -> list[Leaf]:
  leaves = jax.tree.leaves(list(operands), is_leaf=_is_leaf)
  return [leaf for leaf in leaves if _is_leaf(leaf)]


def _is_leaf(x: Any) -> bool:
  return is_quantized(x) or is_formed(x)


def _is_explicit(operands: Sequence[Any]) -> bool:
  """Returns whether a weight is on a mesh with explicit axes."""
  return any(leaf.explicit_sharding is not None for leaf in _leaves(operands))


def _always(operands: Sequence[Any]) -> jax.Array:
  """Returns a predicate that is true, which XLA does not know.

  XLA for CPUs drops optimization barriers: it would dequantize all weights of a model at the
  beginning, once for both passes, and keep them. It does not move operations out of a branch.
  """
  array = jax.tree.leaves(_leaves(operands)[0])[0]
  first = lax.slice(array, [0] * array.ndim, [1] * array.ndim).reshape(())
  first = first.real if jnp.iscomplexobj(first) else first
  bits = lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
  return lax.population_count(bits) <= 64


def unstacked(x: Any) -> tuple[Any, Callable[[Any], Any]]:
  """Returns the arrays of a base that `scan` slices, and a function from a slice to the base.

  A weight is evaluated if its operations do not allow that.
  """
  leaf = x.pointwise_leaf if isinstance(x, Deferred) else None
  if leaf is None or leaf.ndim < 3 or not is_sliceable(leaf, 0):
    return evaluate(x), lambda array: array
  if is_quantized(leaf):
    return x, lambda slice_: slice_
  arrays, of_slice = leaf.unstacked()
  return arrays, lambda slice_: x.with_leaf(of_slice(slice_))


def _slice_stack(equation: Any, w: Deferred, *starts: Any) -> Deferred | None:
  """Returns a slice along axes of stacks; None if others are cut too."""
  leaf, params = w.pointwise_leaf, equation.params
  if leaf is None:
    return None
  if equation.primitive.name == "slice":
    strides = params["strides"] or [1] * leaf.ndim
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    is_cut = [cut != (0, size, 1) for cut, size in zip(cuts, leaf.shape, strict=True)]
  else:
    cuts = list(zip(starts, params["slice_sizes"], strict=True))
    is_cut = [cut[1] != size for cut, size in zip(cuts, leaf.shape, strict=True)]
  if any(is_cut[-2:]) or not all(is_sliceable(leaf, dim) for dim, cut in enumerate(is_cut) if cut):
    return None

  cut: Callable[..., jax.Array] = lax.slice_in_dim
  if starts:
    cut = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)

  def sliced(array: jax.Array, labels: Labels = tuple(range(leaf.ndim - 2))) -> jax.Array:
    for axis, dim in enumerate(labels):
      array = cut(array, *cuts[dim], axis=axis) if dim >= 0 and is_cut[dim] else array
    return array

  if is_quantized(leaf):
    return w.with_leaf(jax.tree.map(sliced, leaf))
  return w.with_leaf(
    leaf.map(
      lambda base: jax.tree.map(sliced, base),
      lambda f: dataclasses.replace(f, array=sliced(f.array, f.labels)),
    )
  )


def _look_up(
  w: Any, indices: Any, *, dimension_numbers, slice_sizes, mode, fill_value=None, **_
) -> jax.Array | None:
  """Returns rows of a weight, dequantized after the lookup; None for any other gather."""
  dnums = dimension_numbers
  leaf = w.pointwise_leaf if isinstance(w, Deferred) else None
  if leaf is None or not _has_rows(leaf) or dnums.operand_batching_dims or leaf.explicit_sharding:
    return None
  last = leaf.ndim - 1
  num_out = len(dnums.offset_dims) + indices.ndim - 1
  is_row = (
    slice_sizes[last] == leaf.shape[last]
    and dnums.collapsed_slice_dims == tuple(range(last))
    and last not in dnums.start_index_map
    and dnums.offset_dims == (num_out - 1,)
  )
  if not is_row:
    return None
  fills = mode == lax.GatherScatterMode.FILL_OR_DROP

  def take(array: jax.Array, fill: Any = None) -> jax.Array:
    inner = array.shape[last:]
    numbers = dnums._replace(offset_dims=tuple(num_out - 1 + i for i in range(len(inner))))
    gather_mode = lax.GatherScatterMode.CLIP if fills and fill is None else mode
    sizes = (*slice_sizes[:last], *inner)
    return lax.gather(array, indices, numbers, sizes, mode=gather_mode, fill_value=fill)

  rows = _pointwise(w, _rows(leaf, take, num_out - 1))
  if fills:
    exists = take(jnp.ones(leaf.shape[:last], jnp.uint8), 0)[..., None] > 0
    rows = jnp.where(exists, rows, jnp.nan if fill_value is None else fill_value)
  return rows


def _has_rows(leaf: Any) -> bool:
  """Whether rows can be looked up in a leaf's arrays."""
  if is_formed(leaf):
    is_array = not is_quantized(leaf.base)
    return leaf.ndim == 2 and 0 in leaf.dims and (is_array or _has_rows(leaf.base))
  return leaf.axis == -1


def _rows(leaf: Any, take: Callable[..., jax.Array], num_indices: int) -> jax.Array:
  """Returns rows of a leaf, (*indices, row); `take` looks them up in an array."""
  if is_quantized(leaf):
    return leaf.rows(take).astype(leaf.dtype)
  if not is_formed(leaf):
    return take(leaf)

  def look_up(factor: Factor) -> Factor:
    labels = tuple(num_indices if label == 1 else label for label in factor.labels if label != 0)
    if 0 not in factor.labels:
      return dataclasses.replace(factor, labels=labels)
    array = take(jnp.moveaxis(factor.array, factor.axis(0), 0))
    return dataclasses.replace(factor, array=array, labels=(*range(num_indices), *labels))

  return leaf.map(lambda base: _rows(base, take, num_indices), look_up).dequantize()


def _pointwise(w: Deferred, array: jax.Array) -> jax.Array:
  """Applies a weight's pointwise operations to an array."""
  if w.step is None:
    return array
  return _compat.bind(w.step.equation, [_pointwise(w.operands[0], array)])[w.step.output]
