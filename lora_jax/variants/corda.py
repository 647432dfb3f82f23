"""CorDA (Yang et al. 2024, arXiv 2406.05223, sec. 3). With x a row vector, as in JAX:

    h = x (W - scaling * A0 B0) + scaling * x A B

A and B are initialized to A0 and B0, terms of a decomposition of W that the inputs of its layer
weigh. With C, (in, in), the mean of x^T x over tokens:

    C W = U S V^T,    A0 = C^-1 U sqrt(S / scaling),  B0 = sqrt(S / scaling) V^T

the first rank terms to learn a task (instruction-previewed mode: data of the task), the last ones
to keep knowledge (knowledge-preserved mode: data of the knowledge). C is divided by the mean of its
diagonal, so that with C = I it is PiSSA or MiLoRA. To invert it, 0.01 times that mean is added to
the diagonal, as in PEFT. The equation, and why step 0 is the base model to the bit, are PiSSA's:
see `pissa`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lora_jax.adapters.collect import InputMoments, collect
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site
from lora_jax.fields import read_value
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.from_data import Factors, check_no_variant, from_data
from lora_jax.variants.svd import balanced, matrices, some, svd

Mode = Literal["instruction_previewed", "knowledge_preserved"]
DAMPING = 0.01


CORDA = from_data("CorDA", "corda_config")
"""CorDA for adapters that exist; `corda_config` returns the variant that initializes one."""


def corda_config(
  fn: Callable[..., Any],
  config: LoraConfig,
  params: PyTree,
  batches: Sequence[Any],
  *,
  mode: Mode = "instruction_previewed",
  weights_at_once: int | None = None,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> LoraConfig:
  """Returns the config with CorDA as its variant, whose start has A and B of each weight.

  >>> import lora_jax
  >>> fn = lambda params, x: jnp.mean(jnp.square(x @ params["kernel"]))
  >>> params, x = {"kernel": jnp.eye(2)}, jnp.array([[1.0, 0.0], [0.0, 2.0]])
  >>> config = corda_config(fn, LoraConfig(rank=1, alpha=1.0, target="kernel"), params, [x])
  >>> node = lora_jax.lora(fn, config).init(jax.random.key(0), params, x)["kernel"]
  >>> [[round(float(x), 4) for x in row] for row in node.lora_a @ node.lora_b]
  [[0.0, 0.0], [0.0, 1.0]]

  Args:
    fn: `fn(params, batch)`, as a loss: the tokens that it depends on count, see
      `lora_jax.collect`.
    config: of LoRA, without a variant; alpha is positive.
    params: the base model's.
    batches: the second arguments of `fn`, trees of arrays.
    mode: which terms are trained.
    weights_at_once, opaque: as in `lora_jax.collect`.
  Raises:
    ValueError: if a setting is out of bounds, the config has a variant, or `collect` raises.
  """
  mode = read_value(Mode, mode, "mode")
  check_no_variant(config, "corda_config")

  def factors(site: Site, moments: InputMoments) -> Factors:
    c = _normalized(moments.second)
    with jax.default_matmul_precision("float32"):
      terms = svd(c @ matrices(site))
      which = slice(site.rank) if mode == "instruction_previewed" else slice(-site.rank, None)
      u, values, v = some(terms, which)
      return balanced(site, (jnp.linalg.solve(c, u), values, v))

  by_path = collect(
    fn,
    config,
    params,
    batches,
    "activations",
    weights_at_once=weights_at_once,
    summarize=factors,
    opaque=opaque,
  )
  return dataclasses.replace(config, variant=from_data("CorDA", "corda_config", by_path))


def _normalized(second: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
  """Returns moments whose diagonal has mean 1, plus the damping; the identity without tokens."""
  n = second.shape[-1]
  scale = jnp.trace(second, axis1=-2, axis2=-1)[..., None, None] / n
  eye = jnp.broadcast_to(jnp.eye(n), second.shape)
  return jnp.where(scale > 0, second / jnp.where(scale > 0, scale, 1), eye) + DAMPING * eye
