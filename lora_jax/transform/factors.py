"""Factors with named axes, and the low-rank term that two of them make.

Every axis of a factor is labelled by the dimension of the weight that it runs along, or by an
inner label: RANK, which a term sums over, or another that a variant sums over. A factor
without a dimension is constant along it; a dimension that both factors of a term have is a
batch axis (the layers of a stack, the experts of a mixture).

A variant's equation is written with these operations on small arrays.

    a @ b                 a term: the low-rank matmul, kept factored
    a * d, a / d, a - d   elementwise, broadcast along the axes that one of them lacks
    a.sum_over(b, labels)   contracted over some labels
    a.beside(b)           concatenated along rank: a.beside(c) @ b.beside(d) is a @ b + c @ d
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import RANK
from lora_jax.transform.probing import Probe
from lora_jax.transform.products import Labels, contract, resharded, spread

ArrayLike = Any


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["labels", "frozen"]
)
@dataclasses.dataclass(frozen=True)
class Factor:
  """An array with labelled axes: dimensions of the weight, or inner axes.

  Attributes:
    array: the values.
    labels: one for each axis.
    frozen: whether it was made from frozen arrays only.
  """

  array: Any  # a jax.Array; JAX's tree functions put other things in its place
  labels: Labels
  frozen: bool = False

  @property
  def dims(self) -> Labels:
    """The weight's dimensions that this factor varies along."""
    return tuple(label for label in self.labels if label >= 0)

  @property
  def inner(self) -> Labels:
    """The labels of its inner axes."""
    return tuple(label for label in self.labels if label < 0)

  def axis(self, label: int) -> int:
    return self.labels.index(label)

  def size(self, label: int) -> int:
    return self.array.shape[self.axis(label)]

  def relabel(self, labels: Mapping[int, int]) -> "Factor":
    """Returns the same array with some labels replaced."""
    return dataclasses.replace(self, labels=tuple(labels.get(l, l) for l in self.labels))

  def along(self, labels: Labels) -> jax.Array:
    """Returns the array with an axis for each of `labels`, of size 1 where it has none."""
    order = [self.axis(label) for label in labels if label in self.labels]
    array = lax.transpose(self.array, order)
    return jnp.expand_dims(array, [i for i, l in enumerate(labels) if l not in self.labels])

  def sum_over(self, other: "Factor", labels: Collection[int]) -> "Factor":
    """Contracts with another factor over the shared `labels`, in float32."""
    dtype = jnp.promote_types(self.array.dtype, jnp.float32)
    keep = {*self.labels, *other.labels} - set(labels)
    if set(self.labels) == set(other.labels):
      # As a batched dot of vectors, XLA on CPUs would transpose the matmul that one of them comes
      # from: eight times slower where that is A^T W.
      remaining = tuple(label for label in self.labels if label in keep)
      aligned = resharded(other.along(self.labels), self.array)
      product = self.array.astype(dtype) * aligned.astype(dtype)
      array = jnp.sum(product, axis=[self.axis(label) for label in labels])
      return Factor(array, remaining, self.frozen and other.frozen)
    array, remaining = contract(
      *(self.array, self.labels, other.array, other.labels, keep), preferred_element_type=dtype
    )
    return Factor(array, remaining, self.frozen and other.frozen)

  def __mul__(self, other: "Factor") -> "Factor":
    return _elementwise(jnp.multiply, self, other)

  def __truediv__(self, other: "Factor") -> "Factor":
    return _elementwise(jnp.divide, self, other)

  def __sub__(self, other: "Factor") -> "Factor":
    return _elementwise(jnp.subtract, self, other)

  def beside(self, other: "Factor") -> "Factor":
    """Returns two factors of the same axes, concatenated along rank."""
    array = jnp.concatenate([self.array, other.array], axis=self.axis(RANK))
    return Factor(array, self.labels, self.frozen and other.frozen)

  def __matmul__(self, other: "Factor") -> "Term":
    if not self.inner or set(self.inner) != set(other.inner):
      raise ValueError(
        f"a term needs factors with the same inner axes, got labels {self.labels}, {other.labels}"
      )
    order = self.inner
    return Term((_one_rank_axis(self, order), _one_rank_axis(other, order)))


def _elementwise(operation: Any, x: Factor, y: Factor) -> Factor:
  labels = (*x.labels, *(label for label in y.labels if label not in x.labels))
  arrays = [factor.along(labels) for factor in (x, y)]
  shape = jnp.broadcast_shapes(*(array.shape for array in arrays))
  array = operation(*(jnp.broadcast_to(array, shape) for array in arrays))
  return Factor(array, labels, x.frozen and y.frozen)


def _one_rank_axis(factor: Factor, inner: Labels) -> Factor:
  """Joins the inner axes, in this order, into one of label RANK."""
  if inner == (RANK,):
    return factor
  labels = (*factor.dims, *inner)
  array = lax.transpose(factor.array, [factor.axis(label) for label in labels])
  sizes = array.shape[: len(factor.dims)]
  rank = math.prod(array.shape[len(factor.dims) :])
  return Factor(lax.reshape(array, (*sizes, rank)), (*factor.dims, RANK), factor.frozen)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["factors", "scaling", "dropout_rate", "key"],
  meta_fields=["probe"],
)
@dataclasses.dataclass(frozen=True)
class Term:
  """`scaling` times the contraction of `factors` over rank.

  Attributes:
    factors: A and B; while probing, one factor per axis of the weight.
    scaling: alpha / rank, times the scalars that the weight was multiplied by.
    dropout_rate: of the branch's input.
    key: None without dropout; each use folds its own number in.
    probe: records uses while axes are inferred, else None.
  """

  factors: tuple[Factor, ...]
  scaling: ArrayLike = 1.0
  dropout_rate: ArrayLike = 0.0
  key: Any = None
  probe: Probe | None = None

  __array_ufunc__ = None  # a NumPy number times a term calls __rmul__

  @property
  def frozen(self) -> bool:
    """Whether none of its factors is trained."""
    return all(factor.frozen for factor in self.factors)

  def __rmul__(self, scaling: ArrayLike) -> "Term":
    return dataclasses.replace(self, scaling=self.scaling * scaling)

  def __neg__(self) -> "Term":
    return -1 * self

  def scaled(self, z: jax.Array) -> jax.Array:
    if isinstance(self.scaling, int | float):
      return z * self.scaling
    return z * jnp.asarray(self.scaling).astype(z.dtype)

  def between(self, z: jax.Array, rank_axis: int) -> jax.Array:
    """Returns the branch's activations between A and B, scaled; every rule calls it once."""
    del rank_axis
    return self.scaled(z)

  def fold(self, number: ArrayLike) -> "Term":
    if self.key is None:
      return self
    return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))

  def drop(self, x: jax.Array) -> jax.Array:
    """Applies LoRA dropout to the branch's input `x`."""
    if self.key is None:
      return x
    keep = jax.random.bernoulli(self.key, 1 - self.dropout_rate, x.shape)
    scaled = x / jnp.asarray(1 - self.dropout_rate).astype(x.dtype)
    return jnp.where(keep, scaled, jnp.zeros_like(scaled))

  def product(self, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Materializes the term to `shape`."""
    array, labels = None, ()
    dims = tuple(range(len(shape)))
    for factor in self.factors:
      piece = factor.array.astype(dtype)
      if array is None:
        array, labels = self.scaled(piece), factor.labels
      else:
        array, labels = contract(array, labels, piece, factor.labels, keep=dims)
    assert array is not None, "a term has at least one factor"
    return spread(array, labels, dims, shape)


def move_factor(array: jax.Array, labels: Labels, where: Mapping[int, Labels]) -> Factor:
  """Relabels a factor's axes; an axis of size 1 whose dimension is gone is squeezed."""
  gone = [i for i, label in enumerate(labels) if label >= 0 and not where[label]]
  moved = [moved_label for old in labels for moved_label in ((old,) if old < 0 else where[old])]
  return Factor(lax.squeeze(array, gone) if gone else array, tuple(moved))


def stacked_arrays(factors: Iterable[Factor]) -> list[jax.Array]:
  """Returns the arrays of the factors that vary along dimension 0, with that axis first."""
  return [jnp.moveaxis(f.array, f.axis(0), 0) for f in factors if 0 in f.labels]


def next_slice(factor: Factor, slices: Iterator[jax.Array]) -> Factor:
  """Returns a factor for one slice of the weight along dimension 0.

  Args:
    factor: of the whole weight.
    slices: of the `stacked_arrays` of this factor and those after it.
  """
  array = next(slices) if 0 in factor.labels else factor.array
  return Factor(array, tuple(l if l < 0 else l - 1 for l in factor.labels if l != 0), factor.frozen)


def factor_spec(labels: Labels, spec: Iterable[Any]) -> jax.sharding.PartitionSpec:
  """Returns a factor's PartitionSpec from its weight's: the inner axes are replicated."""
  axes = dict(enumerate(spec))  # a spec may be shorter than the shape
  return jax.sharding.PartitionSpec(*(axes.get(label) for label in labels))
