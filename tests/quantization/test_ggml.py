"""llama.cpp's formats against the package `gguf`: the same bytes, and the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from lora_jax.quantization import ggml
from lora_jax.quantization.formats import FORMATS

NAMES = [kind.name for kind in ggml.GGML]
QUANTIZED = [kind.name for kind in ggml.GGML if kind.quantize]


def random_blocks(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Random bytes: every code, and scales of any float16, infinite and NaN too."""
  size = shape[-1] * ggml.block_bytes(FORMATS[name])
  generator = np.random.default_rng(NAMES.index(name))
  return generator.integers(0, 256, (*shape[:-1], size), dtype=np.uint8)


def reference(name: str, raw: np.ndarray) -> np.ndarray:
  with np.errstate(all="ignore"):
    return quants.dequantize(raw, GGMLQuantizationType[name])


def test_there_is_a_format_for_each_type_that_gguf_dequantizes():
  floats = {"F32", "F16", "BF16"}
  known = {type_.name for type_ in quants._type_traits} - floats
  assert set(NAMES) == known


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_split_into_fields_and_joined(name):
  kind = FORMATS[name]
  assert (kind.block, ggml.block_bytes(kind)) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]
  raw = random_blocks(name, (2, 3, 4))
  arrays = ggml.split(kind, raw)
  for part, array in zip(kind.parts.values(), arrays.values(), strict=True):
    assert (array.shape, array.dtype) == ((2, 3, 4, *part.shape), part.dtype)
  np.testing.assert_array_equal(ggml.join(kind, arrays), raw)


@pytest.mark.parametrize("name", NAMES)
def test_values_equal_those_of_gguf_bit_for_bit(name):
  kind = FORMATS[name]
  raw = random_blocks(name, (8, 40))
  if name == "MXFP4":  # scale bytes of 0 and 1 are below float32's smallest normal number
    raw.reshape(-1, 17)[:, 0] = np.maximum(raw.reshape(-1, 17)[:, 0], 2)
  expected = reference(name, raw)
  arrays = jax.tree.map(jnp.asarray, ggml.split(kind, raw))
  finite = np.isfinite(expected)
  assert finite.mean() > 0.8
  for values in (kind.dequantize(arrays), jax.jit(kind.dequantize)(arrays)):
    values = np.asarray(values)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)  # infinities and NaNs in the same places
    np.testing.assert_array_equal(values[finite].view("i4"), expected[finite].view("i4"))


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_values_equal_those_of_gguf_bit_for_bit(name):
  kind = FORMATS[name]
  x = np.random.default_rng(1).normal(size=(64, 8 * kind.block)).astype(np.float32)
  x[0] = 0
  x[1] = 1.5
  x[2:20] = x[2:20].astype(np.float16)  # with ties
  x[20:30] *= 1e-3
  expected = quants.quantize(x, GGMLQuantizationType[name])
  for arrays in (kind.quantize(x), jax.jit(kind.quantize)(x)):
    assert set(arrays) == set(kind.parts)
    np.testing.assert_array_equal(ggml.join(kind, arrays), expected)
