"""DyLoRA: adapters of every rank in one, of which each step trains some components."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.variants.dylora import first_components

from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(
  rank=4, alpha=6.0, target="up|down", rules=[lj.LoraRule("down", rank=2)], extra="bias"
)


def mlp(params, x):
  return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]


def example():
  draw = np.random.default_rng(0).standard_normal
  shapes = {"up": (5, 8), "down": (8, 6), "bias": (6,)}
  params = {name: jnp.asarray(draw(s), jnp.float32) for name, s in shapes.items()}
  x = jnp.asarray(draw((3, 5)), jnp.float32)
  return params, randomized(lj.dylora(mlp, CONFIG).init(KEY, params, x)), x


def test_a_step_has_the_adapter_of_a_rank_that_is_drawn():
  params, trainable, x = example()
  outputs = []
  for rank in (1, 2, 3, 4):
    config, truncated = lj.dylora_truncated(CONFIG, trainable, rank)
    assert (truncated["up"].rank, truncated["down"].rank) == (rank, min(rank, 2))
    outputs.append(lj.lora(mlp, config).apply(params, truncated, x))
  apply = jax.jit(lj.dylora(mlp, CONFIG).apply)
  drawn = set()
  for key in jax.random.split(KEY, 12):
    out = apply(params, trainable, x, lora_key=key)
    errors = [relative_difference(out, expected) for expected in outputs]
    assert sorted(errors)[0] < 1e-5 < sorted(errors)[1]
    drawn.add(errors.index(min(errors)))
  assert drawn == {0, 1, 2, 3}


def test_evaluation_and_the_merged_model_have_all_components():
  params, trainable, x = example()
  adapted, plain = lj.dylora(mlp, CONFIG), lj.lora(mlp, CONFIG)
  out = plain.apply(params, trainable, x)
  np.testing.assert_array_equal(adapted.apply(params, trainable, x, lora_key=None), out)
  assert relative_difference(mlp(adapted.merge(params, trainable), x), out) < 1e-5


@pytest.mark.parametrize(("trained", "moved"), [("first", [1, 1, 1, 0]), ("last", [0, 0, 1, 0])])
def test_the_gradient_is_that_of_the_trained_components(trained, moved):
  params, trainable, x = example()

  def loss(part, rank):
    nested = first_components(trainable | part, rank, trained)
    return jnp.sum(lj.lora(mlp, CONFIG).apply(params, nested, x) ** 2)

  grads = jax.grad(loss)({"up": trainable["up"]}, 3)["up"]
  moves = [bool(jnp.abs(column).max()) for column in (*grads.lora_a.T, *grads.lora_b)]
  assert moves == [*map(bool, moved)] * 2

  config, truncated = lj.dylora_truncated(CONFIG, trainable, 3)
  apply = lj.lora(mlp, config).apply
  expected = jax.grad(lambda t: jnp.sum(apply(params, t, x) ** 2))(truncated)["up"]
  chosen = np.flatnonzero(moved)
  assert relative_difference(grads.lora_a[:, chosen], expected.lora_a[:, chosen]) < 1e-5
  assert relative_difference(grads.lora_b[chosen], expected.lora_b[chosen]) < 1e-5


def test_dropout_has_a_key_of_its_own():
  params, trainable, x = example()
  adapted = lj.dylora(mlp, dataclasses.replace(CONFIG, dropout=0.5))
  outs = [adapted.apply(params, trainable, x, lora_key=key) for key in jax.random.split(KEY, 2)]
  assert relative_difference(*outs) > 1e-2


def test_bad_settings_are_refused():
  params, trainable, x = example()
  with pytest.raises(ValueError, match="apply needs lora_key: a key to train, None to evaluate"):
    lj.dylora(mlp, CONFIG).apply(params, trainable, x)
  with pytest.raises(ValueError, match="trained must be"):
    lj.dylora(mlp, CONFIG, trained="all")
  with pytest.raises(ValueError, match="so the config needs a target"):
    lj.dylora(mlp, dataclasses.replace(CONFIG, target=[]))
  with pytest.raises(ValueError, match="rank"):
    lj.dylora_truncated(CONFIG, trainable, 0)
  variant = dataclasses.replace(CONFIG, variant=lj.DORA)
  for refused in (lambda: lj.dylora(mlp, variant), lambda: lj.dylora_truncated(variant, {}, 2)):
    with pytest.raises(ValueError, match=r"the config has DoRA\. Leave it out"):
      refused()
