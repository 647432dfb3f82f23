"""LoKr (Yeh et al. 2024, LyCORIS, arXiv 2309.14859). With x a row vector:

    h = x (W + scaling * kron(W1, W2))

W1 is (in1, out1) and W2 (in2, out2), with in1 * in2 = in and out1 * out2 = out. in1 is `factor` if
it divides in; else, or with -1, the largest divisor up to it and up to the square root; so is out1.
W2, or both, may be of low rank: W2 = W2a W2b, W1 = W1a W1b. With these pairs, or an identity where
a matrix is whole, the update is the product of two factors of rank rank1 * rank2:

    kron(W1a W1b, W2a W2b) = kron(W1a, W2a) kron(W1b, W2b)

If those would have as many elements as W, the update is formed: each layer computes it in the
forward and again in the backward pass, and keeps none of it. LoRA dropout then has no branch to act
on, and is refused.

W1, or W1b, is initialized to 0, so that step 0 is the base model; the others as in PEFT: uniform up
to 1 / sqrt(fan_in). The config's `init` is not used. Several input or output axes are taken as one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.axes import IN1, IN2, OUT1, OUT2, RANK, RANK2
from lora_jax.fields import Count, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.transform.products import Labels
from lora_jax.variants.loha import uniform

Decompose = Literal["none", "w2", "both"]

W1, W2 = {"w1": "batch in1 out1"}, {"w2": "batch in2 out2"}
W1_PAIR = {"w1_a": "batch in1 rank2", "w1_b": "batch rank2 out1"}
W2_PAIR = {"w2_a": "batch in2 rank", "w2_b": "batch rank out2"}
ARRAYS = {"none": W1 | W2, "w2": W1 | W2_PAIR, "both": W1_PAIR | W2_PAIR}


def lokr_variant(factor: int = -1, decompose: Decompose = "w2") -> Variant:
  """Returns LoKr with these matrices.

  Args:
    factor: the size of W1, positive, or -1.
    decompose: the matrices that have low rank, that of the config: "none", "w2" or "both". PEFT
      decomposes W2, and with `decompose_both` W1, where rank is less than half of the matrix's
      longer side.
  Raises:
    ValueError: naming the argument, its value and the allowed values.
  """
  if factor != -1:
    read_value(Count, factor, "factor (or -1)")
  read_value(Decompose, decompose, "decompose")
  parts = {"none": "whole", "w2": "W2 of low rank", "both": "both of low rank"}[decompose]
  name = f"LoKr of factor {factor}, {parts}"
  sizes = _Sizes(factor)
  return Variant(name, ARRAYS[decompose], _Start(decompose, sizes), weight, sizes=sizes)


def factors_of(size: int, factor: int) -> tuple[int, int]:
  """Returns two factors of a size, the second at least as large unless `factor` divides it.

  >>> factors_of(768, -1), factors_of(768, 8), factors_of(768, 5)
  ((24, 32), (8, 96), (4, 192))
  """
  if factor > 0 and size % factor == 0:
    return factor, size // factor
  largest = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
  first = next(n for n in range(largest, 0, -1) if size % n == 0)
  return first, size // first


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """The sizes of W1 and W2; a value, so that configs are compared and pickled."""

  factor: int

  def __call__(self, site: Site) -> Mapping[str, int]:
    num_inputs, num_outputs = site.axes.counts(site.shape)
    (in1, in2), (out1, out2) = (factors_of(n, self.factor) for n in (num_inputs, num_outputs))
    return {"in1": in1, "in2": in2, "out1": out1, "out2": out2, "rank2": site.rank}


@dataclasses.dataclass(frozen=True)
class _Start:
  """The initial values: W1, or W1b, of zeros, and the others uniform."""

  decompose: Decompose
  sizes: _Sizes

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    sizes = self.sizes(site)
    for part in {"none": "", "w2": "2", "both": "12"}[self.decompose]:
      self._check_rank(site, part, sizes[f"in{part}"], sizes[f"out{part}"])
    fan_in = {"w2": "in2", "w1_a": "in1", "w2_a": "in2"}
    bounds = {name: sizes[word] ** -0.5 for name, word in fan_in.items()}
    bounds |= {"w2_b": site.rank**-0.5, "w1": 0.0, "w1_b": 0.0}
    return uniform(key, site, ARRAYS[self.decompose], bounds, sizes)

  def _check_rank(self, site: Site, part: str, num_inputs: int, num_outputs: int) -> None:
    if site.rank > min(num_inputs, num_outputs):
      factor, decompose = self.sizes.factor, "w2" if part == "1" else "none"
      raise ValueError(
        f"{site.path}: rank {site.rank} is larger than the smaller side of W{part}, {num_inputs} x "
        f"{num_outputs} with factor {factor}. Lower the rank, choose another factor, or keep "
        f"W{part} whole: lokr_variant({factor}, {decompose!r})"
      )


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * kron(W1, W2)`."""
  pair1 = _pair(p, "w1", IN1, OUT1, RANK2)
  pair2 = _pair(p, "w2", IN2, OUT2, RANK)
  rank = pair1[0].size(RANK2) * pair2[0].size(RANK)
  num_inputs, num_outputs = p.axes.counts(w.shape)
  inputs, outputs = ([d - w.ndim for d in dims] for dims in (p.axes.inputs, p.axes.outputs))
  if rank * (num_inputs + num_outputs) >= num_inputs * num_outputs:
    update = _Kronecker(tuple(inputs), tuple(outputs))
    return w.formed(update, scaling, *pair1, *pair2, dims=p.axes.batch)
  a, b = (one * other for one, other in zip(pair1, pair2, strict=True))
  a = _joined(a, (IN1, IN2), p.axes.inputs, w.shape)
  return w + scaling * (a @ _joined(b, (OUT1, OUT2), p.axes.outputs, w.shape))


def _pair(p: Any, name: str, in_label: int, out_label: int, rank: int) -> tuple[Factor, Factor]:
  """Returns two factors of W1 or W2; if it is whole, one is the identity of its smaller side."""
  if not hasattr(p, name):
    return getattr(p, f"{name}_a"), getattr(p, f"{name}_b")
  whole: Factor = getattr(p, name)
  side = min(in_label, out_label, key=whole.size)
  identity = Factor(jnp.eye(whole.size(side)), (side, rank), frozen=True)
  rest = whole.relabel({side: rank})
  return (identity, rest) if side == in_label else (rest, identity)


@dataclasses.dataclass(frozen=True)
class _Kronecker:
  """The update as an array of the weight's size; dimensions are counted from the last one."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def __call__(self, w: Factor, a1: Factor, b1: Factor, a2: Factor, b2: Factor) -> Factor:
    product = a1.sum_over(b1, (RANK2,)) * a2.sum_over(b2, (RANK,))
    for parts, dims in (((IN1, IN2), self.inputs), ((OUT1, OUT2), self.outputs)):
      product = _joined(product, parts, [w.labels[d] for d in dims], w.array.shape)
    return product


def _joined(factor: Factor, parts: Labels, dims: Sequence[int], shape: Sequence[int]) -> Factor:
  """Returns a factor with two inner axes as dimensions of a weight of this shape."""
  rest = tuple(label for label in factor.labels if label not in parts)
  sizes = [*(factor.size(label) for label in rest), *(shape[dim] for dim in dims)]
  return Factor(factor.along((*rest, *parts)).reshape(sizes), (*rest, *dims), factor.frozen)


LOKR = lokr_variant()
"""The factor nearest the square root, and W2 of low rank."""


def lokr(
  fn: Callable[..., Any],
  config: LoraConfig,
  factor: int = -1,
  decompose: Decompose = "w2",
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by LoKr.

  It is `lora` with `variant=lokr_variant(factor, decompose)` in the config; see there for the
  arguments, the further arguments of `apply` and the errors.

  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.ones((64, 96))}
  >>> adapted = lokr(fn, LoraConfig(rank=2, alpha=2.0, target="kernel"), factor=4)
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 64)))
  >>> jax.tree.map(jnp.shape, trainable["kernel"].arrays)
  {'w1': (4, 4), 'w2_a': (16, 2), 'w2_b': (2, 24)}
  """
  return adapt_by(lokr_variant(factor, decompose), fn, config, opaque)
