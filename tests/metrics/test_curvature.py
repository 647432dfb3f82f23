"""The largest Hessian eigenvalue equals that of the dense Hessian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import lora_jax as lj
from lora_jax.metrics.curvature import hessian_product, largest_eigenvalue


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapted_loss():
  """Returns a loss of a small network's LoRA parameters as a vector, at B = 0, and their names."""
  params = {"first": jnp.asarray(random(5, 6)), "second": jnp.asarray(random(6, 3, seed=1))}

  def loss(params, x):
    hidden = jnp.tanh(x @ params["first"])
    return -jnp.mean(jax.nn.log_softmax(hidden @ params["second"])[:, 0])

  x = jnp.asarray(random(16, 5, seed=2))
  lora = lj.lora(loss, lj.LoraConfig(rank=2, alpha=4.0, target="first|second"))
  flat, unravel = ravel_pytree(lora.init(jax.random.key(0), params, x))
  is_b, _ = ravel_pytree(
    jax.tree_util.tree_map_with_path(
      lambda keys, leaf: jnp.full(leaf.shape, "lora_b" in str(keys[-1]), float), unravel(flat)
    )
  )
  return lambda vector: lora.apply(params, unravel(vector), x), flat, np.asarray(is_b, bool)


@functools.cache
def dense():
  loss, x, is_b = adapted_loss()
  hessian = np.asarray(jax.jit(jax.hessian(loss))(x), np.float64)
  product = jax.jit(functools.partial(hessian_product, loss))
  return hessian, functools.partial(product, x), is_b


def test_it_is_that_of_the_dense_hessian():
  hessian, product, _ = dense()
  pair = largest_eigenvalue(product, random(len(hessian)), tolerance=1e-4)
  values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
  assert pair.value == pytest.approx(values[-1], rel=1e-5)
  assert abs(pair.vector @ vectors[:, -1]) == pytest.approx(1, abs=1e-5)
  residual = np.linalg.norm(hessian @ pair.vector - pair.value * pair.vector)
  assert pair.residual == pytest.approx(residual, abs=1e-5 * pair.value)
  assert pair.residual <= 2e-4 * pair.value
  assert pair.num_products <= len(hessian) + 1


def test_the_hessian_of_lora_at_its_start_is_zero_over_a():
  hessian, product, is_b = dense()
  assert is_b.any()
  assert np.abs(hessian[np.ix_(~is_b, ~is_b)]).max() == 0
  assert np.abs(hessian[np.ix_(~is_b, is_b)]).max() > 0.01  # the gradient of W
  image = np.asarray(product(jnp.where(is_b, 0.0, 1.0)))
  assert np.abs(image[~is_b]).max() == 0


def test_an_eigenvalue_comes_once_in_spite_of_rounding():
  """One far away converges first; without orthogonalization its copies take all further steps."""
  values = np.concatenate([[1e4], np.linspace(0, 1, 79)]).astype(np.float32)
  basis = np.linalg.qr(random(80, 80))[0]
  seen = []

  def product(v):
    seen.append(v)
    return basis @ (values * (basis.T @ v))

  pair = largest_eigenvalue(product, random(80, seed=1), tolerance=1e-9, max_products=40)
  assert pair.value == pytest.approx(1e4, rel=1e-5)
  vectors = np.stack(seen[:-1])
  assert np.abs(vectors @ vectors.T - np.eye(len(vectors))).max() < 1e-5


def test_the_sign_counts_and_a_small_invariant_space_is_enough():
  start = np.ones(4)
  pair = largest_eigenvalue(lambda v: -v, start)
  assert (pair.value, pair.residual, pair.num_products) == (-1.0, 0.0, 2)
  assert (pair.vector == start / 2).all()
  values = np.array([-7.0, -1.0, 2.0, 2.0])
  pair = largest_eigenvalue(lambda v: values * v, start, tolerance=1e-12)
  assert (pair.value, pair.num_products) == (pytest.approx(2.0), 4)
  assert largest_eigenvalue(lambda v: 0 * v, start).value == 0


def test_too_few_products_show_in_the_residual():
  values = np.arange(50.0)
  pair = largest_eigenvalue(lambda v: values * v, np.ones(50), tolerance=1e-6, max_products=3)
  assert pair.num_products == 4
  assert pair.residual > 1e-6 * pair.value
  assert np.abs(values - pair.value).min() <= pair.residual


@pytest.mark.parametrize(
  ("start", "options", "message"),
  [
    (np.zeros(3), {}, r"start must be a vector that is finite and not zero, got shape \(3,\)"),
    (np.array([1.0, np.nan]), {}, r"not zero, got shape \(2,\), norm nan"),
    (np.ones((2, 2)), {}, r"got shape \(2, 2\)"),
    (np.ones(3), {"tolerance": 0.0}, r"tolerance must be .*\(0, 1\), got 0.0"),
    (np.ones(3), {"max_products": 0}, r"max_products .*got 0"),
  ],
)
def test_bad_arguments(start, options, message):
  with pytest.raises(ValueError, match=message):
    largest_eigenvalue(lambda v: v, start, **options)


def test_a_product_that_is_not_finite():
  with pytest.raises(FloatingPointError, match="product of step 0 is not finite"):
    largest_eigenvalue(lambda v: v * np.nan, np.ones(3))
