"""Partial fine-tuning: the leaves it trains, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

PARAMS = {"body": jnp.eye(3), "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
X = jnp.arange(6.0).reshape(2, 3)


def fn(params, x):
  return x @ params["body"] @ params["head"]["kernel"] + params["head"]["bias"][None]


def test_it_trains_copies_of_what_matches():
  method = lj.partial_finetuning(fn, "head/.*")
  trainable = method.init(jax.random.key(0), PARAMS, X)
  assert jax.tree.map(jnp.shape, trainable) == {"head": {"kernel": (3, 2), "bias": (2,)}}
  assert trainable["head"]["kernel"] is not PARAMS["head"]["kernel"]
  np.testing.assert_array_equal(method.apply(PARAMS, trainable, X), fn(PARAMS, X))
  changed = jax.tree.map(lambda x: x + 1, trainable)
  merged = method.merge(PARAMS, changed)
  assert merged["body"] is PARAMS["body"]
  np.testing.assert_array_equal(
    method.apply(PARAMS, changed, X, lora_key=jax.random.key(1)), fn(merged, X)
  )
  assert np.any(fn(merged, X) != fn(PARAMS, X))


def test_gradients_are_those_of_the_leaves():
  method = lj.partial_finetuning(fn, ["head/bias"])
  trainable = method.init(jax.random.key(0), PARAMS, X)
  grads = jax.grad(lambda t: method.apply(PARAMS, t, X).sum())(trainable)
  assert jax.tree.map(lambda g: g.tolist(), grads) == {"head": {"bias": [2.0, 2.0]}}


def test_bad_patterns_and_trees_are_named():
  with pytest.raises(ValueError, match="train 'heads' matches none of the 3 leaves"):
    lj.partial_finetuning(fn, "heads").init(jax.random.key(0), PARAMS, X)
  method = lj.partial_finetuning(fn, "head/.*")
  with pytest.raises(ValueError, match="missing: head/bias"):
    method.merge(PARAMS, {"head": {"kernel": jnp.ones((3, 2))}})
  with pytest.raises(ValueError, match="mis-shaped: head/bias is"):
    method.merge(PARAMS, {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}})
  shapes = jax.eval_shape(lambda: PARAMS)
  with pytest.raises(ValueError, match=r"head/bias is copied by init and needs a real array"):
    method.init(jax.random.key(0), shapes, X)
