"""DoRA (Liu et al. 2024, arXiv 2402.09353, sec. 4.1-4.3). With x a row vector, as in JAX:

    V = W + scaling * A B
    h = x V * (m / |V|)                |V| = the norm of V over its inputs, one for each output

m, (out,), the magnitude, is trained with A and B. It is initialized to |W|, so that step 0 is the
base model, to the bit. |V| is a constant for gradients (sec. 4.3), computed from the factors:

    |V|^2 = |W|^2 + 2 scaling sum_in(W * A B) + scaling^2 sum_in((A B)^2)
          = |W|^2 + 2 scaling sum_rank((A^T W) * B) + scaling^2 sum_rank(B * (A^T A) B)

|W|^2 is computed once and kept in the adapter, frozen: `norm_squared`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.axes import RANK, RANK2, LoraAxes
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.lora import ARRAYS as LORA_ARRAYS
from lora_jax.variants.lora import start as lora_start
from lora_jax.variants.lora import weight as lora_weight

ARRAYS = LORA_ARRAYS | {"magnitude": "batch out", "norm_squared": "batch out"}


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `(W + scaling * A B) * (m / |W + scaling * A B|)` (eq. 5).

  Where |V| is 0, V is returned unchanged: an output whose weights are all zero.
  """
  v = lora_weight(w, p, scaling)
  squared = norm_squared(p, scaling)
  is_zero = squared <= 0
  # Without the barrier XLA turns m / sqrt(x) into m * rsqrt(x), which is not 1 at step 0.
  norm = lax.optimization_barrier(jnp.sqrt(jnp.where(is_zero, 1.0, squared)))
  gain = jnp.where(is_zero, 1.0, p.magnitude.array / norm)
  return v * Factor(gain, p.magnitude.labels)


def norm_squared(p: Any, scaling: Any) -> jax.Array:
  """Returns |V|^2, (batch..., out...), a constant for gradients."""
  a, b, axes = p.lora_a, p.lora_b, p.axes
  cross = p.sum_with_weight(a, axes.inputs).sum_over(b, (RANK,))
  gram = a.sum_over(a.relabel({RANK: RANK2}), axes.inputs)
  square = gram.sum_over(b, (RANK,)).sum_over(b.relabel({RANK: RANK2}), (RANK2,))
  start, labels = p.norm_squared.array, p.norm_squared.labels
  added = 2 * scaling * cross.along(labels) + scaling**2 * square.along(labels)
  return lax.stop_gradient(start + added.astype(start.dtype))


def start(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """Returns the initial A and B of LoRA, the magnitude |W|, and |W|^2; needs real params."""
  squared = column_norm_squared(site.weight, site.axes)
  return lora_start(key, site) | {"magnitude": jnp.sqrt(squared), "norm_squared": squared}


@functools.partial(jax.jit, static_argnames="axes")
def column_norm_squared(w: jax.Array, axes: LoraAxes) -> jax.Array:
  """Returns |W|^2 over the inputs, (batch..., out...), float32."""
  total = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=axes.inputs)
  kept = sorted((*axes.batch, *axes.outputs))
  return lax.transpose(total, [kept.index(dim) for dim in (*axes.batch, *axes.outputs)])


DORA = Variant("DoRA", ARRAYS, start, weight, frozen=("norm_squared",))


def dora(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by DoRA, as `lora` does with `variant=DORA` in the config.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`. An optimizer of the bare trainable tree must not update
  `norm_squared`: use `lora_jax.freeze` with the mask
  `lora_jax.trainable_mask({"base": None, "adapter": trainable})["adapter"]`.

  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.ones((8, 6))}
  >>> adapted = dora(fn, LoraConfig(rank=2, alpha=4.0, target="kernel"))
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> trainable["kernel"].magnitude.shape
  (6,)
  >>> bool((adapted.apply(params, trainable, jnp.ones((3, 8))) == 8.0).all())
  True
  """
  return adapt_by(DORA, fn, config, opaque)
