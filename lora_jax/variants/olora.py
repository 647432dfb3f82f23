"""OLoRA (Büyükakyüz 2024, arXiv 2406.01775, sec. 3). With x a row vector, as in JAX:

    h = x (W - scaling * A0 B0) + scaling * x A B

A and B are initialized to A0 and B0, parts of a QR decomposition. The paper decomposes the weight
of y = M x, which is W^T:

    W^T = Q R,  A0 = R[:rank]^T,  B0 = Q[:, :rank]^T

so that B0's rows are orthonormal, and scaling * A0 B0 is subtracted, whatever the scaling. The
equation, and why step 0 is the base model to the bit, are PiSSA's: see `pissa`.
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
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.pissa import ARRAYS, FROZEN, initialized_to, weight
from lora_jax.variants.svd import as_factors, matrices


def start(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """Returns the first rows of R and columns of Q, transposed; needs real params."""
  del key
  q, r = jax.jit(jnp.linalg.qr)(matrices(site).mT)
  return initialized_to(*as_factors(site, r[..., : site.rank, :].mT, q[..., : site.rank].mT))


OLORA = Variant("OLoRA", ARRAYS, start, weight, FROZEN)


def olora(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by OLoRA, as `lora` does with `variant=OLORA`.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`. `init` needs real params.

  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jax.random.normal(jax.random.key(1), (8, 6))}
  >>> adapted = olora(fn, LoraConfig(rank=2, alpha=2.0, target="kernel"))
  >>> b = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))["kernel"].lora_b
  >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-6))
  True
  """
  return adapt_by(OLORA, fn, config, opaque)
