"""HiRA: the formula, its gradients, and the sizes of its arrays."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

from tests.toy_models import make_params, randomized, relative_difference, tokens, unrolled

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=2, alpha=6.0, target="w", variant=lj.HIRA)


def dense(params, x):
  return jnp.tanh(x @ params["w"])


def example():
  draw = np.random.default_rng(0).standard_normal
  return {"w": jnp.asarray(draw((8, 6)), jnp.float32)}, jnp.asarray(draw((5, 8)), jnp.float32)


def test_output_and_gradients_are_the_papers():
  """The gradient of A is that of LoRA's with dW * W in place of dW: dA = scaling (dW * W) B^T."""
  params, x = example()
  adapted = lj.hira(dense, dataclasses.replace(CONFIG, variant=None))
  trainable = randomized(adapted.init(KEY, params, x))
  w, node, scaling = params["w"], trainable["w"], 3.0
  whole = w + scaling * w * (node.lora_a @ node.lora_b)
  out, pull_back = jax.vjp(lambda w: jnp.sum(dense({"w": w}, x) ** 2), whole)
  (d_w,) = pull_back(jnp.ones_like(out))
  value_and_grad = jax.value_and_grad(lambda t: jnp.sum(adapted.apply(params, t, x) ** 2))
  loss, got = jax.jit(value_and_grad)(trainable)
  assert relative_difference(loss, out) < 1e-5
  assert relative_difference(got["w"].lora_a, scaling * (d_w * w) @ node.lora_b.T) < 1e-5
  assert relative_difference(got["w"].lora_b, scaling * node.lora_a.T @ (d_w * w)) < 1e-5
  assert relative_difference(adapted.merge(params, trainable)["w"], whole) < 1e-6


def test_it_has_as_many_parameters_as_lora():
  params = make_params()
  target = r"h_0/.*/kernel"
  sizes = []
  for variant in (lj.LORA, lj.HIRA):
    adapted = lj.lora(unrolled, lj.LoraConfig(4, 4.0, target, variant=variant))
    shapes = jax.eval_shape(adapted.init, KEY, params, tokens())
    sizes.append(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
  assert sizes[0] == sizes[1] == 4 * (4 * (24 + 24) + 2 * (24 + 96))


def test_the_scaling_may_be_traced_and_the_config_is_a_value():
  params, x = example()
  adapted = lj.lora(dense, CONFIG)
  trainable = randomized(adapted.init(KEY, params, x))
  at = jax.jit(lambda scaling: adapted.apply(params, trainable, x, scaling=scaling))
  np.testing.assert_allclose(at(3.0), adapted.apply(params, trainable, x), rtol=1e-5)
  np.testing.assert_array_equal(at(0.0), dense(params, x))
  assert pickle.loads(pickle.dumps(CONFIG)) == CONFIG


def test_arithmetic_is_refused_and_convert_finds_the_nearest_lora():
  params, x = example()
  adapted = lj.lora(dense, CONFIG)
  trainable = randomized(adapted.init(KEY, params, x))
  with pytest.raises(ValueError, match=r"w is adapted by HiRA .* Use lora_jax.convert first"):
    lj.weighted_sum([(CONFIG, trainable)], [1.0], params)
  plain, low_rank, errors = lj.convert(CONFIG, trainable, params, rank=6)
  out = lj.lora(dense, plain).apply(params, low_rank, x)
  assert relative_difference(out, adapted.apply(params, trainable, x)) < 1e-5
  assert float(errors["w"]) < 1e-5
  assert float(lj.convert(CONFIG, trainable, params, rank=2)[2]["w"]) > 0.1  # of full rank
  arrays, axes = lj.pack(trainable)
  jax.tree.map(np.testing.assert_array_equal, lj.unpack(arrays, axes, like=trainable), trainable)


def test_a_config_of_another_variant():
  with pytest.raises(ValueError, match="HiRA got a config of another variant, DoRA"):
    lj.hira(dense, dataclasses.replace(CONFIG, variant=lj.DORA))
