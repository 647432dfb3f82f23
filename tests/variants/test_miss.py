"""MiSS: sums of the inputs of shards, its mini and bat modes, sizes, and what is refused."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

from tests.toy_models import randomized, relative_difference
from tests.variants.test_hira import dense

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=3, alpha=6.0, target="w", variant=lj.MISS)


def example(num_inputs=7, num_outputs=6):
  draw = np.random.default_rng(0).standard_normal
  w, x = draw((num_inputs, num_outputs)), draw((5, num_inputs))
  return {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)


def shared(w, x, shard):
  """The paper's sum over shards of three inputs, the last of them padded."""
  sums = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 3))).reshape(len(x), -1, 3).sum(1)
  return jnp.tanh(x @ w + 2.0 * sums @ shard)


def mini(w, x, shard):
  return shared(w, x, jnp.tile(shard, (1, 3)))


def bat(w, x, shard):
  """W + scaling (W D + D) of each block of three inputs and three outputs."""
  blocks = w.reshape(3, 3, 2, 3)  # shards of inputs, inputs, blocks of outputs, outputs
  delta = [
    [shard[o].T + shard[o].T @ blocks[i, :, o] for o in range(2)] for i in range(len(blocks))
  ]
  return jnp.tanh(x @ (w + 2.0 * jnp.block(delta)))


@pytest.mark.parametrize(
  ("variant", "formula", "num_inputs"),
  [(lj.MISS, shared, 7), (lj.miss_mini_variant(2), mini, 7), (lj.MISS_BAT, bat, 9)],
  ids=["shared", "mini", "bat"],
)
def test_output_and_gradients_are_the_papers(variant, formula, num_inputs):
  params, x = example(num_inputs)
  adapted = lj.lora(dense, dataclasses.replace(CONFIG, variant=variant))
  trainable = randomized(adapted.init(KEY, params, x))

  def loss(trainable):
    return jnp.sum(adapted.apply(params, trainable, x) ** 2)

  def paper(trainable):
    return jnp.sum(formula(params["w"], x, trainable["w"].shard) ** 2)

  got, expected = (jax.jit(jax.value_and_grad(f))(trainable) for f in (loss, paper))
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert relative_difference(one, other) < 1e-5
  merged = adapted.merge(params, trainable)
  assert relative_difference(dense(merged, x), formula(params["w"], x, trainable["w"].shard)) < 1e-5


def test_the_number_of_parameters():
  params, x = {"w": jnp.ones((768, 2304))}, jnp.ones((1, 768))
  for variant, size in (
    (lj.MISS, 3 * 2304),
    (lj.miss_mini_variant(64), 3 * 64),
    (lj.MISS_BAT, 3 * 2304),
  ):
    adapted = lj.lora(dense, dataclasses.replace(CONFIG, variant=variant))
    shapes = jax.eval_shape(adapted.init, KEY, params, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == size


def test_dropout_acts_on_the_shards_inputs_and_bat_has_none():
  params, x = example(9)
  adapted = lj.lora(dense, dataclasses.replace(CONFIG, dropout=0.5))
  trainable = randomized(adapted.init(KEY, params, x))
  outputs = [adapted.apply(params, trainable, x, lora_key=key) for key in (KEY, None)]
  assert relative_difference(*outputs) > 1e-2
  config = dataclasses.replace(CONFIG, dropout=0.5, variant=lj.MISS_BAT)
  with pytest.raises(ValueError, match=r"w: LoRA dropout .* MiSS in bat mode has none"):
    lj.lora(dense, config).init(KEY, params, x)


def test_what_is_refused():
  params, x = example()
  for variant, words in (
    (lj.miss_mini_variant(4), r"w: shards of 4 outputs must divide its 6 outputs"),
    (lj.MISS_BAT, r"w: MiSS's bat needs a rank that divides the 7 inputs and 6 outputs, got 3"),
  ):
    with pytest.raises(ValueError, match=words):
      lj.lora(dense, dataclasses.replace(CONFIG, variant=variant)).init(KEY, params, x)
  with pytest.raises(ValueError, match="mini"):
    lj.miss_mini_variant(0)
  with pytest.raises(ValueError, match="MiSS got a config of another variant, HiRA"):
    lj.miss(dense, dataclasses.replace(CONFIG, variant=lj.HIRA))
  assert lj.miss_mini_variant(4) == lj.miss_mini_variant(4) != lj.miss_mini_variant(2)
  config = dataclasses.replace(CONFIG, variant=lj.miss_mini_variant(4))
  assert pickle.loads(pickle.dumps(config)) == config
