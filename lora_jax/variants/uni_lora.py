"""Uni-LoRA (Li et al. 2025, arXiv 2506.00799). With x a row vector, as in JAX:

    h = x W + scaling * x A B,   A = theta[i] / sqrt(n[i]),  B = theta[j] / sqrt(n[j])

theta, (length,), is trained and shared by all weights: nothing else is. The indices i, (in, rank),
and j, (rank, out), are drawn once, each element uniformly from theta's, and frozen. n counts how
often each is drawn, over all weights: dividing by its root makes the map from theta to all A and B
isometric.

theta is drawn from U(-bound, bound), as in PEFT: A and B are small, and step 0 is nearly the base
model, not to the bit. The indices follow from `seed` and the weight's path, so that n can be
counted; they are stored with the adapter, as floats, which have integers exactly up to 2^24.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Shared, Site, Variant
from lora_jax.fields import CountOrZero, Positive, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import OpaqueRule

ARRAYS = {"index_a": "batch in rank", "index_b": "batch rank out"}
SHARED_ARRAYS = {"theta": "groups", "inverse_root": "groups"}
MAX_LENGTH = 2**24


def uni_lora_variant(length: int = 256, bound: float = 0.02, seed: int = 0) -> Variant:
  """Returns Uni-LoRA with theta of this length.

  Args:
    length: the number of trained parameters, of all weights together.
    bound: of theta's initial values.
    seed: of the indices.
  Raises:
    ValueError: naming the argument, its value and the allowed values.
  """
  if not 1 <= read_value(int, length, "length") <= MAX_LENGTH:
    raise ValueError(f"length must be from 1 to {MAX_LENGTH}, got {length}")
  bound = read_value(Positive, bound, "bound")
  start = _Start(length, read_value(CountOrZero, seed, "seed"))
  name = f"Uni-LoRA of {length}"
  name += f", up to {bound:g}" if bound != 0.02 else ""
  name += f", seed {seed}" if seed else ""
  frozen = (*ARRAYS, "inverse_root")
  shared = Shared(SHARED_ARRAYS, _StartShared(start, bound))
  return Variant(name, ARRAYS, start, weight, frozen, shared=shared)


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * A B` with the elements of A and B taken from theta."""
  values = p.theta * p.inverse_root
  return w + scaling * (_elements(values, p.index_a) @ _elements(values, p.index_b))


def _elements(values: Factor, index: Factor) -> Factor:
  """Returns a factor whose elements are those of a vector at an array of indices."""
  if index.array.dtype != jnp.float32:
    raise ValueError(f"indices must be float32, which has all of them, got {index.array.dtype}")
  ids, sharding = index.array.astype(jnp.int32), jax.typeof(index.array).sharding
  where = sharding if sharding.mesh.are_all_axes_explicit else None
  return Factor(values.array.at[ids].get(out_sharding=where), index.labels)


@dataclasses.dataclass(frozen=True)
class _Start:
  """The indices of one weight; a value, so that configs are compared and pickled."""

  length: int
  seed: int

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    del key  # the counts need the indices of all weights: they follow from the seed and the paths
    keys = jax.random.split(
      jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(site.path.encode()))
    )
    return {
      name: jax.random.randint(k, site.array_shape(words), 0, self.length).astype(jnp.float32)
      for k, (name, words) in zip(keys, ARRAYS.items(), strict=True)
    }


@dataclasses.dataclass(frozen=True)
class _StartShared:
  """theta ~ U(-bound, bound), and 1 / sqrt(n)."""

  indices: _Start
  bound: float

  def __call__(self, key: PRNGKeyArray, sites: Sequence[Site]) -> dict[str, jax.Array]:
    counts, length = jnp.zeros(self.indices.length), self.indices.length
    for site in sites:
      for index in self.indices(key, site).values():
        counts += jnp.bincount(index.astype(jnp.int32).ravel(), length=length)
    theta = jax.random.uniform(key, (length,), jnp.float32, -self.bound, self.bound)
    return {"theta": theta, "inverse_root": jnp.maximum(counts, 1) ** -0.5}


UNI_LORA = uni_lora_variant()


def uni_lora(
  fn: Callable[..., Any],
  config: LoraConfig,
  length: int = 256,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by Uni-LoRA.

  It is `lora` with `variant=uni_lora_variant(length)` in the config; see there for the arguments,
  the further arguments of `apply` and the errors. An optimizer of the bare trainable tree must not
  update the frozen arrays: use `lora_jax.freeze`.

  >>> fn = lambda params, x: x @ params["up"] @ params["down"]
  >>> params = {"up": jnp.ones((8, 6)), "down": jnp.ones((6, 8))}
  >>> adapted = uni_lora(fn, LoraConfig(rank=2, alpha=2.0, target=".*"), length=20)
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> trainable["lora_shared"]["Uni-LoRA of 20"].theta.shape
  (20,)
  """
  return adapt_by(uni_lora_variant(length), fn, config, opaque)
