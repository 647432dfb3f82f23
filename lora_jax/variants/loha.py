"""LoHa (Hyeon-Woo et al. 2022, FedPara, arXiv 2108.06098, prop. 1). With x a row vector:

    h = x W + scaling * x [(A1 B1) * (A2 B2)]          * is elementwise

A1 and A2 are (in, rank), B1 and B2 (rank, out). The rank of the update is up to rank**2. It is the
matmul of two factors of that rank, which are computed from the arrays and are not of W's size:

    [(A1 B1) * (A2 B2)][i, o] = sum over q, r of (A1[i, q] A2[i, r]) (B1[q, o] B2[r, o])

A2 is initialized to 0, so that step 0 is the base model, and the others as in PEFT: uniform up to
1 / sqrt(in) for A1, up to 1 / sqrt(rank) for B1 and B2. The config's `init` is not used. LoRA
dropout is applied to the layer's input; PEFT drops rows of the update, or all of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.transform.factored import Factored
from lora_jax.transform.interpreter import OpaqueRule

ARRAYS = {
  "a1": "batch in rank",
  "b1": "batch rank out",
  "a2": "batch in rank2",
  "b2": "batch rank2 out",
}


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * (A1 B1) * (A2 B2)`."""
  return w + scaling * ((p.a1 * p.a2) @ (p.b1 * p.b2))


def start(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """Returns A2 = 0 and the others uniform."""
  bounds = {"a1": site.num_inputs**-0.5, "b1": site.rank**-0.5, "b2": site.rank**-0.5}
  arrays = uniform(key, site, {name: ARRAYS[name] for name in bounds}, bounds, sizes(site))
  return arrays | {"a2": jnp.zeros(site.array_shape(ARRAYS["a2"], **sizes(site)))}


def uniform(
  key: PRNGKeyArray,
  site: Site,
  arrays: Mapping[str, str],
  bounds: Mapping[str, float],
  sizes: Mapping[str, int],
) -> dict[str, jax.Array]:
  """Returns arrays of these axes, uniform in [-bound, bound)."""
  keys = jax.random.split(key, len(arrays))
  return {
    name: jax.random.uniform(
      k, site.array_shape(words, **sizes), jnp.float32, -bounds[name], bounds[name]
    )
    for k, (name, words) in zip(keys, arrays.items(), strict=True)
  }


def sizes(site: Site) -> Mapping[str, int]:
  return {"rank2": site.rank}


LOHA = Variant("LoHa", ARRAYS, start, weight, sizes=sizes)


def loha(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by LoHa, as `lora` does with `variant=LOHA` in the config.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`.

  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.ones((8, 6))}
  >>> adapted = loha(fn, LoraConfig(rank=2, alpha=2.0, target="kernel"))
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> trainable["kernel"].b2.shape
  (2, 6)
  """
  return adapt_by(LOHA, fn, config, opaque)
