"""The formats that params are loaded in: floats of one dtype, or what `param_dtype` names.

    param_dtype      linear weights of layers    all others
    float32 ...      float32 ...                 float32 ...
    stored           as in the files             as in the files
    int8, nf4        quantized, one at a time    as in the files

As in the files means the blocks of a GGUF file, bit for bit, or floats of the dtype there.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.models.checkpoints.hub import FLOATS
from lora_jax.models.parts import fields
from lora_jax.quantization.format import Format
from lora_jax.quantization.formats import FORMATS
from lora_jax.quantization.ggml import GGML
from lora_jax.quantization.leaf import Quantized, is_quantized

STORED = "stored"
QUANTIZED = ("int8", "nf4")
BLOCKS: dict[str, Format] = {kind.name: kind for kind in GGML}
_LINEAR = re.compile(r".*/(query|key|value|out|gate|up|down)(/kernel)?")  # experts have no kernel


def weights_format(param_dtype: Any) -> str | None:
  """Returns `param_dtype` if it is not a dtype: `stored`, `int8` or `nf4`; None if it is one."""
  is_format = isinstance(param_dtype, str) and param_dtype in (STORED, *QUANTIZED)
  return param_dtype if is_format else None


def float_dtype(param_dtype: Any) -> Any:
  """Returns `param_dtype` if it is a dtype; float32 if it is a format.

  Raises:
    ValueError: if it is neither.
  """
  if weights_format(param_dtype) is not None:
    return "float32"
  try:
    fields.float_dtype("param_dtype", param_dtype)
  except ValueError as error:
    known = ", ".join((*fields.DTYPES, STORED, *QUANTIZED))
    raise ValueError(f"param_dtype must be one of {known}; got {param_dtype!r}") from error
  return param_dtype


def block_axis(path: str) -> int:
  """Returns the axis of a weight that its blocks run along: the inputs, or a lookup's values."""
  return -1 if path.endswith("embedding") else -2


def loaded_shape(
  path: str, leaf: Any, types: set[str], num_stacked: int, weights: str | None
) -> Any:
  """Returns the shape of a leaf as it is loaded: a `ShapeDtypeStruct`, or a `Quantized` of them.

  Args:
    path: of the leaf.
    leaf: its shape; and its dtype, if `weights` is None.
    types: of the tensors that hold it, by their names in the files.
    num_stacked: the number of its leading axes that are layers and experts.
    weights: the result of `weights_format`.
  Raises:
    ValueError: if tensors of a stack have several types, or a format does not fit the shape.
  """
  if weights is None:
    return leaf
  if weights in QUANTIZED and _LINEAR.fullmatch(path):
    return _quantized_shape(path, FORMATS[weights], leaf.shape)
  if len(types) > 1:
    raise ValueError(
      f"{path} is a stack of layers of the types {' and '.join(sorted(types))}, expected one type. "
      "Load the model with scan_layers=False, or with a float param_dtype"
    )
  (kind,) = types
  if kind in FLOATS:
    return leaf.update(dtype=jax.dtypes.canonicalize_dtype(FLOATS[kind]))
  if len(leaf.shape) - num_stacked < 2:  # a norm or a bias: too small to matter
    return leaf.update(dtype=jnp.dtype("float32"))
  return _quantized_shape(path, BLOCKS[kind], leaf.shape)


def _quantized_shape(path: str, kind: Format, shape: tuple[int, ...]) -> Quantized:
  axis, block = block_axis(path), kind.block or 1
  rest, size = [*shape], shape[axis]
  del rest[axis]
  if size % block:
    raise ValueError(
      f"{path} has {size} inputs, which blocks of {block} values in {kind.name} do not divide. "
      "Load the model with param_dtype='int8' or a float dtype"
    )
  if kind.name not in BLOCKS:
    assert kind.quantize is not None
    arrays = jax.eval_shape(kind.quantize, jax.ShapeDtypeStruct((*rest, size), jnp.float32))
  else:
    arrays = {
      name: jax.ShapeDtypeStruct((*rest, size // block, *part.shape), jnp.dtype(part.dtype))
      for name, part in kind.parts.items()
    }
  return Quantized(arrays, kind.name, axis)


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Returns shapes of params with the shardings of their weights, one for each."""
  return jax.tree.map(
    lambda leaf, sharding: (
      jax.tree.map(_with_sharding, leaf, leaf.shardings(sharding))
      if is_quantized(leaf)
      else _with_sharding(leaf, sharding)
    ),
    shapes,
    shardings,
    is_leaf=is_quantized,
  )


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
