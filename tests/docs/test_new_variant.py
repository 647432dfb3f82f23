"""docs/new_variant.md: the reader's own variant runs, in 30 lines, and does what the page says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

from tests.docs.pages import code_blocks, page
from tests.toy_models import relative_difference


@pytest.fixture(scope="module")
def names():
  (code,) = code_blocks(page("new_variant"))
  assert len([line for line in code.splitlines() if line.strip()]) <= 30
  names = {}
  exec(code, names)
  return names


def explicit(params, trainable, scaling):
  """The page's equation on the weights themselves."""
  return {
    path: (params[path] + scaling * (node.a * node.d[None]) @ node.b) * node.g[None]
    for path, node in trainable.items()
  }


def test_step_0_is_the_base_model(names, capsys):
  fn, adapted, params, x = (names[name] for name in ("fn", "adapted", "params", "x"))
  trainable = names["trainable"]
  np.testing.assert_array_equal(jax.jit(adapted.apply)(params, trainable, x), fn(params, x))
  assert jnp.allclose(trainable["up"].a.T @ trainable["up"].a, jnp.eye(2), atol=1e-6)
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  assert [mask["up"].arrays[name] for name in "adbg"] == [False, True, True, True]
  print(lj.summary(params, trainable))
  assert "up" in capsys.readouterr().out


def test_outputs_gradients_and_merge_are_the_equations(names):
  fn, adapted, params, x = (names[name] for name in ("fn", "adapted", "params", "x"))
  trainable = jax.tree.map(lambda array: array + 0.1, names["trainable"])

  def loss(trainable):
    return jnp.sum(adapted.apply(params, trainable, x) ** 2)

  def expected_loss(trainable):
    return jnp.sum(fn(explicit(params, trainable, 2.0), x) ** 2)

  got, expected = (jax.grad(f)(trainable) for f in (loss, expected_loss))
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert relative_difference(one, other) < 1e-5
  merged = adapted.merge(params, trainable)
  for path, weight in explicit(params, trainable, 2.0).items():
    assert relative_difference(merged[path], weight) < 1e-6


def test_it_adapts_a_convolution_and_some_layers_of_a_stack(names):
  def fn(params, x):
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return jax.lax.scan(step, x, params["layers"])[0]

  config = lj.LoraConfig(2, 4.0, "layers", stacked_layers=[1], variant=names["SCALED"])
  params, x = {"layers": jnp.eye(4)[None] * jnp.ones((3, 1, 1)) / 2}, jnp.ones((2, 4))
  adapted = lj.lora(fn, config)
  trainable = jax.tree.map(lambda a: a + 0.1, adapted.init(jax.random.key(0), params, x))
  assert trainable["layers"].a.shape == (1, 4, 2)
  merged = adapted.merge(params, trainable)
  assert relative_difference(adapted.apply(params, trainable, x), fn(merged, x)) < 1e-5
  kernel = {"kernel": jnp.ones((2, 2, 3, 4))}
  convolve = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
    x, p["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  on_kernel = lj.lora(convolve, lj.LoraConfig(2, 4.0, "kernel", variant=names["SCALED"]))
  node = on_kernel.init(jax.random.key(0), kernel, jnp.ones((1, 3, 3, 3)))["kernel"]
  assert node.a.shape == (2, 2, 3, 2)


def test_refusals_name_the_weight(names):
  fn, params, x = (names[name] for name in ("fn", "params", "x"))
  wrong = names["SCALED"]._replace(start=lambda key, site: {"a": jnp.ones((8, 2))})
  adapted = lj.lora(fn, lj.LoraConfig(2, 4.0, "up", variant=wrong))
  message = r"up: start of scaled LoRA .* gave a, expected its arrays"
  with pytest.raises(ValueError, match=message):
    adapted.init(jax.random.key(0), params, x)
