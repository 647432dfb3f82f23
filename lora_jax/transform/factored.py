"""The factored weight: a base plus low-rank terms whose axes are named.

A weight `W` adapted by LoRA (Hu et al. 2021, sec. 4.1) stands in the interpreter as

    base[dims] + sum over terms of scaling * sum_rank a[..., rank] * b[rank, ...]

and is never multiplied out. Every axis of a factor is labelled by the dimension of the
weight that it runs along, or RANK. A factor that lacks a dimension is constant along it;
a dimension that both factors have is a batch axis (the layers of a stack, the experts of
a mixture).

While `init` infers the axes, a weight of n dimensions has one probing factor per axis
instead: each rule of `rules/` moves it along as it would `a` and `b`, and where the
weight is used, the labels of the n factors tell what became of each axis.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform.probing import Probe, Use
from lora_jax.transform.products import Labels, aligned, contract, spread

RANK = -1
"""The label of a factor's rank axis; other labels are dimensions of the weight."""

ArrayLike = Any


class Unsupported(Exception):
  """Raised by a rule that cannot push an operation through the factors."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["labels"])
@dataclasses.dataclass(frozen=True)
class Factor:
  """One factor of a term: `array`'s axes run along `labels` of the weight, or RANK."""

  array: Any  # a jax.Array; JAX's tree functions put other things in its place
  labels: Labels

  @property
  def dims(self) -> Labels:
    """The weight's dimensions that this factor varies along."""
    return tuple(label for label in self.labels if label != RANK)

  def axis(self, label: int) -> int:
    return self.labels.index(label)


class Label:
  """A weight's path, for messages; all labels are equal, so that one compiled inner
  function serves every layer."""

  def __init__(self, path: str):
    self.path = path

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Label)

  def __hash__(self) -> int:
    return 0


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["factors", "scaling", "dropout_rate", "key"],
  meta_fields=["label", "probe"],
)
@dataclasses.dataclass(frozen=True)
class Term:
  """`scaling` times the sum over rank of the product of `factors`.

  Attributes:
    factors: A and B; while probing, one factor per axis of the weight.
    label: the path of the weight it belongs to, for messages.
    scaling: alpha / rank, times what the weight has been multiplied by since.
    dropout_rate: of the branch's input.
    key: None where there is no dropout; otherwise each use folds its own number in.
    probe: where uses are recorded while axes are inferred, else None.
  """

  factors: tuple[Factor, ...]
  label: Label
  scaling: ArrayLike = 1.0
  dropout_rate: ArrayLike = 0.0
  key: Any = None
  probe: Probe | None = None

  def scaled(self, z: jax.Array) -> jax.Array:
    by = self.scaling
    return z * (by if isinstance(by, int | float) else jnp.asarray(by).astype(z.dtype))

  def fold(self, number: ArrayLike) -> "Term":
    if self.key is None:
      return self
    return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))

  def drop(self, x: jax.Array) -> jax.Array:
    """Applies LoRA dropout to the branch's input `x`."""
    if self.key is None:
      return x
    keep = jax.random.bernoulli(self.key, 1 - self.dropout_rate, x.shape)
    kept = x / jnp.asarray(1 - self.dropout_rate).astype(x.dtype)
    return jnp.where(keep, kept, jnp.zeros_like(kept))

  def product(self, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Returns the term multiplied out to `shape`: what everything else here avoids."""
    array, labels = None, ()
    dims = tuple(range(len(shape)))
    for factor in self.factors:
      piece = factor.array.astype(dtype)
      if array is None:
        array, labels = self.scaled(piece), factor.labels
      else:
        array, labels = contract(array, labels, piece, factor.labels, keep=dims)
    assert array is not None, "a term has at least one factor"
    present = tuple(d for d in dims if d in labels)
    array = lax.transpose(array, [labels.index(d) for d in present])
    return lax.broadcast_in_dim(array, tuple(shape), present)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["base", "terms"],
  meta_fields=["lookup", "origin"],
)
@dataclasses.dataclass(frozen=True)
class Factored:
  """A weight, or a view of one, with its low-rank terms kept apart.

  Attributes:
    base: the frozen part, of the view's full shape.
    terms: the low-rank terms; several after weights were concatenated.
    lookup: the dimensions that came from an integer array (`w[ids]`). Such a value has the
      size of an activation, so that forming it is no loss.
    origin: inside control flow, the number of the operand that it still is, unchanged.
  """

  base: Any
  terms: tuple[Term, ...]
  lookup: tuple[int, ...] = ()
  origin: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  @property
  def ndim(self) -> int:
    return self.base.ndim

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  @property
  def paths(self) -> list[str]:
    """The weights it was made from, for messages."""
    return list(dict.fromkeys(term.label.path for term in self.terms))

  @property
  def probing(self) -> bool:
    return any(term.probe is not None for term in self.terms)

  def rebase(self, base: jax.Array) -> "Factored":
    """The same factors on another base: for what changes no element's position."""
    return dataclasses.replace(self, base=base)

  def map_factors(self, fn: Callable[[Factor], Factor]) -> "Factored":
    terms = tuple(
      dataclasses.replace(term, factors=tuple(map(fn, term.factors))) for term in self.terms
    )
    return dataclasses.replace(self, terms=terms)

  def scale(self, base: jax.Array, by: ArrayLike) -> "Factored":
    """Multiplies by a scalar; `base` is the base already multiplied."""
    terms = tuple(dataclasses.replace(t, scaling=t.scaling * by) for t in self.terms)
    return dataclasses.replace(self, base=base, terms=terms)

  def fold(self, number: ArrayLike) -> "Factored":
    """Folds `number` into the dropout keys: one number for each use or iteration."""
    return dataclasses.replace(self, terms=tuple(term.fold(number) for term in self.terms))

  def move(
    self,
    base: jax.Array,
    where: Mapping[int, Labels],
    on_factor: Callable[[Factor], jax.Array] = lambda factor: factor.array,
  ) -> "Factored":
    """Returns the view in which dimension d has become the dimensions `where[d]`.

    Args:
      base: the base after the operation.
      where: the new dimensions of each old one; `()` for one that has vanished.
      on_factor: the operation on a factor's array, which leaves the axes in the order of
        the factor's labels. An axis of size 1 whose dimension vanishes is squeezed after.
    """

    moved = self.map_factors(lambda f: move_factor(on_factor(f), f.labels, where))
    lookup = tuple(sorted(new for old in self.lookup for new in where[old]))
    return dataclasses.replace(moved, base=base, lookup=lookup)

  def use(
    self, contracted: Sequence[int] = (), batch: Sequence[int] = (), lookup: bool = False
  ) -> tuple[Term, ...]:
    """Returns the terms to add to the base's output; while probing none, and records the use.

    Args:
      contracted: the dimensions summed over with the layer's input.
      batch: the dimensions shared with the layer's input and kept.
      lookup: True for an embedding's lookup, where `contracted` are the indexed dimensions.
    Raises:
      Unsupported: while probing, if an original axis has two roles.
    """
    for term in self.terms:
      if term.probe is not None:
        term.probe.uses.append(_use(term, set(contracted), set(batch), lookup))
    return () if self.probing else self.terms

  def materialize(self) -> jax.Array:
    """Returns base plus terms as one array. Only for lookups and `on_unhandled`."""
    out = self.base
    for term in () if self.probing else self.terms:
      out = out + aligned(term.product(self.shape, self.dtype), self.base)
    return out

  def look_up(self) -> jax.Array:
    """Returns the looked-up rows with their low-rank part: an embedding's output.

    Its inputs are the indexed axes; of a single row, which has none left, those that are gone.
    """
    self.use(contracted=self.lookup, lookup=True)
    return self.materialize()

  @property
  def is_rows(self) -> bool:
    """Whether it was indexed down to vectors: an activation, which may be formed."""
    return self.ndim <= 1 or (bool(self.lookup) and self.ndim < len(self.lookup) + 2)

  def dot(
    self,
    x: jax.Array,
    contracting: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]] = ((), ()),
    precision: Any = None,
    preferred_element_type: Any = None,
    weight_first: bool = False,
  ) -> jax.Array:
    """Returns the low-rank part of `lax.dot_general(x, w)`; zeros while probing.

    Contracts `x` with the factor that shares its axes first, then through rank; never forms
    an array of the weight's size.

    Args:
      x: the layer's input.
      contracting: the contracted axes of x and of the weight, paired.
      batch: the batch axes of x and of the weight, paired.
      precision: as `lax.dot_general` has it.
      preferred_element_type: likewise; of the result, not of what stands between A and B.
      weight_first: True for `lax.dot_general(w, x)`.
    """
    pairs = dict(zip((*contracting[0], *batch[0]), (*contracting[1], *batch[1]), strict=True))
    x_labels = tuple(pairs.get(axis, self.ndim + axis) for axis in range(x.ndim))
    x_free = [label for label in x_labels if label >= self.ndim]
    w_free = [d for d in range(self.ndim) if d not in pairs.values()]
    out_labels = (*batch[1], *(w_free + x_free if weight_first else x_free + w_free))
    x = self.input(x)
    parts = [
      _dot_term(term, x, x_labels, out_labels, precision, preferred_element_type)
      for term in self.use(contracting[1], batch[1])
    ]
    if not parts:
      sizes = {**dict(enumerate(self.shape)), **dict(zip(x_labels, x.shape, strict=True))}
      return jnp.zeros([sizes[label] for label in out_labels], preferred_element_type or x.dtype)
    return functools.reduce(jnp.add, (spread(*part, out_labels, self.shape) for part in parts))

  def input(self, x: jax.Array) -> jax.Array:
    """Returns a layer's input in the dtype of its low-rank branch.

    That is its own, unless the weight's is wider or the input is of integers.
    """
    wide_enough = x.dtype.itemsize >= self.dtype.itemsize
    if jnp.issubdtype(x.dtype, jnp.inexact) and wide_enough:
      return x
    return x.astype(jnp.promote_types(x.dtype, self.dtype))


def _dot_term(
  term: Term, x: jax.Array, labels: Labels, out_labels: Labels, precision: Any, out_dtype: Any
) -> tuple[jax.Array, Labels]:
  """Returns x times one term, contracted with the factor that shares x's axes first."""
  x = term.drop(x)
  carried = {label for factor in term.factors for label in factor.labels}
  constant = [i for i, label in enumerate(labels) if label not in {*carried, *out_labels}]
  if constant:  # contracted axes that the term does not vary along
    x = x.sum(constant)
    labels = tuple(label for i, label in enumerate(labels) if i not in constant)
  summed = set(labels) - set(out_labels)
  order = sorted(term.factors, key=lambda f: -len(set(f.dims) & summed))
  for i, factor in enumerate(order):
    keep = {*out_labels, *(label for f in order[i + 1 :] for label in f.labels)}
    dtype = out_dtype if i == len(order) - 1 else None
    factor = _rank_first(factor)
    piece = factor.array.astype(x.dtype)
    x, labels = contract(x, labels, piece, factor.labels, keep, precision, dtype)
    x = term.scaled(x) if i == 0 else x
  return x, labels


def _rank_first(factor: Factor) -> Factor:
  """Puts the rank axis first, for the sake of the gradient of A.

  XLA on CPUs computes it several times faster as (rank, in) than as (in, rank), to which it would
  turn that product without the barrier.
  """
  if RANK not in factor.labels[1:]:
    return factor
  at = factor.axis(RANK)
  array = lax.optimization_barrier(jnp.moveaxis(factor.array, at, 0))
  return Factor(array, (RANK, *factor.labels[:at], *factor.labels[at + 1 :]))


def move_factor(array: jax.Array, labels: Labels, where: Mapping[int, Labels]) -> Factor:
  """Relabels a factor's axes; those whose dimension has vanished have size 1 and go."""
  gone = [i for i, label in enumerate(labels) if label != RANK and not where[label]]
  new = [n for old in labels for n in ((RANK,) if old == RANK else where[old])]
  return Factor(lax.squeeze(array, gone) if gone else array, tuple(new))


def _use(term: Term, contracted: set[int], batch: set[int], lookup: bool) -> Use:
  """Returns the role of each original axis at a use, from where its probing factor is now."""
  roles: dict[str, list[int]] = {"contracted": [], "batch": [], "free": []}
  for axis, factor in enumerate(term.factors):
    dims = set(factor.dims)
    if not dims and lookup and not contracted:
      roles["contracted"].append(axis)  # a single row
    elif not dims or dims <= batch:  # taken away by an index or a loop, or shared with the input
      roles["batch"].append(axis)
    elif dims <= contracted:
      roles["contracted"].append(axis)
    elif dims & (contracted | batch):
      raise Unsupported(f"axis {axis} is only partly contracted")
    else:
      roles["free"].append(axis)
  if not roles["contracted"] or not roles["free"]:
    side = "left as an output" if roles["contracted"] else "contracted with an input"
    raise Unsupported(f"no axis is {side}, so that there are no two sides to factor")
  return Use(*(tuple(axes) for axes in roles.values()), lookup=lookup)
