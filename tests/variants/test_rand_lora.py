"""RandLoRA: the paper's formula along the smaller side, full rank, and frozen bases."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

from tests.toy_models import mlp, mlp_example, randomized, relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=2, alpha=6.0, target=".*", variant=lj.RAND_LORA)
SHAPES = {"up": (5, 8), "down": (8, 6)}  # the smaller side is that of the inputs, of the outputs
BASES = {"up": 3, "down": 3}


def sums(trainable):
  """Returns D of each weight, base by base."""
  shared = trainable["lora_shared"]["RandLoRA"]
  deltas = {}
  for name, (inputs, outputs) in SHAPES.items():
    node, small, large = trainable[name], min(inputs, outputs), max(inputs, outputs)
    delta = jnp.zeros((small, large))
    for lam, gamma, b in zip(node.rand_lambda, node.rand_gamma, shared.rand_b, strict=True):
      delta += jnp.diag(gamma) @ shared.rand_a[:small] @ jnp.diag(lam) @ b[:, :large]
    deltas[name] = delta if inputs <= outputs else delta.T
  return deltas


def test_outputs_gradients_and_merged_weights_are_the_papers():
  params, x = mlp_example(SHAPES)
  adapted = lj.rand_lora(mlp, dataclasses.replace(CONFIG, variant=None))
  trainable = randomized(adapted.init(KEY, params, x))

  def paper(part):
    deltas = sums(trainable | part)
    return jnp.sum(mlp({n: w + 3.0 * deltas[n] for n, w in params.items()}, x) ** 2)

  def loss(part):
    return jnp.sum(adapted.apply(params, trainable | part, x) ** 2)

  part = {name: trainable[name] for name in SHAPES}
  got, expected = (jax.jit(jax.value_and_grad(f))(part) for f in (loss, paper))
  assert relative_difference(got, expected) < 1e-5
  merged = adapted.merge(params, trainable)
  assert relative_difference(jnp.sum(mlp(merged, x) ** 2), got[0]) < 1e-5


def test_the_update_has_full_rank_and_few_parameters():
  params, x = mlp_example(SHAPES)
  trainable = randomized(lj.lora(mlp, CONFIG).init(KEY, params, x))
  for name, delta in sums(trainable).items():
    small = min(SHAPES[name])
    assert np.linalg.matrix_rank(delta) == small
    assert sum(a.size for a in trainable[name].arrays.values()) == BASES[name] * (small + 2)


def test_the_initial_values():
  params, x = {"up": jnp.ones((40, 100)), "down": jnp.ones((100, 30))}, jnp.ones((1, 40))
  adapted = lj.lora(mlp, dataclasses.replace(CONFIG, rank=8))
  trainable = adapted.init(KEY, params, x)
  assert {*np.unique(trainable["down"].rand_gamma)} == {np.float32(1 / 30)}
  assert not trainable["down"].rand_lambda.any()
  shared = trainable["lora_shared"]["RandLoRA"].arrays
  assert {n: a.shape for n, a in shared.items()} == {"rand_a": (40, 8), "rand_b": (5, 8, 100)}
  for array in shared.values():
    assert float(jnp.abs(array).max()) <= math.sqrt(3)
    assert float(array.std()) == pytest.approx(1.0, rel=0.1)
  np.testing.assert_array_equal(adapted.apply(params, trainable, x), mlp(params, x))
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  assert mask["up"].arrays == {"rand_lambda": True, "rand_gamma": True}
  assert mask["lora_shared"]["RandLoRA"].arrays == {"rand_a": False, "rand_b": False}


def test_dropout_and_plain_lora_are_refused():
  params, x = mlp_example(SHAPES)
  adapted = lj.lora(mlp, dataclasses.replace(CONFIG, dropout=0.1))
  trainable = lj.lora(mlp, CONFIG).init(KEY, params, x)
  with pytest.raises(ValueError, match="RandLoRA has none that is trained"):
    adapted.apply(params, trainable, x, lora_key=KEY)
  with pytest.raises(ValueError, match="RandLoRA changes the weight by more"):
    lj.to_lora(CONFIG, trainable, params)
