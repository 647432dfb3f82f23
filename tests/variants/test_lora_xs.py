"""LoRA-XS: the paper's formula, its frozen factors, and R alone trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj

from tests.toy_models import relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=3, alpha=6.0, target="w", variant=lj.LORA_XS)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dense(params, x):
  return x @ params["w"]


W, X = normal(8, 6), normal(5, 8, seed=1)


def test_the_frozen_factors_are_the_first_terms_of_the_decomposition():
  node = lj.lora(dense, CONFIG).init(KEY, {"w": W}, X)["w"]
  u, s, v = np.linalg.svd(np.asarray(W, np.float64))
  np.testing.assert_allclose(node.lora_a @ node.lora_b, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(node.lora_a, axis=0), s[:3], rtol=1e-5)


def test_output_and_gradient_are_the_papers():
  adapted = lj.lora(dense, CONFIG)
  start = adapted.init(KEY, {"w": W}, X)["w"]
  node = start.replace(lora_r=normal(3, 3, seed=2))

  def loss(core):
    return jnp.sum(jnp.tanh(adapted.apply({"w": W}, {"w": node.replace(lora_r=core)}, X)))

  def paper(core):
    return jnp.sum(jnp.tanh(X @ W + 2.0 * X @ node.lora_a @ core @ node.lora_b))

  got, expected = (jax.grad(fn)(node.lora_r) for fn in (loss, paper))
  assert relative_difference(got, expected) < 1e-5
  assert relative_difference(loss(node.lora_r), paper(node.lora_r)) < 1e-5


def test_r_is_drawn_and_alone_trained():
  config = lj.LoraConfig(rank=64, alpha=64.0, target="w", variant=lj.LORA_XS)
  w, x = normal(64, 64), normal(5, 64)
  trainable = lj.lora(dense, config).init(KEY, {"w": w}, x)
  assert float(trainable["w"].lora_r.std()) == pytest.approx(1e-5, rel=0.05)
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  trained, frozen = lj.partition(trainable, mask)
  assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(64, 64)]  # rank^2, at any size
  assert len(jax.tree.leaves(frozen)) == 2


def test_without_a_draw_step_0_is_the_base_model():
  outs = []
  for stddev in (1e-5, 0.0):
    adapted = lj.lora_xs(dense, lj.LoraConfig(3, 6.0, "w"), stddev=stddev)
    outs.append(adapted.apply({"w": W}, adapted.init(KEY, {"w": W}, X), X))
  assert 0 < relative_difference(outs[0], dense({"w": W}, X)) < 1e-3
  np.testing.assert_array_equal(outs[1], dense({"w": W}, X))


def test_variants_are_values():
  assert lj.lora_xs_variant() == lj.LORA_XS != lj.lora_xs_variant(0.0)
  with pytest.raises(ValueError, match="stddev"):
    lj.lora_xs_variant(-1.0)


@pytest.mark.long
def test_the_factors_of_a_sharded_weight():
  """A decomposition needs the whole matrix, also on a mesh with explicit axes."""
  expected = lj.lora(dense, CONFIG).init(KEY, {"w": W}, X)["w"]
  mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    sharded = {"w": jax.device_put(W, NamedSharding(mesh, P("fsdp", "tensor")))}
    out = P(None, "tensor")
    fn = lambda params, x: jnp.einsum("bi,io->bo", x, params["w"], out_sharding=out)  # noqa: E731
    got = lj.lora(fn, CONFIG).init(KEY, sharded, X)["w"]
  assert got.lora_a.sharding.spec == P("fsdp", None)
  delta = jax.device_get(got.lora_a) @ jax.device_get(got.lora_b)
  np.testing.assert_allclose(delta, expected.lora_a @ expected.lora_b, atol=1e-5)
