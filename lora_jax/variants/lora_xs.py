"""LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604, sec. 3). With x a row vector, as in JAX:

    h = x W + scaling * x A R B

A and B are frozen, the first terms of W's singular value decomposition U S V^T:

    A = U S, (in, rank),  B = V^T, (rank, out)          the first rank terms

R, (rank, rank), is trained: rank^2 parameters for each weight, whatever its size. The paper draws R
from N(0, 1e-5^2), so that step 0 is nearly the base model; with `stddev=0` it is, to the bit.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.axes import RANK
from lora_jax.fields import NonNegative, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.svd import as_factors, matrices, some, svd

ARRAYS = {"lora_a": "batch in rank", "lora_r": "batch rank rank2", "lora_b": "batch rank2 out"}


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * A R B` (eq. 2)."""
  return w + scaling * (p.lora_a.sum_over(p.lora_r, (RANK,)) @ p.lora_b)


def sizes(site: Site) -> Mapping[str, int]:
  """Returns the size of R's second axis, which is its first's."""
  return {"rank2": site.rank}


def singular_factors(site: Site) -> tuple[Float[Array, "*a"], Float[Array, "*b"]]:
  """Returns A = U S and B = V^T of the first rank terms of W's decomposition U S V^T."""
  u, values, v = some(svd(matrices(site)), slice(site.rank))
  return as_factors(site, u * values[..., None, :], v)


@dataclasses.dataclass(frozen=True)
class _Start:
  """A and B of the weight, and R ~ N(0, stddev^2); a value, so that configs are compared."""

  stddev: float

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    a, b = singular_factors(site)
    shape = site.array_shape(ARRAYS["lora_r"], **sizes(site))
    return {"lora_a": a, "lora_r": self.stddev * jax.random.normal(key, shape), "lora_b": b}


def lora_xs_variant(stddev: float = 1e-5) -> Variant:
  """Returns LoRA-XS with R drawn from N(0, stddev^2).

  Raises:
    ValueError: if `stddev` is negative.
  """
  value = read_value(NonNegative, stddev, "stddev")
  name = "LoRA-XS" if value == 1e-5 else f"LoRA-XS of stddev {value:g}"
  return Variant(name, ARRAYS, _Start(value), weight, ("lora_a", "lora_b"), sizes)


LORA_XS = lora_xs_variant()


def lora_xs(
  fn: Callable[..., Any],
  config: LoraConfig,
  stddev: float = 1e-5,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by LoRA-XS.

  It is `lora` with `variant=lora_xs_variant(stddev)` in the config; see there for the arguments,
  the further arguments of `apply` and the errors. `init` needs real params.

  >>> import jax.numpy as jnp
  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 7.0))}
  >>> adapted = lora_xs(fn, LoraConfig(rank=2, alpha=2.0, target="kernel"))
  >>> node = adapted.init(jax.random.key(0), params, jnp.ones((3, 6)))["kernel"]
  >>> node.lora_r.shape
  (2, 2)
  """
  return adapt_by(lora_xs_variant(stddev), fn, config, opaque)
