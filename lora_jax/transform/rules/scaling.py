"""Structural rules: the weight is multiplied by a scalar, or per channel."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.transform.deferred import Base
from lora_jax.transform.errors import Unsupported
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor


def neg(call, w, **_):
  return w.scale(call(w.base), -1)


def mul(call, x, y, **_):
  """By a scalar, or by an array that varies along the axes of one factor only."""
  if isinstance(x, Factored) and isinstance(y, Factored):
    raise Unsupported("the elementwise product of two adapted weights")
  w, scale = (x, y) if isinstance(x, Factored) else (y, x)
  base = call(w.base, scale) if w is x else call(scale, w.base)
  return _scale_along(w, base, scale)


def div(call, w, scale, **_):
  if not isinstance(w, Factored) or isinstance(scale, Factored):
    raise Unsupported("division by an adapted weight")
  return _scale_along(w, call(w.base, scale), 1 / scale)


def _scale_along(w: Factored, base: Base, scale: Any) -> Factored:
  shape = np.shape(scale)
  dims = [d for d, size in enumerate(shape) if size > 1]
  if not dims:
    return w.scale(base, jnp.reshape(scale, ()))
  if w.probing:
    return w.rebase(base)
  if base.shape != w.shape:
    raise Unsupported(f"an elementwise product that broadcasts the weight to {base.shape}")
  small = lax.squeeze(scale, [d for d in range(w.ndim) if d not in dims])

  def scaled(factor: Factor) -> Factor:
    order = [dims.index(d) for d in factor.labels if d in dims]
    axes = [i for i, d in enumerate(factor.labels) if d in dims]
    factor_by = lax.transpose(small, order).astype(factor.array.dtype)
    array = factor.array * lax.broadcast_in_dim(factor_by, factor.array.shape, axes)
    return Factor(array, factor.labels)

  terms = []
  for term in w.terms:
    factors = list(term.factors)
    i = next((i for i, f in enumerate(factors) if set(dims) <= set(f.dims)), None)
    if i is None:
      raise Unsupported(f"an elementwise product with an array of shape {shape}, not per channel")
    factors[i] = scaled(factors[i])
    terms.append(replace(term, factors=tuple(factors)))
  return replace(w, base=base, terms=tuple(terms))
