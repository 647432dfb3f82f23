"""VeRA (Kopiczko et al. 2024, arXiv 2310.11454, sec. 3). With x a row vector, as in JAX:

    h = x W + ((x A) * d) B * b          d, (rank,), and b, (out,), are trained

A, (inputs, rank), and B, (rank, outputs), are drawn once, frozen, and shared by all weights: they
have the largest number of inputs and outputs, and each weight uses its first rows of A and its
first columns of B. b is initialized to 0, so that step 0 is the base model, and d to 0.1. There is
no scaling: alpha has no effect.

A and B are stored with the adapter, and never drawn again: other machines may draw other numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Shared, Site, Variant, largest_site
from lora_jax.fields import Finite, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.interpreter import OpaqueRule

ARRAYS = {"vera_d": "batch rank", "vera_b": "batch out"}
SHARED_ARRAYS = {"vera_in": "in rank", "vera_out": "rank out"}


def vera_variant(d_initial: float = 0.1) -> Variant:
  """Returns VeRA with `d` initialized to this number.

  Weights of another number, in several `LoraRule`s, have shared arrays of their own.

  Raises:
    ValueError: if it is not a finite number other than 0, which would train nothing.
  """
  d_initial = read_value(Finite, d_initial, "d_initial")
  if d_initial == 0:
    raise ValueError("d_initial must not be 0, which would train nothing, got 0")
  return Variant(
    "VeRA" if d_initial == 0.1 else f"VeRA of d {d_initial:g}",  # each has shared arrays of its own
    ARRAYS,
    _Start(d_initial),
    weight,
    frozen=tuple(SHARED_ARRAYS),
    shared=Shared(SHARED_ARRAYS, start_shared),
  )


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + (A * d) (B * b)` (eq. 2)."""
  del scaling
  return w + (p.vera_in * p.vera_d) @ (p.vera_out * p.vera_b)


@dataclasses.dataclass(frozen=True)
class _Start:
  """The initial d and b of one weight; a value, so that configs are compared and pickled."""

  d_initial: float

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    del key
    d, b = (site.array_shape(words) for words in ARRAYS.values())
    return {"vera_d": jnp.full(d, self.d_initial), "vera_b": jnp.zeros(b)}


def start_shared(key: PRNGKeyArray, sites: Sequence[Site]) -> dict[str, jax.Array]:
  """Returns A and B, drawn from U(-c, c) with c = sqrt(6 / fan_in): Kaiming's (sec. 3.3).

  The fan-in of A is its number of inputs, that of B the rank.
  """
  site, drawn = largest_site(sites), {}
  for k, (name, words) in zip(jax.random.split(key), SHARED_ARRAYS.items(), strict=True):
    shape = site.array_shape(words)
    bound = math.sqrt(6 / shape[0])
    drawn[name] = jax.random.uniform(k, shape, jnp.float32, -bound, bound)
  return drawn


VERA = vera_variant()


def vera(
  fn: Callable[..., Any],
  config: LoraConfig,
  d_initial: float = 0.1,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by VeRA.

  It is `lora` with `variant=vera_variant(d_initial)` in the config; see there for the arguments,
  the further arguments of `apply` and the errors. The config's alpha has no effect.
  An optimizer of the bare trainable tree must not update the shared arrays: use `lora_jax.freeze`.

  >>> fn = lambda params, x: x @ params["up"] @ params["down"]
  >>> params = {"up": jnp.ones((8, 6)), "down": jnp.ones((6, 8))}
  >>> adapted = vera(fn, LoraConfig(rank=16, alpha=16.0, target=".*"))
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> jax.tree.map(jnp.shape, trainable["up"].arrays)
  {'vera_b': (6,), 'vera_d': (16,)}
  >>> jax.tree.map(jnp.shape, trainable["lora_shared"]["VeRA"].arrays)
  {'vera_in': (8, 16), 'vera_out': (16, 8)}
  """
  return adapt_by(vera_variant(d_initial), fn, config, opaque)
