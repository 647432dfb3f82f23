"""LoHa: the formula, its gradients and rank, and the sizes of its arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

from tests.toy_models import randomized, relative_difference
from tests.variants.test_hira import dense, example

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=2, alpha=6.0, target="w")


def test_output_and_gradients_are_the_papers():
  params, x = example()
  adapted = lj.loha(dense, CONFIG)
  trainable = randomized(adapted.init(KEY, params, x))

  def paper(trainable):
    node = trainable["w"]
    delta = (node.a1 @ node.b1) * (node.a2 @ node.b2)
    return jnp.sum(dense({"w": params["w"] + 3.0 * delta}, x) ** 2)

  def loss(trainable):
    return jnp.sum(adapted.apply(params, trainable, x) ** 2)

  got, expected = (jax.jit(jax.grad(f))(trainable) for f in (loss, paper))
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert relative_difference(one, other) < 1e-5
  delta = np.asarray(adapted.merge(params, trainable)["w"] - params["w"], np.float64)
  assert np.linalg.matrix_rank(delta, tol=1e-4) == 2**2


def test_sizes_and_initial_values():
  """2 rank (in + out) parameters: twice LoRA's."""
  params = {"w": jnp.ones((400, 300))}
  config = dataclasses.replace(CONFIG, rank=16)
  node = lj.loha(dense, config).init(KEY, params, jnp.ones((1, 400)))["w"]
  assert sum(x.size for x in node.arrays.values()) == 2 * 16 * (400 + 300)
  bounds = {"a1": 400**-0.5, "b1": 0.25, "a2": 0.0, "b2": 0.25}
  for name, bound in bounds.items():
    assert float(jnp.abs(node.arrays[name]).max()) == pytest.approx(bound, rel=0.02)


def test_a_config_of_another_variant():
  with pytest.raises(ValueError, match="LoHa got a config of another variant, HiRA"):
    lj.loha(dense, dataclasses.replace(CONFIG, variant=lj.HIRA))
