"""Quantizing the weights of a tree: formats of this package, sizes, errors, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.quantization.nf4 import LEVELS

BITSANDBYTES_NF4 = (  # its published constants
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
  *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def quantized(x: np.ndarray, format: str, axis: int = -1) -> lj.Quantized:
  return lj.quantize({"w": jnp.asarray(x)}, format, target="w", axis=axis)["w"]


values = jax.jit(lambda leaf: leaf.dequantize())


def test_the_levels_of_nf4_are_those_of_bitsandbytes():
  np.testing.assert_allclose(LEVELS, BITSANDBYTES_NF4, atol=2e-7)


def test_nf4_has_the_size_and_the_errors_of_its_paper():
  x = normal(512, 2048)
  leaf = quantized(x, "nf4")
  assert 8 * leaf.nbytes / x.size == pytest.approx(4.127, abs=1e-4)
  error = np.abs(np.asarray(values(leaf)) - x)
  assert error.mean() == pytest.approx(0.0728, abs=1e-4)
  assert (error / np.abs(x)).mean() == pytest.approx(0.2034, abs=1e-3)  # mean of |error| / |x|
  assert np.sqrt((error**2).mean()) == pytest.approx(0.0920, abs=2e-4)


@pytest.mark.parametrize(
  ("format", "bits", "error"),
  [
    ("rtn2", 3, 0.393),
    ("rtn3", 4, 0.168),
    ("Q4_0", 4.5, 0.086),
    ("Q4_1", 5, 0.078),
    ("int8", 8, 0),
  ],
)
def test_the_bits_of_a_weight_and_the_error_relative_to_its_norm(format, bits, error):
  x = normal(256, 1024)
  leaf = quantized(x, format)
  assert 8 * leaf.nbytes / x.size == pytest.approx(bits, abs=0.04)
  difference = np.asarray(values(leaf)) - x
  assert np.linalg.norm(difference) / np.linalg.norm(x) == pytest.approx(error, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3])
def test_rounding_to_few_bits_is_to_the_nearest_step(bits):
  x = normal(4, 64)
  leaf = quantized(x, f"rtn{bits}")
  blocks = x.reshape(4, 2, 32)
  steps = np.asarray(leaf.arrays["d"], np.float32)[..., None]
  np.testing.assert_allclose(steps[..., 0], np.ptp(blocks, axis=-1) / (2**bits - 1), rtol=1e-3)
  error = np.asarray(values(leaf)).reshape(blocks.shape) - blocks
  assert (np.abs(error) < 0.51 * steps).all()
  assert len(np.unique(np.asarray(leaf.arrays["qs"]))) > 2 * 2**bits


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_each_matrix_of_a_stack_is_quantized_on_its_own(format):
  stack = normal(3, 64 * 5, 24) * np.asarray([1, 10, 100], np.float32)[:, None, None]
  leaf = quantized(stack, format, axis=-2)
  assert leaf.shape == stack.shape
  _, layers = jax.lax.scan(lambda _, layer: (None, values(layer)), None, leaf)
  np.testing.assert_allclose(layers, values(leaf), rtol=1e-6)  # XLA may fuse a product and a sum
  for i, matrix in enumerate(stack):
    np.testing.assert_allclose(layers[i], values(quantized(matrix, format, -2)), rtol=1e-5)


@pytest.mark.parametrize("format", ["nf4", "Q8_0"])
def test_rows_are_dequantized_from_the_rows_of_the_arrays(format):
  leaf = quantized(normal(2, 7, 64 * 40), format)
  ids = jnp.asarray([5, 0, 5])
  rows = jax.jit(lambda leaf: leaf.rows(lambda array: array[:, ids]))(leaf)
  np.testing.assert_allclose(rows, values(leaf)[:, ids], rtol=1e-6)


def test_dequantizing_restores_the_dtype_the_axis_and_other_leaves():
  params = {
    "mlp": {"kernel": jnp.asarray(normal(64, 6), jnp.bfloat16), "bias": jnp.zeros(6)},
    "embed": jnp.asarray(normal(10, 64)),
  }
  out = lj.quantize(params, "nf4", target=r"mlp/kernel")
  out = lj.quantize(out, "Q8_0", target="embed", axis=-1)
  assert out["mlp"]["bias"] is params["mlp"]["bias"]
  kernel, embed = out["mlp"]["kernel"], out["embed"]
  assert (kernel.dtype, kernel.shape, kernel.axis) == (jnp.bfloat16, (64, 6), -2)
  assert (embed.format, embed.axis) == ("Q8_0", -1)
  columns = quantized(np.asarray(params["mlp"]["kernel"], np.float32).T, "nf4")
  columns = values(columns).T
  np.testing.assert_array_equal(values(kernel), columns.astype(jnp.bfloat16))


def test_a_block_of_zeros_stays_zero():
  for format in ("nf4", "rtn2", "Q4_0"):
    assert not np.asarray(values(quantized(np.zeros((2, 64)), format))).any()
