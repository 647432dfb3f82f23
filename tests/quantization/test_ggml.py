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


def optimized(fn):
  """Returns a function compiled as for users: LLVM may fuse a product with a sum."""
  options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
  return lambda x: jax.jit(fn).lower(x).compile(compiler_options=options)(x)


def named(names: list[str], short: set[str]):
  """Returns every format compiled, and a few op by op; all the others so are `long`."""
  cases = []
  for name in names:
    cases.append(pytest.param(optimized, name, id=f"jit-{name}"))
    marks = [] if name in short else [pytest.mark.long]
    cases.append(pytest.param(lambda fn: fn, name, id=f"eager-{name}", marks=marks))
  return cases


@pytest.mark.parametrize(("compiled", "name"), named(NAMES, {"Q4_1", "Q6_K", "Q8_0"}))
def test_values_equal_those_of_gguf_bit_for_bit(compiled, name):
  kind = FORMATS[name]
  raw = random_blocks(name, (8, 40))
  if name == "MXFP4":  # scale bytes of 0 and 1 are below float32's smallest normal number
    raw.reshape(-1, 17)[:, 0] = np.maximum(raw.reshape(-1, 17)[:, 0], 2)
  expected = reference(name, raw)
  finite = np.isfinite(expected)
  assert finite.mean() > 0.8
  arrays = jax.tree.map(jnp.asarray, ggml.split(kind, raw))
  values = np.asarray(compiled(kind.dequantize)(arrays))
  assert values.dtype == np.float32
  np.testing.assert_array_equal(values, expected)  # infinities and NaNs in the same places
  np.testing.assert_array_equal(values[finite].view("i4"), expected[finite].view("i4"))


def test_the_smallest_scales_of_mxfp4_are_near_0():
  kind = FORMATS["MXFP4"]
  raw = random_blocks("MXFP4", (2, 2))
  raw.reshape(-1, 17)[:, 0] = [0, 1, 0, 1]
  arrays = jax.tree.map(jnp.asarray, ggml.split(kind, raw))
  assert np.abs(np.asarray(kind.dequantize(arrays)) - reference("MXFP4", raw)).max() < 2.0**-122


@pytest.mark.parametrize(("compiled", "name"), named(QUANTIZED, {"Q4_1", "Q8_0"}))
def test_quantized_values_equal_those_of_gguf_bit_for_bit(compiled, name):
  kind = FORMATS[name]
  x = np.random.default_rng(1).normal(size=(64, 8 * kind.block)).astype(np.float32)
  x[0] = 0
  x[1] = 1.5
  x[2:20] = x[2:20].astype(np.float16)  # with ties
  x[20:30] *= 1e-3
  x[30:40, :: kind.block] = np.nextafter(np.float32(8), np.float32(0))  # a logarithm of 3, rounded
  expected = quants.quantize(x, GGMLQuantizationType[name])
  arrays = compiled(kind.quantize)(jnp.asarray(x))
  assert set(arrays) == set(kind.parts)
  np.testing.assert_array_equal(ggml.join(kind, arrays), expected)


def test_values_halfway_between_two_codes_are_rounded_as_by_gguf():
  """A product that is fused with a sum is rounded once, to another code."""
  draw = np.random.default_rng(2)
  steps = draw.uniform(0.1, 1, (2048, 1)).astype(np.float32)
  x = ((draw.integers(-8, 8, (2048, 32)) + 0.5) * steps).astype(np.float32)
  x[:, :1] = -8 * steps
  expected = quants.quantize(x, GGMLQuantizationType["Q4_0"])
  arrays = optimized(FORMATS["Q4_0"].quantize)(jnp.asarray(x))
  np.testing.assert_array_equal(ggml.join(FORMATS["Q4_0"], arrays), expected)


def test_there_is_a_quantizer_for_each_of_gguf():
  def is_quantizer(type_):
    try:
      quants.quantize(np.ones((1, 256), np.float32), type_)
    except NotImplementedError:
      return False
    return True

  writable = {name for name in NAMES if is_quantizer(GGMLQuantizationType[name])}
  assert set(QUANTIZED) == writable


def test_a_part_of_a_block_is_refused():
  with pytest.raises(ValueError, match=r"Q4_1 has blocks of 20 bytes, .* got uint8 \(2, 30\)"):
    ggml.split(FORMATS["Q4_1"], np.zeros((2, 30), np.uint8))
