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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["step"])
@dataclasses.dataclass(frozen=True)
class Deferred:
  """A quantized weight, or the result of operations on it that are not done yet.

  Attributes:
    operands: the quantized leaf alone; or the operands of the step, arrays and `Deferred`s.
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

  def with_leaf(self, leaf: Quantized) -> "Deferred":
    """Returns the same pointwise operations on another leaf."""
    if self.step is None:
      return Deferred((leaf,))
    (inner,) = self.operands
    return Deferred((inner.with_leaf(leaf),), self.step)

  @property
  def pointwise_leaf(self) -> Quantized | None:
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
  """Returns a deferred weight as an array; other values unchanged."""
  if not isinstance(x, Deferred):
    return x
  if x.step is None:
    return x.operands[0].dequantize()
  return _compat.bind(x.step.equation, [evaluate(operand) for operand in x.operands])[x.step.output]


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
    return _compat.bind(equation, [evaluate(x) for x in operands])

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


def _leaves(operands: Sequence[Any]) -> list[Quantized]:
  return [x for x in jax.tree.leaves(list(operands), is_leaf=is_quantized) if is_quantized(x)]


def _is_explicit(operands: Sequence[Any]) -> bool:
  """Returns whether a weight is on a mesh with explicit axes."""
  return any(leaf.explicit_sharding is not None for leaf in _leaves(operands))


def _always(operands: Sequence[Any]) -> jax.Array:
  """Returns a predicate that is true, which XLA does not know.

  XLA for CPUs drops optimization barriers: it would dequantize all weights of a model at the
  beginning, once for both passes, and keep them. It does not move operations out of a branch.
  """
  code = next(iter(_leaves(operands)[0].arrays.values()))
  first = lax.slice(code, [0] * code.ndim, [1] * code.ndim).reshape(())
  bits = lax.bitcast_convert_type(first, f"uint{8 * code.dtype.itemsize}")
  return lax.population_count(bits) <= 64


def unstacked(x: Any) -> Any:
  """Returns a weight whose arrays can be sliced along its first axis, as `scan` does.

  It is evaluated if its operations do not allow that.
  """
  if not isinstance(x, Deferred):
    return x
  leaf = x.pointwise_leaf
  return x if leaf is not None and leaf.ndim > 2 and -leaf.axis < leaf.ndim else evaluate(x)


def _slice_stack(equation: Any, w: Deferred, *starts: Any) -> Deferred | None:
  """Returns a slice along axes of stacks; None if others are cut too."""
  leaf, params = w.pointwise_leaf, equation.params
  if leaf is None:
    return None
  num_stacks = min(leaf.ndim - 2, leaf.ndim + leaf.axis)
  if equation.primitive.name == "slice":
    strides = params["strides"] or [1] * leaf.ndim
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    is_cut = [cut != (0, size, 1) for cut, size in zip(cuts, leaf.shape, strict=True)]
  else:
    cuts = list(zip(starts, params["slice_sizes"], strict=True))
    is_cut = [cut[1] != size for cut, size in zip(cuts, leaf.shape, strict=True)]
  if any(is_cut[num_stacks:]):
    return None

  cut: Callable[..., jax.Array] = lax.slice_in_dim
  if starts:
    cut = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)

  def sliced(array: jax.Array) -> jax.Array:
    for axis in range(num_stacks):
      array = cut(array, *cuts[axis], axis=axis) if is_cut[axis] else array
    return array

  return w.with_leaf(jax.tree.map(sliced, leaf))


def _look_up(
  w: Any, indices: Any, *, dimension_numbers, slice_sizes, mode, fill_value=None, **_
) -> jax.Array | None:
  """Returns rows of a weight, dequantized after the lookup; None for any other gather."""
  dnums = dimension_numbers
  leaf = w.pointwise_leaf if isinstance(w, Deferred) else None
  if leaf is None or leaf.axis != -1 or dnums.operand_batching_dims or leaf.explicit_sharding:
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

  rows = _pointwise(w, leaf.rows(take).astype(leaf.dtype))
  if fills:
    exists = take(jnp.ones(leaf.shape[:last], jnp.uint8), 0)[..., None] > 0
    rows = jnp.where(exists, rows, jnp.nan if fill_value is None else fill_value)
  return rows


def _pointwise(w: Deferred, array: jax.Array) -> jax.Array:
  """Applies a weight's pointwise operations to an array."""
  if w.step is None:
    return array
  return _compat.bind(w.step.equation, [_pointwise(w.operands[0], array)])[w.step.output]
