"""A sum over chunks: its gradient is the plain sum's, and needs no further matmuls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.flops import compiled_flops
from lora_jax.training.chunks import chunked_sum

X = jax.random.normal(jax.random.key(0), (4, 8, 16))
W = jax.random.normal(jax.random.key(1), (16, 32))
COLUMN = jax.random.randint(jax.random.key(2), (4, 8), 0, 32)


def chunked(w, x):
  """Returns twice the sum of exp(x w) in one column for each row, a chunk at a time."""
  return 2 * chunked_sum(lambda x, column: picked(w, x, column), (x,), (COLUMN,))


def plain(w, x):
  return 2 * picked(w, x.reshape(-1, 16), COLUMN.reshape(-1))


def picked(w, x, column):
  return jnp.sum(jnp.take_along_axis(jnp.exp(0.1 * x @ w), column[:, None], 1))


@pytest.mark.parametrize("argnums", [1, (0, 1)], ids=["frozen weight", "trained weight"])
def test_value_and_gradient_are_the_plain_sums_at_its_number_of_operations(argnums):
  programs: list[Any] = [
    jax.jit(jax.value_and_grad(fn, argnums)).lower(W, X).compile() for fn in (chunked, plain)
  ]
  got, expected = (jax.tree.leaves(program(W, X)) for program in programs)
  for left, right in zip(got, expected, strict=True):
    np.testing.assert_allclose(left, right, rtol=2e-6)
  operations = [compiled_flops(program.as_text()) for program in programs]
  assert operations[0] == operations[1] == (2 if argnums == 1 else 3) * 2 * 32 * 16 * 32


def test_gradients_of_a_shared_weight_are_summed_in_float32():
  weight, x = jnp.ones(1, jnp.bfloat16), jnp.full((256, 1), 2.0**-8, jnp.bfloat16).at[0].set(1.0)
  grad = jax.grad(lambda w: chunked_sum(lambda x: jnp.sum(w * x, dtype="float32"), (x,), ()))(
    weight
  )
  assert grad.dtype == jnp.bfloat16
  assert float(grad[0]) == 2.0  # 1 + 255 / 256; in bfloat16 each of these sums would be 1
