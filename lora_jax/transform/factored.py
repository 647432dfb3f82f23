"""The factored weight: a gain times a base plus low-rank terms, with named axes.

The interpreter has an adapted weight `W` as

    gain * (base[dims] + sum over terms of scaling * sum_rank a[..., rank] * b[rank, ...])

and is never materialized. Every axis of a factor is labelled (see `factors`). The gain, None for
plain LoRA, is a vector over the outputs (DoRA's magnitude) or the inputs, applied to the layer's
output or input.

A rule that moves the weight moves base, factors and gain together, by `move`, `map_factors` or
`dataclasses.replace`. A rule that uses it gets the terms from `consume`, which applies the gain.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.deferred import Base, Deferred, deferred, evaluate
from lora_jax.transform.errors import Unsupported
from lora_jax.transform.factors import RANK, ArrayLike, Factor, Term, move_factor
from lora_jax.transform.formed import Formed, Update, is_formed
from lora_jax.transform.products import (
  Labels,
  aligned,
  contract,
  plus,
  resharded,
  spread,
  wide_dtype,
)


class Source:
  """The paths of the weights in a factored one, for messages, and whether it may be materialized.

  Sources with the same permission are equal, whatever their paths, so that one compiled inner
  function serves every layer. Inside such a function a source may name the first layer's path.

  Attributes:
    paths: the paths of the weights.
    materialize: whether the user allows all of them to be materialized.
  """

  def __init__(self, paths: Sequence[str], materialize: bool = False):
    if not paths:
      raise ValueError("a source has a path")
    self.paths = tuple(dict.fromkeys(paths))
    self.materialize = materialize

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Source) and self.materialize == other.materialize

  def __hash__(self) -> int:
    return hash(self.materialize)

  def __repr__(self) -> str:
    return " and ".join(self.paths)

  def __or__(self, other: "Source") -> "Source":
    return Source((*self.paths, *other.paths), self.materialize and other.materialize)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["base", "terms", "gain"],
  meta_fields=["source", "lookup", "origin"],
)
@dataclasses.dataclass(frozen=True)
class Factored:
  """A weight, or a view of one, with its low-rank terms and its gain kept apart.

  Attributes:
    base: the frozen part, of the view's full shape; a `Deferred` if it is quantized or has an
      update of its size.
    source: the weights it comes from.
    terms: the low-rank terms; several after weights were concatenated.
    gain: multiplies base and terms; a factor without inner axes, or None.
    lookup: the dimensions that came from an integer array (`w[ids]`). Such a value has the
      size of an activation, and may be materialized.
    origin: inside control flow, the number of the operand that it is unchanged.
  """

  base: Any
  source: Source
  terms: tuple[Term, ...] = ()
  gain: Factor | None = None
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
  def is_plain(self) -> bool:
    """Whether it is a weight without terms: a quantized one, or one that an update moves."""
    return not self.terms and self.gain is None

  @property
  def probing(self) -> bool:
    return any(term.probe is not None for term in self.terms)

  # ---- a variant's equation: w + s * (a @ b), v * gain ---------------------------------------

  def __add__(self, term: Term) -> "Factored":
    if self.gain is not None:
      raise ValueError("a term is added before the gain: (w + term) * gain")
    return dataclasses.replace(self, terms=(*self.terms, term))

  def __sub__(self, term: Term) -> "Factored":
    return self + -term

  def __mul__(self, gain: Factor) -> "Factored":
    if gain.inner:
      raise ValueError(f"a gain has no inner axes, got labels {gain.labels}")
    return dataclasses.replace(self, gain=gain if self.gain is None else self.gain * gain)

  def formed(
    self, update: Update, scaling: ArrayLike, *factors: Factor, dims: Sequence[int] = ()
  ) -> "Factored":
    """Adds `scaling * update(w, *factors)`, an update that has no low-rank factors.

    It is computed where the weight is used, in both passes, as an array of the weight's size.

    Args:
      update: from the base, as a factor in float32 or wider with all its dimensions, and the
        factors to a factor; static, so a function of a module.
      scaling: alpha / rank.
      factors: the small arrays.
      dims: the dimensions along which a slice of the update is the update of slices of the weight
        and the factors; the batch axes should be, so that `scan` computes one layer at a time.
    """
    leaf = self.base.operands[0] if isinstance(self.base, Deferred) else self.base
    if self.terms or self.gain is not None or is_formed(leaf):
      raise ValueError("an update without low-rank factors is added first, and once")
    return self.rebase(Deferred((Formed(leaf, factors, scaling, update, tuple(dims)),)))

  # ---- structural rules ----------------------------------------------------------------------

  def rebase(self, base: Base) -> "Factored":
    """Returns the same factors on another base whose elements are in the same places."""
    return dataclasses.replace(self, base=base)

  def map_factors(self, fn: Callable[[Factor], Factor]) -> "Factored":
    """Applies `fn` to every factor of every term, and to the gain."""
    terms = tuple(
      dataclasses.replace(term, factors=tuple(map(fn, term.factors))) for term in self.terms
    )
    gain = None if self.gain is None else fn(self.gain)
    return dataclasses.replace(self, terms=terms, gain=gain)

  def scale(self, base: Base, scale: ArrayLike) -> "Factored":
    """Multiplies by a scalar; `base` is the base already multiplied."""
    return dataclasses.replace(self, base=base, terms=tuple(scale * term for term in self.terms))

  def fold(self, number: ArrayLike) -> "Factored":
    """Folds `number` into the dropout keys: one number for each use or iteration."""
    return dataclasses.replace(self, terms=tuple(term.fold(number) for term in self.terms))

  def move(
    self,
    base: Base,
    where: Mapping[int, Labels],
    on_factor: Callable[[Factor], jax.Array] = lambda factor: factor.array,
  ) -> "Factored":
    """Returns the view in which dimension d has become the dimensions `where[d]`.

    Args:
      base: the base after the operation.
      where: the new dimensions of each old one; `()` for one that is gone.
      on_factor: the operation on a factor's array, which keeps the order of the axes. Then an
        axis of size 1 whose dimension is gone is squeezed.
    """
    moved = self.map_factors(lambda f: move_factor(on_factor(f), f.labels, where))
    lookup = tuple(sorted(label for old in self.lookup for label in where[old]))
    return dataclasses.replace(moved, base=base, lookup=lookup)

  # ---- consumers -----------------------------------------------------------------------------

  def consume(
    self,
    x: jax.Array,
    x_labels: Labels,
    out_labels: Labels,
    contracted: Sequence[int],
    batch: Sequence[int],
    output: Callable[[jax.Array, tuple[Term, ...]], jax.Array],
  ) -> jax.Array:
    """Returns the output of a layer for the input `x`; every rule gets the terms here.

    Args:
      x: the layer's input.
      x_labels: for each axis of x, the dimension of the weight that it is paired with, or a
        label from `ndim` on.
      out_labels: the same for each axis of the layer's output.
      contracted: the dimensions summed over with the input.
      batch: the dimensions shared with the input and kept.
      output: from the input, scaled by the gain if that is along inputs, and the terms (none
        while probing) to the layer's output.
    Raises:
      Unsupported: if the gain is neither along the output's axes nor along the input's; while
        probing, if an axis of the original weight has two roles.
    """
    self._record(contracted, batch)
    gain = self.gain
    on_output = gain is not None and set(gain.dims) <= set(out_labels)
    if gain is not None and not on_output:
      if not set(gain.dims) <= set(x_labels):
        raise Unsupported("its gain is neither along the output's axes only nor along the input's")
      if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise Unsupported(f"its gain is along the input, which is of {x.dtype.name}")
      x = _multiplied(x, x_labels, gain)
    out = output(x, () if self.probing else self.terms)
    return _multiplied(out, out_labels, gain) if gain is not None and on_output else out

  def dot(
    self,
    x: jax.Array,
    contracting: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]] = ((), ()),
    precision: Any = None,
    preferred_element_type: Any = None,
    weight_first: bool = False,
    base: Callable[[jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """Returns `lax.dot_general(x, w)`, or without `base` only its low-rank part.

    Contracts `x` with the factor that shares its axes first, then through rank; never materializes
    an array of the weight's size. While probing the low-rank part is zero.

    Args:
      x: the layer's input.
      contracting: the contracted axes of x and of the weight, paired.
      batch: the batch axes of x and of the weight, paired.
      precision: as in `lax.dot_general`.
      preferred_element_type: the dtype of the result, not of the activations between A and B.
      weight_first: True for `lax.dot_general(w, x)`.
      base: from the input to the base model's output; None returns the low-rank part, for the
        caller to add.
    Raises:
      Unsupported: without `base`, if the weight has a gain, which multiplies the whole output.
    """
    if base is None and self.gain is not None:
      raise Unsupported(
        "its opaque rule adds the low-rank part by hand, and this weight has a gain, which "
        "multiplies the whole output. Use w.dot(x, contracting, base=lambda x: ...)"
      )
    pairs = dict(zip((*contracting[0], *batch[0]), (*contracting[1], *batch[1]), strict=True))
    x_labels = tuple(pairs.get(axis, self.ndim + axis) for axis in range(x.ndim))
    x_free = [label for label in x_labels if label >= self.ndim]
    w_free = [d for d in range(self.ndim) if d not in pairs.values()]
    out_labels = (*batch[1], *(w_free + x_free if weight_first else x_free + w_free))

    def output(x: jax.Array, terms: tuple[Term, ...]) -> jax.Array:
      wide = self.input(x)
      options = precision, preferred_element_type
      parts = [_dot_term(term, wide, x_labels, out_labels, *options) for term in terms]
      if not parts and base is None:
        sizes = {**dict(enumerate(self.shape)), **dict(zip(x_labels, x.shape, strict=True))}
        dtype = preferred_element_type or wide.dtype
        return jnp.zeros([sizes[label] for label in out_labels], dtype)
      if not parts:
        assert base is not None
        return base(x)
      low_rank = functools.reduce(
        jnp.add, (spread(*part, out_labels, self.shape) for part in parts)
      )
      return low_rank if base is None else plus(base(x), low_rank)

    return self.consume(x, x_labels, out_labels, contracting[1], batch[1], output)

  def input(self, x: jax.Array) -> jax.Array:
    """Returns a layer's input in the dtype of its low-rank branch.

    It is the input's, unless the weight's is wider or the input is of integers; bfloat16 for
    float8, in which A B would be lost.
    """
    dtype = self.dtype if self.dtype.itemsize > 1 else jnp.bfloat16
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      return x.astype(jnp.promote_types(x.dtype, dtype))
    return x if x.dtype.itemsize >= max(self.dtype.itemsize, 2) else x.astype(dtype)

  def materialize(self) -> jax.Array:
    """Returns the weight as one array, computed in float32 or wider and rounded once.

    Only for merging, lookups and `on_unhandled`.
    """
    out = evaluate(self.base).astype(wide_dtype(self.dtype))
    for term in () if self.probing else self.terms:
      out = out + aligned(term.product(self.shape, out.dtype), out)
    if self.gain is not None:
      out = _multiplied(out, tuple(range(self.ndim)), self.gain)
    return out.astype(self.dtype)

  def materialize_by_permission(self) -> jax.Array:
    """Materializes where `on_unhandled` allows it, and records the use while probing."""
    for term in self.terms:
      if term.probe is not None:
        term.probe.record_materialized([factor.dims for factor in term.factors])
    return self.materialize()

  def look_up(self) -> jax.Array:
    """Returns the looked-up rows with their low-rank part: an embedding's output.

    The indexed axes are its inputs, also where a single row is left.
    """
    self._record(contracted=self.lookup, lookup=True)
    return self.materialize()

  @property
  def is_rows(self) -> bool:
    """Whether it was indexed down to vectors: an activation, which may be materialized."""
    return self.ndim <= 1 or (bool(self.lookup) and self.ndim < len(self.lookup) + 2)

  def _record(
    self, contracted: Sequence[int] = (), batch: Sequence[int] = (), lookup: bool = False
  ) -> None:
    """Records a use while the axes are inferred."""
    for term in self.terms:
      if term.probe is not None:
        dims = [factor.dims for factor in term.factors]
        term.probe.record(dims, set(contracted), set(batch), lookup)


def as_values(leaves: Sequence[Any], position: Mapping[str, int]) -> list[Any]:
  """Returns the leaves of a call as the interpreter has them: quantized ones as plain weights.

  Args:
    leaves: arrays and quantized weights.
    position: the indices of the weights among them by path.
  """
  paths = {i: path for path, i in position.items()}
  return [
    Factored(deferred(leaf), Source([paths.get(i, "an argument")])) if is_quantized(leaf) else leaf
    for i, leaf in enumerate(leaves)
  ]


def _multiplied(array: jax.Array, labels: Labels, gain: Factor) -> jax.Array:
  """Multiplies by a gain, in float32 or wider: in bfloat16 a gain of 1.003 would be 1."""
  scale = gain.along(tuple(label for label in labels if label in gain.labels))
  axes = [axis for axis, label in enumerate(labels) if label in gain.labels]
  scale = resharded(lax.broadcast_in_dim(scale, array.shape, axes), array)
  wide = wide_dtype(array.dtype)
  return (array.astype(wide) * scale.astype(wide)).astype(array.dtype)


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
    x = term.between(x, labels.index(RANK)) if i == 0 else x
  return x, labels


def _rank_first(factor: Factor) -> Factor:
  """Puts the rank axis first, for the gradient of A.

  XLA on CPUs computes it several times faster as (rank, in) than as (in, rank), which it would
  choose without the barrier.
  """
  if RANK not in factor.labels[1:]:
    return factor
  rank_axis = factor.axis(RANK)
  array = lax.optimization_barrier(jnp.moveaxis(factor.array, rank_axis, 0))
  return Factor(array, (RANK, *factor.labels[:rank_axis], *factor.labels[rank_axis + 1 :]))
