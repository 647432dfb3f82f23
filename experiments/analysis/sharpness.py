"""Sharpness: the largest eigenvalue of the loss's Hessian in the trained parameters.

The loss is the mean over the first training batches. Where B = 0, as at LoRA's start, the Hessian
has a special structure: with G = dL/dW and W + scaling * A B,

    H = [ 0    C   ]   over A      C couples A with B by scaling * G
        [ C^T  D   ]   over B      D is scaling^2 A^T (d^2 L / dW^2) A

so the trained parameters do not curve the loss along A at all. `shares` tells how much of the
eigenvector's squared norm is in which arrays.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from experiments.analysis.records import Planned
from experiments.analysis.training import Started, start_training, train
from experiments.comparison import plan
from experiments.configs import Config
from experiments.configs.mechanism import SEED, Sizes
from experiments.harness.config import read_config
from experiments.harness.launch import RATE, apply
from experiments.harness.methods import find_method
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import load_data
from lora_jax.metrics.curvature import hessian_product, largest_eigenvalue
from lora_jax.training.mesh import place_batch
from lora_jax.trees import combine, leaves_with_path

WARMUP_STEPS = 3  # before the second measurement


def plan_sharpness(sizes: Sizes, arms: Sequence[str]) -> list[Planned]:
  """Returns one measurement of each arm; those trained in cycles start as LoRA does."""
  settings = {
    "num_batches": sizes.num_batches,
    "num_steps": sizes.num_steps,
    "max_products": sizes.max_products,
    "examples": sizes.comparison.rate_lines,
  }
  return [
    Planned("sharpness", arm, {RATE: plan.default_rate(arm, "embedded"), **settings})
    for arm in arms
    if find_method(plan.ARMS[arm].method).num_cycles == 1
  ]


def measure_sharpness(planned: Planned, sizes: Sizes) -> dict[str, Any]:
  """Returns the sharpness of an arm at its start and after some steps.

  Returns:
    `parameters`; `start` and `later`, each with `loss`, `sharpness` and its `residual`, in nats per
    token and squared unit of the parameters, `products`, and `shares`.
  """
  with tempfile.TemporaryDirectory() as workdir:
    settings = read_config(E2EConfig, _config(planned, sizes, workdir))
    mesh = settings.mesh.make()
    base = load_base(settings, mesh)
    batches = load_data(settings, base).train
    run = start_training(settings, base, batches, mesh)
  count = min(sizes.num_batches, len(batches))
  first = [place_batch(mesh, batches[i]) for i in range(count)]
  sharpness = make_sharpness(run, first, sizes)
  size, start = run.size, sharpness(run.state.part)
  state = train(run, batches, min(sizes.num_steps, len(batches)))
  return {"parameters": size, "start": start, "later": sharpness(state.part)}


def _config(planned: Planned, sizes: Sizes, workdir: str) -> Config:
  fields = {
    RATE: planned.settings[RATE],
    "seed": SEED,
    "data.num_train_records": planned.settings["examples"],
    "optimizer.warmup_share": 0.0,
    "optimizer.warmup_steps": WARMUP_STEPS,
  }
  changes = plan.changes_of(planned.arm, "embedded", fields)
  config = plan.config_of(plan.Planned("rates", planned.arm, changes), sizes.comparison, workdir)
  return apply(config, {"model.attention": "xla"})  # compact has no forward-mode derivative


def make_sharpness(
  run: Started, batches: Sequence[PyTree], sizes: Sizes
) -> Callable[[PyTree], dict[str, Any]]:
  """Returns a function from the trained part of the combined tree to its sharpness.

  It is compiled once, for all states of a training.
  """
  _, unravel = ravel_pytree(run.state.part)
  weight = sum(float(batch["target_weights"].sum()) for batch in batches)

  def total(x: jax.Array, frozen: PyTree, batch: PyTree) -> jax.Array:
    tree = combine(unravel(x), frozen)
    return run.loss.apply(tree["base"], tree["adapter"], batch, lora_key=None).total

  losses = jax.jit(total)
  products = jax.jit(lambda x, v, frozen, batch: hessian_product(total, x, v, frozen, batch))

  def sharpness(part: PyTree) -> dict[str, Any]:
    x, _ = ravel_pytree(part)

    def product(v: np.ndarray) -> np.ndarray:
      parts = [products(x, jnp.asarray(v), run.frozen, batch) for batch in batches]
      return np.asarray(sum(parts)) / np.float32(weight)

    start = np.random.default_rng(SEED).standard_normal(x.size, np.float32)
    pair = largest_eigenvalue(
      product, start, tolerance=sizes.tolerance, max_products=sizes.max_products
    )
    shares: dict[str, float] = defaultdict(float)
    for path, leaf in leaves_with_path(unravel(jnp.asarray(pair.vector) ** 2)):
      shares[path.rpartition("/")[2]] += float(leaf.sum())
    return {
      "loss": sum(float(losses(x, run.frozen, batch)) for batch in batches) / weight,
      "sharpness": pair.value,
      "residual": pair.residual,
      "products": pair.num_products,
      "shares": {name: round(share, 4) for name, share in shares.items()},
    }

  return sharpness
