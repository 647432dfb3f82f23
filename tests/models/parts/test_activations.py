"""The tanh form of GELU: JAX's value and derivatives, but one array kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.parts.activations import gelu_tanh

X = jnp.concatenate([jnp.linspace(-6, 6, 97), jnp.asarray([-80.0, 0.0, 80.0])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_jax(dtype):
  x = X.astype(dtype)
  assert (gelu_tanh(x) == jax.nn.gelu(x)).all()
  assert gelu_tanh(x).dtype == dtype


def test_first_and_second_derivatives_are_those_of_jax():
  for depth in (1, 2):
    got, expected = gelu_tanh, jax.nn.gelu
    for _ in range(depth):
      got, expected = jax.grad(got), jax.grad(expected)
    np.testing.assert_allclose(jax.vmap(got)(X), jax.vmap(expected)(X), rtol=1e-5, atol=2e-6)


def test_the_backward_pass_keeps_one_array():
  def kept(fn):
    return sum(leaf.shape == X.shape for leaf in jax.tree.leaves(jax.vjp(fn, X)[1]))

  assert kept(gelu_tanh) == 1 < kept(jax.nn.gelu)
