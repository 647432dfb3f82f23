"""FT-Top-k: the leaves of the last layers, and the models that it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models.gpt2.model import GPT2, GPT2Config

from tests.experiments.harness.test_methods import MODELS

KEY = jax.random.key(0)
TOKENS = jnp.zeros((1, 2), jnp.int32)


def shapes(module, num_layers, **options):
  params = jax.eval_shape(module.init, KEY, TOKENS)["params"]
  init = lj.top_layers(lambda p, x: x, num_layers, **options).init
  return jax.eval_shape(init, KEY, params, TOKENS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixture", "bert", "deberta"])
def test_it_trains_every_leaf_of_the_last_layers(family):
  module, _ = MODELS[family]
  params = jax.eval_shape(module.init, KEY, TOKENS)["params"]
  (name,) = (name for name in params if name.endswith("_1"))
  assert shapes(module, 1) == {name: params[name]}
  assert {*shapes(module, 2)} == {name, name.replace("_1", "_0")}


def test_two_layers_of_gpt2_medium_are_the_papers_25_million():
  config = GPT2Config(embed_dim=1024, num_layers=2, num_heads=16)  # of 24, all alike
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes(GPT2(config), 2)))
  assert count == 2 * (12 * 1024**2 + 13 * 1024)
  assert f"{count / 1e6:.2f}M" == "25.19M"


def test_numbers_are_ordered_as_numbers_and_a_head_can_be_added():
  params = {f"h_{i}": {"w": jnp.full(2, float(i))} for i in range(11)} | {"head": jnp.ones(2)}
  trainable = lj.top_layers(lambda p, x: x, 2, extra="head").init(KEY, params, 0)
  assert {*trainable} == {"h_9", "h_10", "head"}


def test_gradients_are_those_of_the_last_layer():
  def fn(params, x):
    return jnp.tanh(x @ params["h_0"]["kernel"]) @ params["h_1"]["kernel"]

  params, x = {f"h_{i}": {"kernel": jnp.eye(3) + i} for i in range(2)}, jnp.ones((1, 3))
  method = lj.top_layers(fn, 1)
  trainable = jax.tree.map(lambda leaf: leaf + 1, method.init(KEY, params, x))
  merged = method.merge(params, trainable)
  assert merged["h_0"]["kernel"] is params["h_0"]["kernel"]
  got = jax.grad(lambda trainable: method.apply(params, trainable, x).sum())(trainable)
  expected = jax.grad(lambda params: fn(params, x).sum())(merged)
  assert {*got} == {"h_1"}
  np.testing.assert_array_equal(got["h_1"]["kernel"], expected["h_1"]["kernel"])


def test_scanned_stacks_and_wrong_numbers_are_refused():
  with pytest.raises(
    ValueError, match=r"such as h/attn/key/bias of shape \(2, 8\).*scan_layers=Fal"
  ):
    shapes(MODELS["gpt2_scanned"][0], 1)
  with pytest.raises(ValueError, match="num_layers=3, but the model has 2 layers"):
    shapes(MODELS["gpt2"][0], 3)
  with pytest.raises(ValueError, match=r"num_layers must be an integer in \[1, inf\), got 0"):
    lj.top_layers(lambda p, x: x, 0)
  with pytest.raises(ValueError, match=r"matches ln_f/bias, which has no layer's number"):
    shapes(MODELS["gpt2"][0], 1, layers=".*")
