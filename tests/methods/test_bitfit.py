"""BitFit: the biases of each model, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.trees import leaves_with_path

from tests.experiments.harness.test_methods import LLAMA, MODELS

KEY = jax.random.key(0)
TOKENS = jnp.zeros((1, 2), jnp.int32)


def trained_paths(module):
  params = jax.eval_shape(module.init, KEY, TOKENS)["params"]
  trainable = jax.eval_shape(lj.bitfit(lambda p, x: x).init, KEY, params, TOKENS)
  return [path for path, _ in leaves_with_path(trainable)], params


@pytest.mark.parametrize("family", ["gpt2", "gpt2_scanned", "bert", "deberta"])
def test_it_trains_the_biases_and_nothing_else(family):
  paths, params = trained_paths(MODELS[family][0])
  others = ("/kernel", "/scale", "/embedding")
  assert paths == [path for path, _ in leaves_with_path(params) if not path.endswith(others)]
  kernels = [path for path, _ in leaves_with_path(params) if path.endswith("/kernel")]
  assert {path.replace("kernel", "bias") for path in kernels} < {*paths}


def test_qwen2_has_biases_of_query_key_and_value():
  paths, _ = trained_paths(Llama(LlamaConfig(**LLAMA, qkv_bias=True)))
  names = [f"layers_{i}/attn/{name}/bias" for i in range(2) for name in ("key", "query", "value")]
  assert paths == names


def test_a_model_without_any_is_refused():
  message = r"BitFit trains biases, and this model has none: no path of its 21 leaves matches"
  with pytest.raises(ValueError, match=message):
    trained_paths(MODELS["llama"][0])
  with pytest.raises(ValueError, match=r"train '\.\*/b' matches none of the 1 leaves"):
    lj.bitfit(lambda p, x: x, r".*/b").init(KEY, {"w": jnp.ones(2)}, TOKENS)


def test_gradients_and_merge_are_those_of_the_biases():
  def fn(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) * params["norm"]["scale"]

  params = {"up": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}, "norm": {"scale": jnp.full(3, 2.0)}}
  method, x = lj.bitfit(fn), jnp.arange(3.0)
  trainable = jax.tree.map(lambda leaf: leaf / 2, method.init(KEY, params, x))
  merged = method.merge(params, trainable)
  assert merged["up"]["kernel"] is params["up"]["kernel"]
  got = jax.grad(lambda trainable: method.apply(params, trainable, x).sum())(trainable)
  expected = jax.grad(lambda params: fn(params, x).sum())(merged)
  np.testing.assert_array_equal(got["up"]["bias"], expected["up"]["bias"])
  assert leaves_with_path(got)[0][0] == "up/bias"
