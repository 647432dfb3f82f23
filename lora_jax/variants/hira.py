"""HiRA (Huang et al. 2025, Parameter-Efficient Hadamard High-Rank Adaptation, ICLR):

    h = x (W + scaling * W * (A B))          * is elementwise

A, (in, rank), and B, (rank, out), are LoRA's. The rank of the update is up to rank(W) * rank: it
has no low-rank factors and is materialized. Each layer computes it from A, B and W in the forward
and again in the backward pass, and keeps none of it. B is initialized to 0, so that step 0 is the
base model.

Dropout has no branch to act on and is refused. PEFT has no scaling: alpha = rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Variant
from lora_jax.axes import RANK
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.lora import ARRAYS, start


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * W * (A B)`."""
  return w.formed(modulated, scaling, p.lora_a, p.lora_b, dims=range(w.ndim))


def modulated(w: Factor, a: Factor, b: Factor) -> Factor:
  """Returns `W * (A B)`."""
  return w * a.sum_over(b, (RANK,))


HIRA = Variant("HiRA", ARRAYS, start, weight)


def hira(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by HiRA, as `lora` does with `variant=HIRA` in the config.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`.

  >>> import jax, jax.numpy as jnp
  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.ones((8, 6))}
  >>> adapted = hira(fn, LoraConfig(rank=2, alpha=2.0, target="kernel"))
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> trainable["kernel"].lora_b.shape
  (2, 6)
  """
  return adapt_by(HIRA, fn, config, opaque)
