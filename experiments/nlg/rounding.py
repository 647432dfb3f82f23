"""Rounds a model's linear weights to the values of a quantized format, to measure the loss.

The rounded weights are float32 arrays, so training and decoding are as fast as with the model's own
weights. `model.param_dtype` keeps codes and scales in memory instead.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from experiments.harness.config import ALL_LINEAR
from experiments.nlg.config import Rounding
from lora_jax.quantization.formats import FORMATS
from lora_jax.trees import leaves_with_path, matches, replace_leaves


def rounded(params: PyTree, name: Rounding) -> PyTree:
  """Returns params with the kernels of the linear layers rounded; embeddings and head are kept.

  Args:
    params: float32.
    name: a format of `lora_jax.quantization`; "" rounds nothing.
  Raises:
    ValueError: if the number of inputs is not a multiple of the format's block.
  """
  if not name:
    return params
  kernels = {path: leaf for path, leaf in leaves_with_path(params) if matches(ALL_LINEAR, path)}
  return replace_leaves(params, {path: _round(path, leaf, name) for path, leaf in kernels.items()})


def bits_per_weight(name: str) -> float:
  """Returns the bits of a weight in a format, scales included.

  >>> bits_per_weight("rtn3"), round(bits_per_weight("nf4"), 3)
  (4.0, 4.127)
  """
  quantize = FORMATS[name].quantize
  assert quantize is not None, "the config names formats that can be written"
  values = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
  arrays = jax.eval_shape(quantize, values).values()
  return 8 * sum(array.size * array.dtype.itemsize for array in arrays) / values.size


def _round(path: str, kernel: Float[Array, "*stack d_in d_out"], name: str) -> Float[Array, "..."]:
  kind = FORMATS[name]
  assert kind.quantize is not None, "the config names formats that can be written"
  inputs, block = kernel.shape[-2], kind.block or 1
  if inputs % block:
    raise ValueError(
      f"model.rounded_to={name} rounds blocks of {block} inputs, and {path} has {inputs}. Choose "
      "another format or model"
    )
  return _through(kernel, name)


@functools.partial(jax.jit, static_argnums=1)
def _through(kernel: Float[Array, "*stack d_in d_out"], name: str) -> Float[Array, "..."]:
  quantize = FORMATS[name].quantize
  assert quantize is not None
  values = jnp.moveaxis(kernel, -2, -1)  # blocks run along the inputs, as in a file's rows
  return jnp.moveaxis(FORMATS[name].dequantize(quantize(values)), -1, -2)
