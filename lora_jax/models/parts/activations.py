"""Activations that keep one array for the backward pass.

The derivative of `jax.nn.gelu` goes back through each of its operations and keeps five arrays of
its input's size, in GPT-2 more than half of all that a layer keeps.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SCALE, CUBIC = math.sqrt(2 / math.pi), 0.044715


@jax.custom_jvp
def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Returns `x / 2 (1 + tanh u)` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`.

  The tanh form of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415, sec. 2). Its value is that of
  `jax.nn.gelu`. The forward pass computes the derivative too, which is all that is kept:

      1/2 (1 + tanh u) + x / 2 (1 - tanh^2 u) du/dx
  """
  return jax.nn.gelu(x)


def _tangent(tangent: Array, value: Array, x: Array) -> Array:
  del value
  tanh = jnp.tanh(SCALE * (x + CUBIC * x**3))
  slope = SCALE * (1 + 3 * CUBIC * x**2)
  return tangent * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope)


gelu_tanh.defjvps(_tangent)
