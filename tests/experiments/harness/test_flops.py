"""Operations of compiled programs, each iteration of a loop counted, and the speed of a matmul."""

import jax
import jax.numpy as jnp
import pytest

from experiments.harness.flops import compiled_flops, matmul_flops


def test_every_iteration_of_a_loop_is_counted():
  def fn(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

  text = jax.jit(fn).lower(jnp.ones((8, 16)), jnp.ones((3, 16, 16))).compile().as_text()
  assert compiled_flops(text) == 3 * 2 * 8 * 16 * 16


def test_a_loop_of_unknown_length_is_refused():
  def fn(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ w, x)

  text = jax.jit(fn).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile().as_text()
  with pytest.raises(ValueError, match="no known trip count"):
    compiled_flops(text)


@pytest.mark.parametrize(
  ("options", "products"),
  [
    ({}, 5 * 3),
    ({"padding": [(1, 1)]}, 7 * 3 - 2),
    ({"padding": [(2, 0)], "window_strides": (2,)}, 4 * 3 - 2),
    ({"rhs_dilation": (2,)}, 3 * 3),
    ({"lhs_dilation": (2,)}, 11 * 3 - 16),
    ({"padding": [(-1, -1)]}, 3 * 3),
  ],
)
def test_a_convolution_has_a_product_for_each_tap_on_a_value(options, products):
  """Of 7 values and a kernel of 3 taps; one that falls on padding or a gap is no product."""
  options = {"window_strides": (1,), "padding": [(0, 0)]} | options

  def fn(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, **options)

  text = jax.jit(fn).lower(jnp.ones((2, 4, 7)), jnp.ones((8, 4, 3))).compile().as_text()
  assert compiled_flops(text) == 2 * 2 * 4 * 8 * products


def test_convolutions_of_groups_and_of_gradients_are_counted():
  def fn(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), [(1, 1), (2, 2)], feature_group_count=2
    ).sum()

  x, kernel = jnp.ones((2, 6, 5, 7)), jnp.ones((8, 3, 3, 5))
  products = (5 * 3 - 2) * (7 * 5 - 2 * 3)
  compiled = jax.jit(jax.grad(lambda *args: fn(*args) ** 2, (0, 1))).lower(x, kernel).compile()
  assert compiled_flops(compiled.as_text()) == 3 * 2 * 2 * 3 * 8 * products


def test_the_speed_of_a_matmul_is_positive():
  assert matmul_flops(size=32, repeats=1) > 0
