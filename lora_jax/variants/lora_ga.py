"""LoRA-GA (Wang et al. 2024, arXiv 2407.05000, sec. 3). With x a row vector, as in JAX:

    h = x (W - scaling * A0 B0) + scaling * x A B

A and B are initialized to A0 and B0, singular vectors of the gradient G = U S V^T of the loss with
respect to W, (in, out), so that the first step changes the weight as one of full fine-tuning does,
as nearly as rank 2 rank permits (theorem 3.1):

    A0 = c U[:, :rank],  B0 = c V^T[rank : 2 rank],  c = out^(1/4) / gamma^(1/2)

c keeps the scale of outputs and of their gradients (sec. 3.3). The equation, and why step 0 is the
base model to the bit, are PiSSA's: see `pissa`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array, PyTree

from lora_jax.adapters.collect import collect
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site
from lora_jax.fields import Count, Positive, read_value
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.from_data import Factors, check_no_variant, from_data
from lora_jax.variants.svd import as_factors, leading_svd, matrices

Direction = Literal["ArB2r", "A2rBr", "ArBr"]
"""The vectors of A, and of B: the first or the second `rank` ones, or every second one."""

LORA_GA = from_data("LoRA-GA", "lora_ga_config")
"""LoRA-GA for adapters that exist; `lora_ga_config` returns the variant that initializes one."""


def lora_ga_config(
  fn: Callable[..., Any],
  config: LoraConfig,
  params: PyTree,
  batches: Sequence[Any],
  *,
  direction: Direction = "ArB2r",
  gamma: float = 16.0,
  by_singular_values: bool = False,
  num_iterations: int = 4,
  weights_at_once: int | None = 1,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> LoraConfig:
  """Returns the config with LoRA-GA as its variant, whose start has A and B of each weight.

  >>> import jax.numpy as jnp, lora_jax
  >>> fn = lambda params, x: jnp.sum(x @ params["kernel"] @ jnp.diag(jnp.array([1.0, 2.0])))
  >>> params, x = {"kernel": jnp.ones((3, 2))}, jnp.array([[0, 1.0, 0]])
  >>> config = lora_ga_config(fn, LoraConfig(rank=1, alpha=1.0, target="kernel"), params, [x])
  >>> trainable = lora_jax.lora(fn, config).init(jax.random.key(0), params, x)
  >>> a = trainable["kernel"].lora_a[:, 0]  # the direction of x, of norm 2^(1/4) / 16^(1/2)
  >>> [abs(round(float(x), 4)) for x in a]
  [0.0, 0.2973, 0.0]

  Args:
    fn: the loss, `fn(params, batch)` returns a number; its mean over the batches counts.
    config: of LoRA, without a variant.
    params: the base model's.
    batches: the second arguments of `fn`, trees of arrays.
    direction: which of the first 2 rank singular vectors A and B get (sec. 3.2).
    gamma: of c, positive; the paper's 16.
    by_singular_values: initializes as PEFT 0.21: A without c, and B times the singular values.
    num_iterations: of the decomposition by subspace iteration, 1 or more.
    weights_at_once: the number of full gradients held at once, each time in a pass over all
      batches; None is all.
    opaque: as in `lora_jax.lora`.
  Raises:
    ValueError: if a setting is out of bounds, 2 rank exceeds a weight's smaller dimension, the
      config has a variant, or `collect` raises.
  """
  direction = read_value(Direction, direction, "direction")
  gamma = read_value(Positive, gamma, "gamma")
  by_singular_values = read_value(bool, by_singular_values, "by_singular_values")
  num_iterations = read_value(Count, num_iterations, "num_iterations")
  check_no_variant(config, "lora_ga_config")

  def factors(site: Site, gradient: Array) -> Factors:
    inputs, outputs = site.axes.counts(site.shape)
    rank = site.rank
    if 2 * rank > min(inputs, outputs):
      raise ValueError(
        f"{site.path}: LoRA-GA takes 2 * rank = {2 * rank} singular vectors of its gradient, "
        f"{inputs} inputs by {outputs} outputs. Lower the rank, or give LoraRule(pattern, rank=...)"
      )
    x = matrices(dataclasses.replace(site, leaf=gradient))
    u, values, v = leading_svd(jax.random.key(0), x, 2 * rank, num_iterations)
    first, second = {
      "ArB2r": (slice(rank), slice(rank, None)),
      "A2rBr": (slice(rank, None), slice(rank)),
      "ArBr": (slice(1, None, 2), slice(0, None, 2)),
    }[direction]
    c = outputs**0.25 / gamma**0.5
    a, b = u[..., first], c * v[..., second, :]
    if by_singular_values:
      return as_factors(site, a, values[..., second, None] * b)
    return as_factors(site, c * a, b)

  by_path = collect(
    fn,
    config,
    params,
    batches,
    "gradients",
    weights_at_once=weights_at_once,
    summarize=factors,
    opaque=opaque,
  )
  return dataclasses.replace(config, variant=from_data("LoRA-GA", "lora_ga_config", by_path))
