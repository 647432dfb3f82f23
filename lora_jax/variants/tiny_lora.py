"""TinyLoRA (Morris et al. 2026, arXiv 2602.04118). With x a row vector, as in JAX:

    h = x W + scaling * x A R B,   R = v[0] P[0] + ... + v[u - 1] P[u - 1]

A, (in, rank), and B, (rank, out), are LoRA-XS's: the first terms of W's singular value
decomposition, frozen. The matrices P[i], (rank, rank), are drawn once for each weight, frozen. v,
(u,), is trained and shared by all weights: u parameters in all, 1 at least. Weights whose variant
has another `group` have another v. v is initialized to 0, so that step 0 is the base model.

The paper does not say how P is drawn; here, as in PEFT, it is from N(0, 1 / rank).
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
from lora_jax.adapters.delta import Shared, Site, Variant
from lora_jax.axes import GROUPS, RANK
from lora_jax.fields import Count, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.lora_xs import singular_factors

ARRAYS = {
  "lora_a": "batch in rank",
  "projection": "batch groups rank rank2",
  "lora_b": "batch rank2 out",
}
SHARED_ARRAYS = {"tiny_v": "groups"}


def tiny_lora_variant(num_parameters: int = 64, group: str = "") -> Variant:
  """Returns TinyLoRA with v of this length.

  Args:
    num_parameters: u, of all weights of the group together.
    group: a name; weights of different groups, in several `LoraRule`s, have different v.
  Raises:
    ValueError: if `num_parameters` is not a positive integer, or `group` has a slash.
  """
  sizes = _Sizes(read_value(Count, num_parameters, "num_parameters"))
  if "/" in read_value(str, group, "group"):
    raise ValueError(f"group must be a name without a slash, got {group!r}")
  return Variant(
    f"TinyLoRA of {num_parameters}" + (f", {group}" if group else ""),
    ARRAYS,
    _Start(sizes),
    weight,
    frozen=tuple(ARRAYS),
    sizes=sizes,
    shared=Shared(SHARED_ARRAYS, _StartShared(num_parameters)),
  )


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * A R B`, with R the sum of `v[i] P[i]`."""
  core = p.projection.sum_over(p.tiny_v, (GROUPS,))
  return w + scaling * (p.lora_a.sum_over(core, (RANK,)) @ p.lora_b)


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """The number of matrices P[i]; a value, so that configs are compared and pickled."""

  num_parameters: int

  def __call__(self, site: Site) -> Mapping[str, int]:
    return {"groups": self.num_parameters, "rank2": site.rank}


@dataclasses.dataclass(frozen=True)
class _Start:
  """A and B of the weight, and P ~ N(0, 1 / rank)."""

  sizes: _Sizes

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    a, b = singular_factors(site)
    shape = site.array_shape(ARRAYS["projection"], **self.sizes(site))
    return {
      "lora_a": a,
      "projection": jax.random.normal(key, shape) / math.sqrt(site.rank),
      "lora_b": b,
    }


@dataclasses.dataclass(frozen=True)
class _StartShared:
  """v = 0."""

  num_parameters: int

  def __call__(self, key: PRNGKeyArray, sites: Sequence[Site]) -> dict[str, jax.Array]:
    del key, sites
    return {"tiny_v": jnp.zeros(self.num_parameters)}


TINY_LORA = tiny_lora_variant()


def tiny_lora(
  fn: Callable[..., Any],
  config: LoraConfig,
  num_parameters: int = 64,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by TinyLoRA.

  It is `lora` with `variant=tiny_lora_variant(num_parameters)` in the config; see there for the
  arguments, the further arguments of `apply` and the errors. `init` needs real params. An optimizer
  of the bare trainable tree must not update the frozen arrays: use `lora_jax.freeze`.

  >>> fn = lambda params, x: x @ params["up"] @ params["down"]
  >>> params = {"up": jnp.eye(8, 6), "down": jnp.eye(6, 8)}
  >>> adapted = tiny_lora(fn, LoraConfig(rank=2, alpha=2.0, target=".*"), num_parameters=13)
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> trainable["lora_shared"]["TinyLoRA of 13"].tiny_v.shape
  (13,)
  """
  return adapt_by(tiny_lora_variant(num_parameters), fn, config, opaque)
