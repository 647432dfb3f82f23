"""Every layer kind of the table: equal to the merged model, and never materialized."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights
from lora_jax.adapters.targets import array_leaves

from tests.jaxprs import count_of_sizes
from tests.layer_kinds import KINDS, LayerKind, normal

ALL = [pytest.param(kind, id=str(kind)) for kind in KINDS]
RULES = ("plain", "opaque", "mesh")  # libraries' layers use the same operations
STEP_ZERO = [
  pytest.param(kind, id=str(kind), marks=() if kind.family in RULES else pytest.mark.long)
  for kind in KINDS
]


@functools.cache
def prepared(kind: LayerKind):
  case = kind.build()
  config = lj.LoraConfig(case.rank, 3.0, case.target, rules=case.rules)
  adaptation = lj.lora(case.fn, config, opaque=case.opaque)
  return case, adaptation, adaptation.init(jax.random.key(0), case.params, *case.args)


def randomized(trainable):
  leaves, structure = jax.tree.flatten(trainable)
  drawn = [normal(*leaf.shape, seed=100 + i, scale=0.3) for i, leaf in enumerate(leaves)]
  return jax.tree.unflatten(structure, drawn)


def split_arrays(params):
  """Splits off the leaves that are not arrays, which `jit` would not take as arguments."""
  leaves, structure = jax.tree.flatten(params)
  arrays = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]
  return arrays, (leaves, structure)


def join(arrays, rest):
  leaves, structure = rest
  full = [leaf if array is None else array for array, leaf in zip(arrays, leaves, strict=True)]
  return jax.tree.unflatten(structure, full)


def assert_close(got, expected, tolerance):
  got, expected = (np.asarray(x, np.float32) for x in (got, expected))
  scale = max(1.0, float(np.abs(expected).max()))
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", STEP_ZERO)
def test_step_zero_is_the_base_model_bit_for_bit(kind):
  case, adaptation, trainable = prepared(kind)
  assert adapter_weights(trainable)
  # Operation by operation: in one program XLA may fuse and round the same sums differently.
  expected = case.fn(case.params, *case.args)
  got = adaptation.apply(case.params, trainable, *case.args)
  np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
  assert got.dtype == expected.dtype


@pytest.mark.parametrize("kind", ALL)
def test_output_and_gradients_equal_the_merged_models(kind):
  case, adaptation, trainable = prepared(kind)
  trainable = randomized(trainable)
  base = jax.jit(lambda: case.fn(case.params, *case.args))()
  direction = normal(*base.shape, seed=9)

  @jax.jit
  def both(trainable):
    def factored(trainable):
      out = adaptation.apply(case.params, trainable, *case.args)
      return jnp.mean(direction * out), out

    def merged(trainable):
      out = case.fn(adaptation.merge(case.params, trainable), *case.args)
      return jnp.mean(direction * out), out

    return jax.grad(factored, has_aux=True)(trainable), jax.grad(merged, has_aux=True)(trainable)

  (got, out), (expected, expected_out) = both(trainable)
  assert float(jnp.abs(out - base).max()) > 10 * kind.tolerance  # the adapter does something
  assert_close(out, expected_out, kind.tolerance)
  for leaf, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert float(jnp.abs(reference).max()) > 0
    assert_close(leaf, reference, kind.tolerance)


@pytest.mark.parametrize("kind", ALL)
def test_creates_no_more_values_of_the_weights_size_than_the_base(kind):
  case, adaptation, trainable = prepared(kind)
  leaves = array_leaves(case.params)
  sizes = {math.prod(leaves[path][1].shape) for path in adapter_weights(trainable)}
  arrays, rest = split_arrays(case.params)
  base = jax.make_jaxpr(lambda p, *a: case.fn(join(p, rest), *a))(arrays, *case.args)
  factored = jax.make_jaxpr(lambda p, t, *a: adaptation.apply(join(p, rest), t, *a))(
    arrays, trainable, *case.args
  )
  merged = jax.make_jaxpr(lambda p, t, *a: case.fn(adaptation.merge(join(p, rest), t), *a))(
    arrays, trainable, *case.args
  )
  assert count_of_sizes(factored, sizes) <= count_of_sizes(base, sizes)
  assert count_of_sizes(merged, sizes) > count_of_sizes(base, sizes)  # the count can tell
