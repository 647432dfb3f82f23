"""PiSSA (Meng et al. 2024, arXiv 2404.02948, sec. 3). With x a row vector, as in JAX:

    h = x W_res + scaling * x A B          W_res = W - scaling * A0 B0

A and B are initialized to A0 and B0, the first terms of W's singular value decomposition U S V^T:

    A0 = U sqrt(S / scaling),  B0 = sqrt(S / scaling) V^T          the first rank terms

so that the trained part of the weight is its principal part, and step 0 is the base model. The
paper has scaling 1 (alpha = rank).

W_res is never made: W is unchanged, and A0 and B0 are held in the adapter, frozen. The update of W
is computed from their differences, which are small, and 0 at step 0, to the bit:

    h = x W + scaling * x (A B - A0 B0) = x W + scaling * x [A - A0, A0] [B; B - B0]

It is a LoRA of rank 2 rank: `lora_jax.to_lora` returns that. LoRA dropout is applied to its input.
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
from lora_jax.fields import Count, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.lora import ARRAYS as LORA_ARRAYS
from lora_jax.variants.svd import balanced, leading_svd, matrices, some, svd

ARRAYS = LORA_ARRAYS | {"initial_a": "batch in rank", "initial_b": "batch rank out"}
FROZEN = ("initial_a", "initial_b")


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * (A B - A0 B0)`, one term; also OLoRA's and MiLoRA's weight."""
  a = (p.lora_a - p.initial_a).beside(p.initial_a)
  b = p.lora_b.beside(p.lora_b - p.initial_b)
  return w + scaling * (a @ b)


def initialized_to(a: Float[Array, "*a"], b: Float[Array, "*b"]) -> dict[str, jax.Array]:
  """Returns the arrays at step 0."""
  return {"lora_a": a, "lora_b": b, "initial_a": a, "initial_b": b}


@dataclasses.dataclass(frozen=True)
class _Start:
  """The first terms of the decomposition; a value, so that configs are compared and pickled."""

  num_iterations: int | None

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    x, rank = matrices(site), site.rank
    if self.num_iterations is None:
      terms = some(svd(x), slice(rank))
    else:
      terms = leading_svd(key, x, rank, self.num_iterations)
    return initialized_to(*balanced(site, terms))


def pissa_variant(num_iterations: int | None = None) -> Variant:
  """Returns PiSSA.

  Args:
    num_iterations: of subspace iteration, in place of the whole decomposition, for large weights
      (the paper's fast SVD, appendix B; PEFT's `pissa_niter_N`). None is the whole decomposition.
  Raises:
    ValueError: if `num_iterations` is not a positive integer or None.
  """
  count = read_value(Count | None, num_iterations, "num_iterations")
  name = "PiSSA" if count is None else f"PiSSA by {count} subspace iterations"
  return Variant(name, ARRAYS, _Start(count), weight, FROZEN)


PISSA = pissa_variant()


def pissa(
  fn: Callable[..., Any],
  config: LoraConfig,
  num_iterations: int | None = None,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by PiSSA.

  It is `lora` with `variant=pissa_variant(num_iterations)` in the config; see there for the
  arguments, the further arguments of `apply` and the errors. `init` needs real params.

  >>> import jax.numpy as jnp
  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 7.0))}
  >>> adapted = pissa(fn, LoraConfig(rank=2, alpha=2.0, target="kernel"))
  >>> node = adapted.init(jax.random.key(0), params, jnp.ones((3, 6)))["kernel"]
  >>> [round(float(x), 4) for x in jnp.diag(node.lora_a @ node.lora_b)]
  [0.0, 0.0, 0.0, 0.0, 5.0, 6.0]
  """
  return adapt_by(pissa_variant(num_iterations), fn, config, opaque)
