"""Weights of every dtype pass through the engine; A and B are not lost in a narrow one."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import lora_jax as lj

from tests.layer_kinds import normal
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
X, IDS = normal(3, 6, seed=2), jnp.array([[1, 5], [0, 5]])
WIDE = jnp.float32

NARROW_USES = {
  "matmul": lambda w: X @ w.astype(WIDE),
  "matmul of the transpose": lambda w: w.T.astype(WIDE) @ X.T,
  "joined": lambda w: jnp.tile(X, (1, 2)) @ jnp.concatenate([w, w]).astype(WIDE),
  "convolution": lambda w: lax.conv_general_dilated(
    X[:, :, None], w.T[:, :, None].astype(WIDE), (1,), "SAME"
  ),
  "lookup": lambda w: w[IDS].astype(WIDE),
  "lookup, filled": lambda w: jnp.take(w, IDS, axis=0, mode="fill", fill_value=0).astype(WIDE),
  "lookup, scaled and moved": lambda w: (w[IDS] * w.dtype.type(2)).swapaxes(0, 1).astype(WIDE),
  "lookup in jit": lambda w: jax.jit(lambda w: w[IDS])(w).astype(WIDE),
  "lookup under vmap": lambda w: jax.vmap(lambda i: w[i].astype(WIDE))(IDS[0]),
  "lookup in a scan": lambda w: lax.scan(
    lambda c, i: (c + w[i].astype(WIDE), None), jnp.zeros(4), IDS[0]
  )[0],
  "one row": lambda w: jnp.tanh(w[2].astype(WIDE)),
  "one row, multiplied": lambda w: w[2].astype(WIDE) @ w.astype(WIDE).T,
}


@pytest.mark.parametrize("name", NARROW_USES)
def test_a_float8_weight_is_used_with_all_of_its_low_rank_part(name):
  """Equal to the weight W + scaling * AB in float32, which `merge` would round."""
  fn = lambda p: NARROW_USES[name](p["w"])  # noqa: E731
  params = {"w": normal(6, 4, seed=1).astype(jnp.float8_e4m3fn)}
  lora = lj.lora(fn, lj.LoraConfig(2, 4.0, "w"))
  start = lora.init(KEY, params)
  np.testing.assert_array_equal(lora.apply(params, start), fn(params))

  def exact(trainable):
    a, b = trainable["w"].lora_a, trainable["w"].lora_b
    return fn({"w": params["w"].astype(WIDE) + 2.0 * a @ b})

  @jax.jit
  def both(trainable):
    total = lambda f: lambda t: jnp.sum(jnp.sin(f(t)))  # noqa: E731
    factored = lambda t: lora.apply(params, t)  # noqa: E731
    return [jax.value_and_grad(total(f))(trainable) for f in (factored, exact)]

  got, expected = both(randomized(start))
  assert relative_difference(got, expected) < 1e-5


def test_a_row_of_float8_that_is_not_cast_is_rounded():
  params = {"w": normal(6, 4, seed=1).astype(jnp.float8_e4m3fn)}
  lora = lj.lora(lambda p: (p["w"][IDS], p["w"][1]), lj.LoraConfig(2, 4.0, "w"))
  trainable = randomized(lora.init(KEY, params))
  merged = lora.merge(params, trainable)["w"]
  rows, row = lora.apply(params, trainable)
  np.testing.assert_array_equal(rows, merged[IDS])
  np.testing.assert_array_equal(row, merged[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_looked_up_rows_are_rounded_once_as_by_merge(dtype):
  params = {"w": normal(6, 4, seed=1).astype(dtype)}
  lora = lj.lora(lambda p: p["w"][IDS], lj.LoraConfig(2, 4.0, "w"))
  trainable = randomized(lora.init(KEY, params))
  rows = lora.apply(params, trainable)
  np.testing.assert_array_equal(rows, lora.merge(params, trainable)["w"][IDS])


LEAVES = {
  "array": np.ones(2, np.float64),
  "scalar": np.float32(2),
  "number": 3.0,
  "flag": True,
  "complex": np.ones(2, np.complex64),
  "integers": np.arange(2),
  "int4": np.ones(2, ml_dtypes.int4),
  "key": jax.random.key(0),
  "activation": jnp.tanh,
  "name": "gelu",
  "words": np.array(["a", "b"]),
  "objects": np.array([None, "b"], object),
  "day": np.datetime64("2020-01-01"),
}


def test_frozen_leaves_of_every_kind_stay_as_they_are():
  params = LEAVES | {"w": jnp.ones((6, 4))}
  config = lj.LoraConfig(2, 4.0, "w")

  def fn(params, x):
    scale = params["scalar"] * params["number"] * params["array"].sum() * params["words"].size
    return params["activation"](x @ params["w"]) * scale

  lora = lj.lora(fn, config)
  trainable = lora.init(KEY, params, X)
  np.testing.assert_array_equal(lora.apply(params, trainable, X), fn(params, X))
  merged = lora.merge(params, trainable)
  assert all(merged[name] is leaf for name, leaf in LEAVES.items())
  assert lj.summary(params, trainable, config)
  tree = {"base": params, "adapter": trainable}
  mask = lj.trainable_mask(tree)
  assert jax.tree.leaves(mask["base"]) == [False] * len(params)
  joined = lj.combine(*lj.partition(tree, mask))
  assert jax.tree.structure(joined) == jax.tree.structure(tree)
  assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True))
  assert lj.match(tree, "base/(w|words)")["base"]["words"]
