"""MiLoRA (Wang et al. 2024, arXiv 2406.09044, sec. 3). With x a row vector, as in JAX:

    h = x (W - scaling * A0 B0) + scaling * x A B

A and B are initialized to A0 and B0, the last terms of W's singular value decomposition U S V^T:

    A0 = U sqrt(S / scaling),  B0 = sqrt(S / scaling) V^T          the last rank terms

so that W's principal part is kept and its minor part trained. The paper has scaling 1 (alpha =
rank). The equation, and why step 0 is the base model to the bit, are PiSSA's: see `pissa`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.pissa import ARRAYS, FROZEN, initialized_to, weight
from lora_jax.variants.svd import balanced, matrices, some, svd


def start(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """Returns the last terms of the weight's decomposition; needs real params."""
  del key
  return initialized_to(*balanced(site, some(svd(matrices(site)), slice(-site.rank, None))))


MILORA = Variant("MiLoRA", ARRAYS, start, weight, FROZEN)


def milora(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by MiLoRA, as `lora` does with `variant=MILORA`.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`. `init` needs real params.

  >>> import jax.numpy as jnp
  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 7.0))}
  >>> adapted = milora(fn, LoraConfig(rank=2, alpha=2.0, target="kernel"))
  >>> node = adapted.init(jax.random.key(0), params, jnp.ones((3, 6)))["kernel"]
  >>> [round(float(x), 4) for x in jnp.diag(node.lora_a @ node.lora_b)]
  [1.0, 2.0, 0.0, 0.0, 0.0, 0.0]
  """
  return adapt_by(MILORA, fn, config, opaque)
