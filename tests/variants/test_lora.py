"""rsLoRA's scaling and LoRA+'s learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj

KEY = jax.random.key(0)


def fn(params, x):
  return x @ params["first"] @ params["second"]


PARAMS = {"first": jnp.eye(8), "second": jnp.ones((8, 8))}
X = jnp.ones((2, 8))


def test_rank_stabilized_divides_by_the_root_of_the_rank():
  rules = [lj.LoraRule("second", rank=4)]
  config = lj.LoraConfig(rank=2, alpha=3.0, target=".*", rules=rules)
  stable = lj.rank_stabilized(config)
  trainable = jax.tree.map(lambda x: jnp.ones_like(x), lj.lora(fn, config).init(KEY, PARAMS, X))
  merged = lj.lora(fn, stable).merge(PARAMS, trainable)
  for name, rank in (("first", 2), ("second", 4)):
    delta = merged[name] - PARAMS[name]
    np.testing.assert_allclose(delta, 3.0 / rank**0.5 * rank, rtol=1e-6)


@pytest.mark.parametrize("schedule", [False, True])
def test_lora_plus_trains_b_faster(schedule):
  config = lj.LoraConfig(rank=2, alpha=2.0, target="first", extra="second")
  trainable = lj.lora(fn, config).init(KEY, PARAMS, X)
  rate = optax.linear_schedule(0.1, 0.0, 10) if schedule else 0.1
  optimizer = lj.lora_plus(optax.sgd, rate, ratio=8.0)
  grads = jax.tree.map(jnp.ones_like, trainable)
  updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
  np.testing.assert_allclose(updates["first"].lora_a, -0.1, rtol=1e-6)
  np.testing.assert_allclose(updates["first"].lora_b, -0.8, rtol=1e-6)
  np.testing.assert_allclose(updates["second"], -0.1, rtol=1e-6)


def test_lora_plus_does_not_train_frozen_arrays():
  config = lj.LoraConfig(rank=2, alpha=2.0, target="first", variant=lj.DORA)
  trainable = lj.lora(fn, config).init(KEY, PARAMS, X)
  optimizer = lj.lora_plus(lambda rate: optax.adamw(rate, weight_decay=0.5), 0.1)
  grads = jax.tree.map(jnp.zeros_like, trainable)
  updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
  assert not bool(updates["first"].norm_squared.any())
  assert bool(updates["first"].magnitude.any())
