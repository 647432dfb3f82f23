"""Uni-LoRA: LoRA whose elements are those of one vector, by an isometric map."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj

from tests.toy_models import mlp, mlp_example, relative_difference

KEY = jax.random.key(0)
VARIANT = lj.uni_lora_variant(11)
CONFIG = lj.LoraConfig(rank=2, alpha=6.0, target=".*", variant=VARIANT)
SHAPES = {"up": (5, 8), "down": (8, 6)}


def with_theta(trainable, theta):
  shared = trainable["lora_shared"][VARIANT.name].replace(theta=theta)
  return trainable | {"lora_shared": {VARIANT.name: shared}}


def projection(trainable):
  """Returns P, (elements of all A and B, length), in one part for each array."""
  indices = [index for name in SHAPES for index in trainable[name].arrays.values()]
  rows = [np.eye(11)[np.asarray(index, int).ravel()] for index in indices]
  counts = np.concatenate(rows).sum(0)
  return [row / np.sqrt(counts) for row in rows]


def test_the_map_is_isometric():
  params, x = mlp_example(SHAPES)
  trainable = lj.lora(mlp, CONFIG).init(KEY, params, x)
  inverse_root = np.asarray(trainable["lora_shared"][VARIANT.name].inverse_root, np.float64)
  chosen = np.concatenate([part > 0 for part in projection(trainable)])  # one element a row
  whole = chosen * inverse_root
  np.testing.assert_allclose(whole.T @ whole, np.eye(11), atol=1e-6)


def test_outputs_and_gradients_are_the_papers():
  params, x = mlp_example(SHAPES)
  adapted = lj.uni_lora(mlp, dataclasses.replace(CONFIG, variant=None), length=11)
  start = adapted.init(KEY, params, x)
  parts = [jnp.asarray(part, jnp.float32) for part in projection(start)]

  def paper(theta):
    a1, b1, a2, b2 = (part @ theta for part in parts)
    up = params["up"] + 3.0 * a1.reshape(5, 2) @ b1.reshape(2, 8)
    down = params["down"] + 3.0 * a2.reshape(8, 2) @ b2.reshape(2, 6)
    return jnp.sum(mlp({"up": up, "down": down}, x) ** 2)

  def loss(theta):
    return jnp.sum(adapted.apply(params, with_theta(start, theta), x) ** 2)

  theta = jnp.asarray(np.random.default_rng(1).standard_normal(11), jnp.float32)
  got, expected = (jax.jit(jax.value_and_grad(f))(theta) for f in (loss, paper))
  assert relative_difference(got, expected) < 1e-5
  config, plain = lj.to_lora(CONFIG, with_theta(start, theta), params)
  merged = lj.lora(mlp, config).merge(params, plain)
  assert relative_difference(jnp.sum(mlp(merged, x) ** 2), got[0]) < 1e-5


def test_the_vector_alone_is_trained_and_starts_near_the_base_model():
  params, x = mlp_example(SHAPES)
  adapted = lj.lora(mlp, CONFIG)
  trainable = adapted.init(KEY, params, x)
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  trained, _ = lj.partition(trainable, mask)
  (theta,) = jax.tree.leaves(trained)
  assert theta.shape == (11,)
  assert 0.01 < float(jnp.abs(theta).max()) <= 0.02
  assert 0 < relative_difference(adapted.apply(params, trainable, x), mlp(params, x)) < 1e-3
  *_, adapter, _ = lj.summary(params, trainable, CONFIG).splitlines()
  assert adapter.split() == ["adapter", "11", "12.500%"]


def test_the_indices_follow_from_the_seed():
  params, x = mlp_example(SHAPES)

  def index(variant, key):
    trainable = lj.lora(mlp, dataclasses.replace(CONFIG, variant=variant)).init(key, params, x)
    return np.asarray(trainable["up"].index_a)

  first = index(VARIANT, KEY)
  np.testing.assert_array_equal(index(VARIANT, jax.random.key(1)), first)
  assert (index(lj.uni_lora_variant(11, seed=1), KEY) != first).any()


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match="length must be from 1 to 16777216, got 0"):
    lj.uni_lora_variant(0)
  with pytest.raises(ValueError, match="bound"):
    lj.uni_lora_variant(8, bound=0.0)
  variants = [VARIANT, *(lj.uni_lora_variant(11, **s) for s in ({"seed": 1}, {"bound": 0.1}))]
  assert len({variant.name for variant in variants}) == 3
  assert pickle.loads(pickle.dumps(VARIANT)) == VARIANT
  params, x = mlp_example(SHAPES)
  trainable = lj.lora(mlp, CONFIG).init(KEY, params, x)
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trainable)
  with pytest.raises(ValueError, match="indices must be float32"):
    lj.lora(mlp, CONFIG).apply(params, narrow, x)


@pytest.mark.long
def test_indices_on_an_explicit_mesh():
  adapted, w = lj.lora(lambda params, x: x @ params["w"], CONFIG), mlp_example(SHAPES)[0]["down"]
  trainable = adapted.init(KEY, {"w": w}, x=jnp.ones((2, 8)))
  expected = adapted.apply({"w": w}, trainable, jnp.ones((2, 8)))
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    placed = {"w": jax.device_put(w, NamedSharding(mesh, P(None, "tensor")))}
    trainable = adapted.init(KEY, placed, jnp.ones((2, 8)))
    assert trainable["w"].index_b.sharding.spec == P(None, "tensor")
    got = adapted.apply(placed, trainable, jnp.ones((2, 8)))
  assert relative_difference(jax.device_get(got), expected) < 1e-5
