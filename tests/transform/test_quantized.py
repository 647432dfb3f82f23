"""Quantized base weights in the engine: as if dequantized, and never kept dequantized."""


import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights
from lora_jax.quantization.formats import FORMATS
from lora_jax.quantization.leaf import Quantized
from lora_jax.trees import replace_leaves, weights_with_path

from tests.layer_kinds import KINDS
from tests.transform.test_layer_kinds import assert_close, prepared, randomized
from tests.variants.test_variants import ONE_PER_FAMILY

KIND = [
  pytest.param(kind, id=str(kind), marks=[] if str(kind) in ONE_PER_FAMILY else [pytest.mark.long])
  for kind in KINDS
]


def quantized(leaf, axis):
  """Returns a weight in int8, which fits axes of any size."""
  values = jnp.moveaxis(leaf, axis, -1).astype(jnp.float32)
  return Quantized(FORMATS["int8"].quantize(values), "int8", axis, leaf.dtype)


def quantized_params(params, paths, axis=-1):
  leaves = dict(weights_with_path(params))
  return replace_leaves(params, {path: quantized(leaves[path], axis) for path in paths})


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("kind", KIND)
def test_outputs_and_gradients_equal_the_dequantized_models(kind, axis):
  case, adaptation, trainable = prepared(kind)
  trainable = randomized(trainable)
  paths = adapter_weights(trainable)
  codes = quantized_params(case.params, paths, axis)
  floats = lj.dequantize(codes)

  def loss(params, trainable):
    out = adaptation.apply(params, trainable, *case.args)
    return jnp.mean(jnp.sin(out)), out

  def both(params):
    def fn(trainable):
      return loss(params, trainable)

    return jax.jit(jax.value_and_grad(fn, has_aux=True))(trainable)

  (_, out), grads = both(codes)
  (_, expected), expected_grads = both(floats)
  assert out.dtype == expected.dtype
  assert_close(out, expected, 1e-5)
  for got, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    assert_close(got, reference, 1e-5)
