"""Banks: stacked adapters compute what each computes alone, and slots change without compiling."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights
from lora_jax.quantization.leaf import is_quantized

from tests.toy_models import mlp, mlp_example, randomized

PARAMS, X = mlp_example({"up": (12, 16), "down": (16, 8)})
BOTH = ["up", "down"]


def adapter(seed, fn=mlp, params=PARAMS, x=X, **settings):
  config = lj.LoraConfig(**{"rank": 2, "alpha": 6.0, "target": BOTH} | settings)
  shapes = jax.eval_shape(lj.lora(fn, config).init, jax.random.key(0), params, x)
  return config, randomized(shapes, seed=seed)


@functools.cache
def case():
  """Returns four adapters of other ranks, alphas and targets, and their bank with a free slot."""
  adapters = [
    adapter(0),
    adapter(1, rank=5, alpha=2.0),
    adapter(2, rank=3, target="up"),
    adapter(3, target="down", rules=[lj.LoraRule("down", rank=1, alpha=-3.0)]),
  ]
  return adapters, lj.bank(adapters, PARAMS, slots=5)


def apply_all(bank, params=PARAMS, x=X, fn=mlp):
  method = lj.lora(fn, bank.config)
  return jax.jit(jax.vmap(method.apply, (None, 0, None)))(params, bank.trainable, x)


def test_each_slot_computes_what_its_adapter_computes_alone():
  adapters, bank = case()
  outputs = apply_all(bank)
  assert bank.slots == 5
  for (config, trainable), out in zip(adapters, outputs, strict=False):
    expected = jax.jit(lj.lora(mlp, config).apply)(PARAMS, trainable, X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(outputs[4], jax.jit(mlp)(PARAMS, X), rtol=1e-5, atol=1e-6)
  assert not np.allclose(outputs[0], outputs[1])


def test_the_base_models_matmuls_stay_one():
  """The base model's matmuls are not batched over slots: their weights have two axes."""
  _, bank = case()
  x = jnp.ones((bank.slots, *X.shape))
  method = lj.lora(mlp, bank.config)
  traced = jax.make_jaxpr(jax.vmap(method.apply, (None, 0, 0)))(PARAMS, bank.trainable, x)
  whole = {leaf.shape for leaf in jax.tree.leaves(PARAMS)}
  dots = [e for e in traced.jaxpr.eqns if e.primitive.name == "dot_general"]
  base = [e for e in dots if e.invars[1].aval.shape in whole]
  assert len(base) == 2
  assert all(e.outvars[0].aval.shape[:2] == x.shape[:2] for e in base)


def test_an_adapter_comes_back_from_its_slot():
  adapters, bank = case()
  config, trainable = lj.drop_zero_ranks(*bank.adapter(2), PARAMS)
  assert config.rank == 3
  assert set(trainable) == {"up"}
  merged = jax.jit(lj.lora(mlp, config).merge)(PARAMS, trainable)
  expected = jax.jit(lj.lora(mlp, adapters[2][0]).merge)(PARAMS, adapters[2][1])
  np.testing.assert_allclose(merged["up"], expected["up"], rtol=1e-6, atol=1e-6)


def test_slots_are_replaced_without_compiling():
  adapters, bank = case()
  method = lj.lora(mlp, bank.config)
  apply: Any = jax.jit(
    lambda bank, x: jax.vmap(method.apply, (None, 0, None))(PARAMS, bank.trainable, x)
  )
  before = apply(bank, X)
  others = bank.replace(4, adapters[1], PARAMS).replace(
    0, adapters[2], jax.eval_shape(lambda: PARAMS)
  )
  after = apply(others, X)
  assert apply._cache_size() == 1
  np.testing.assert_array_equal(after[4], before[1])
  np.testing.assert_array_equal(after[0], before[2])
  np.testing.assert_array_equal(after[1:4], before[1:4])
  np.testing.assert_array_equal(apply(bank, X), before)  # the first bank is as it was


def test_the_same_adapter_has_the_same_bits_in_another_slot():
  adapters, _ = case()
  outputs = [apply_all(lj.bank(order, PARAMS)) for order in (adapters, adapters[::-1])]
  np.testing.assert_array_equal(outputs[0], outputs[1][::-1])


def test_rank_leaves_room_for_larger_adapters():
  adapters, small = case()
  large = adapter(7, rank=8)
  with pytest.raises(ValueError, match=r"rank 8 at down, and the bank has rank 5.*rank=\.\.\."):
    small.replace(0, large, PARAMS)
  bank = lj.bank(adapters, PARAMS, rank=8)
  assert {w.rank for w in adapter_weights(bank.adapter(0)[1]).values()} == {8}
  np.testing.assert_allclose(apply_all(bank), apply_all(small)[:4], rtol=1e-5, atol=1e-5)
  expected = jax.jit(lj.lora(mlp, large[0]).apply)(PARAMS, large[1], X)
  out = apply_all(bank.replace(3, large, PARAMS))[3]
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_fully_trained_leaves_are_those_of_each_slot():
  def fn(params, x):
    return mlp(params, x) + params["bias"][None]

  params = PARAMS | {"bias": jnp.arange(8.0)}
  make = functools.partial(adapter, fn=fn, params=params)
  whole, plain = make(0, extra="bias"), make(1)
  bank = lj.bank([whole, plain], params, slots=3)
  outputs = apply_all(bank, params, fn=fn)
  for (config, trainable), out in zip((whole, plain), outputs, strict=False):
    expected = jax.jit(lj.lora(fn, config).apply)(params, trainable, X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(outputs[2], jax.jit(fn)(params, X), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="fully trained bias, and no adapter of the bank has"):
    lj.bank([plain], params).replace(0, whole, params)


def test_a_quantized_base():
  params = lj.quantize(PARAMS, "int8", "up|down")
  assert all(map(is_quantized, params.values()))
  adapters = case()[0][:2]
  for out, (config, trainable) in zip(
    apply_all(lj.bank(adapters, params), params), adapters, strict=True
  ):
    expected = jax.jit(lj.lora(mlp, config).apply)(params, trainable, X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_the_structure_is_static_data():
  _, bank = case()
  doubled = jax.tree.map(lambda leaf: 2 * leaf, bank)
  assert doubled.config == bank.config
  assert hash(bank.config) == hash(doubled.config)
  with pytest.raises(dataclasses.FrozenInstanceError):
    bank.config = None  # pyright: ignore
