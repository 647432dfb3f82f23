"""TinyLoRA: the paper's formula, one trained vector, and groups of weights with their own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

from tests.toy_models import mlp, mlp_example, relative_difference

KEY = jax.random.key(0)
NAME = "TinyLoRA of 4"
CONFIG = lj.LoraConfig(rank=2, alpha=6.0, target=".*", variant=lj.tiny_lora_variant(4))
SHAPES = {"up": (5, 8), "down": (8, 6)}


def test_outputs_and_gradient_are_the_papers():
  params, x = mlp_example(SHAPES)
  adapted = lj.tiny_lora(mlp, dataclasses.replace(CONFIG, variant=None), num_parameters=4)
  start = adapted.init(KEY, params, x)
  np.testing.assert_array_equal(adapted.apply(params, start, x), mlp(params, x))

  def paper(v):
    merged = {}
    for name, w in params.items():
      u, s, vt = np.linalg.svd(np.asarray(w, np.float64))
      node = start[name]
      sign = np.sign(node.lora_b @ vt[:2].T) * np.eye(2)  # of the singular vectors
      core = sum(v[i] * node.projection[i] for i in range(4))
      merged[name] = w + 3.0 * (u[:, :2] * s[:2]) @ sign @ core @ sign @ vt[:2]
    return jnp.sum(mlp(merged, x) ** 2)

  def loss(v):
    shared = {NAME: start["lora_shared"][NAME].replace(tiny_v=v)}
    return jnp.sum(adapted.apply(params, start | {"lora_shared": shared}, x) ** 2)

  v = jnp.asarray([0.3, -0.2, 0.5, 0.1])
  got, expected = (jax.value_and_grad(f)(v) for f in (loss, paper))
  assert relative_difference(got, expected) < 1e-5
  shared = {NAME: start["lora_shared"][NAME].replace(tiny_v=v)}
  config, plain = lj.to_lora(CONFIG, start | {"lora_shared": shared}, params)
  assert plain["up"].rank == 2
  merged = lj.lora(mlp, config).merge(params, plain)
  assert relative_difference(jnp.sum(mlp(merged, x) ** 2), got[0]) < 1e-5


def test_groups_have_vectors_of_their_own():
  params, x = mlp_example(SHAPES)
  rules = [lj.LoraRule("down", variant=lj.tiny_lora_variant(3, "feedforward"))]
  adapted = lj.lora(mlp, dataclasses.replace(CONFIG, rules=rules))
  trainable = adapted.init(KEY, params, x)
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  trained, _ = lj.partition(trainable, mask)
  assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(3,), (4,)]
  assert {*trainable["lora_shared"]} == {NAME, "TinyLoRA of 3, feedforward"}
  grads = jax.grad(lambda t: jnp.sum(adapted.apply(params, t, x) ** 2))(trainable)
  assert all(jnp.abs(leaf).min() > 0 for leaf in jax.tree.leaves(grads["lora_shared"]))


def test_the_matrices_are_drawn_for_each_layer_of_a_stack():
  params, x = {"w": jnp.stack([jnp.eye(8)] * 2)}, jnp.ones((3, 8))

  def fn(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

  config = lj.LoraConfig(8, 8.0, "w", variant=lj.tiny_lora_variant(50))
  node = lj.lora(fn, config).init(KEY, params, x)["w"]
  assert node.projection.shape == (2, 50, 8, 8)
  assert float(node.projection.std()) == pytest.approx(1 / math.sqrt(8), rel=0.05)


def test_variants_are_values():
  assert lj.tiny_lora_variant(4) == CONFIG.variant != lj.TINY_LORA
  with pytest.raises(ValueError, match="num_parameters"):
    lj.tiny_lora_variant(0)
  with pytest.raises(ValueError, match="group must be a name without a slash, got 'a/b'"):
    lj.tiny_lora_variant(4, "a/b")
