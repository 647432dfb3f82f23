"""Traces a function to a jaxpr; leaves that are not arrays are static."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.placement import leaf_sharding
from lora_jax.quantization.leaf import Quantized, is_quantized
from lora_jax.trees import weights_with_path


@dataclasses.dataclass(frozen=True)
class TracedCall:
  """One call `fn(params, *args, **kwargs)` as a jaxpr.

  Attributes:
    jaxpr: the closed jaxpr of the call in its array leaves.
    leaves: those leaves, in the jaxpr's order; quantized weights as they are.
    position: for each path of `params`, the index of its leaf in `leaves`.
    out_tree: the structure of the call's output.
  """

  jaxpr: Any
  leaves: list[Any]
  position: dict[str, int]
  out_tree: Any


def is_array(leaf: Any) -> bool:
  """Tells arrays, tracers, `ShapeDtypeStruct`s and quantized weights from static leaves.

  NumPy's arrays of strings, objects and dates are static.
  """
  if isinstance(leaf, np.ndarray | np.generic):
    return leaf.dtype.kind in "iufc" or _is_jax_dtype(leaf.dtype)
  return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | Quantized)


@functools.lru_cache
def _is_jax_dtype(dtype: np.dtype) -> bool:
  try:
    jax.typeof(np.zeros((), dtype))
  except TypeError:
    return False
  return True


def trace_call(
  fn: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> TracedCall:
  """Traces `fn(params, *args, **kwargs)`; leaves that are not arrays are static.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    params: the parameter tree, of arrays or `ShapeDtypeStruct`s.
    args: positional arguments; bools, numbers, strings, functions and None are static.
    kwargs: keyword arguments.
  Raises:
    ValueError: if a leaf is a NumPy array of numbers that JAX does not have.
  """
  for name, inputs in (("params", params), ("args", tuple(args)), ("kwargs", dict(kwargs))):
    for path, leaf in weights_with_path(inputs):
      check_dtype(f"{name}: {path}", leaf)
  leaves, tree = jax.tree.flatten((params, tuple(args), dict(kwargs)), is_leaf=is_quantized)
  dynamic = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

  def call(arrays):
    filled = list(leaves)
    for i, array in zip(dynamic, arrays, strict=True):
      filled[i] = array
    params, args, kwargs = jax.tree.unflatten(tree, filled)
    return fn(params, *args, **kwargs)

  arrays = [leaves[i] for i in dynamic]
  jaxpr, out_shape = jax.make_jaxpr(call, return_shape=True)([_as_float(leaf) for leaf in arrays])
  place = {leaf: order for order, leaf in enumerate(dynamic)}
  paths = [path for path, _ in weights_with_path(params)]
  position = {path: place[i] for i, path in enumerate(paths) if i in place}
  return TracedCall(jaxpr, arrays, position, jax.tree.structure(out_shape))


def _as_float(leaf: Any) -> Any:
  """Returns a quantized weight as the floating-point array that the function sees."""
  if not is_quantized(leaf):
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding(leaf))


def check_dtype(path: str, leaf: Any) -> None:
  """Raises ValueError if a leaf is a NumPy array of numbers that JAX does not have."""
  is_numpy = isinstance(leaf, np.ndarray | np.generic) and is_array(leaf)
  if is_numpy and not _is_jax_dtype(leaf.dtype):
    kind = leaf.dtype.newbyteorder("=").name
    order = "" if leaf.dtype.isnative else " in another byte order"
    raise ValueError(
      f"{path} is a NumPy array of {kind}{order}, which JAX does not have. Convert it, as by "
      "x.astype(np.float32)"
    )
