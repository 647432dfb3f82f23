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


def test_the_speed_of_a_matmul_is_positive():
  assert matmul_flops(size=32, repeats=1) > 0
