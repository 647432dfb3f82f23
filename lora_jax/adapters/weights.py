"""One adapted weight: its variant's equation on the adapted layers, its dropout, and its merge."""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, Shaped

from lora_jax.adapters.copies import wide_dtype
from lora_jax.adapters.delta import LoraWeight, Variant
from lora_jax.adapters.layers import spread_layers, spread_term, spread_update, sum_with_weight
from lora_jax.transform.factored import Factored, Source
from lora_jax.transform.factors import Factor, Term


def merge_weight(
  w: Shaped[Array, "*shape"], weight: LoraWeight, variant: Variant, scaling: Any
) -> Shaped[Array, "*shape"]:
  """Returns a variant's weight as one array, computed in float32 and returned in W's dtype."""
  wide = w.astype(wide_dtype(w.dtype))
  adapted = adapted_weight(wide, weight, variant, Source(["merge"]), scaling)
  return adapted.materialize().astype(w.dtype)


def adapted_weight(
  w: Any, weight: LoraWeight, variant: Variant, source: Source, scaling: Any
) -> Factored:
  """Returns the adapted weight: the variant's equation on the adapted layers.

  The other layers of a stack get zeros as factors and ones as gains: the small arrays are padded,
  and the stack is not touched. `w` is an array, or a `Deferred` if it is quantized.
  """
  axes, layers = weight.axes, weight.layers
  if not isinstance(scaling, int | float):
    scaling = jnp.asarray(scaling, jnp.float32)
  adapted = variant.weight(Factored(w, source), _named_factors(w, weight), scaling)
  base, terms, gain = adapted.base, adapted.terms, adapted.gain
  if layers is not None:
    dim = axes.batch[0]
    base = spread_update(base, dim, layers, w.shape[dim])
    terms = tuple(spread_term(term, dim, layers, w.shape[dim]) for term in terms)
    if gain is not None and dim in gain.dims:
      gain = spread_layers(gain, dim, layers, w.shape[dim], 1.0)
    elif gain is not None:
      raise ValueError(f"{source}: the gain of some layers of a stack needs the stack's axis")
  return Factored(base, source, terms, gain)


def _named_factors(w: Any, weight: LoraWeight) -> SimpleNamespace:
  """Returns a node's arrays as labelled factors, for a variant's equation."""
  axes, layers = weight.axes, weight.layers
  factors = {
    spec.name: Factor(weight.arrays[spec.name], axes.labels(spec.words), spec.frozen)
    for spec in weight.table
  }
  dim = None if layers is None else axes.batch[0]

  def contract(factor: Factor, labels: Sequence[int]) -> Factor:
    return sum_with_weight(w, factor, labels, dim, layers or ())

  return SimpleNamespace(axes=axes, sum_with_weight=contract, **factors)


def check_drops(adapted: Factored, variant: Variant, rate: Any) -> None:
  """Raises ValueError if dropout would have no effect: without a term that is trained."""
  if not variant.has_dropout or all(term.frozen for term in adapted.terms):
    value = f"{rate:g}" if isinstance(rate, int | float) else "a traced rate"
    raise ValueError(
      f"{adapted.source}: LoRA dropout ({value}) acts on the input of a low-rank branch, and "
      f"{variant.name} has none that is trained. Give LoraConfig or a LoraRule for it dropout=0.0, "
      "and apply no dropout_rate for it"
    )


def with_dropout(terms: tuple[Term, ...], rate: Any, key: PRNGKeyArray) -> tuple[Term, ...]:
  """Gives every term its own dropout masks, except terms of frozen arrays only."""
  dropped = []
  for i, term in enumerate(terms):
    term_key = jax.random.fold_in(key, i) if i else key
    with_key = dataclasses.replace(term, dropout_rate=rate, key=term_key)
    dropped.append(term if term.frozen else with_key)
  return tuple(dropped)
