"""LoftQ (Li et al. 2023, arXiv 2310.08659, sec. 3, algorithm 1): LoRA's start for a quantized base.

    W ~ Q + scaling * A B          Q quantized, A (in, rank), B (rank, out)

From A B = 0, two steps alternate:

    Q = quantize(W - scaling * A B)
    A, B = U sqrt(S / scaling), sqrt(S / scaling) V^T     the first rank terms of W - Q = U S V^T

so that step 0 is nearer to the base model before quantization. Afterwards A and B are LoRA's in
every respect, on the base model Q. The paper's scaling is 1, and it takes 5 iterations.

An iteration may increase the error, since quantizers round to the nearest level of their own
scales and not to the nearest of all weights they can express. The best iterate of each weight is
returned. With one iteration, Q is the quantized W: the base model that others have, too.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.adapters.checks import check_adapter, check_plain
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight, Site, adapter_weights, is_lora_weight
from lora_jax.adapters.initializers import kaiming_uniform
from lora_jax.adapters.targets import Target, find_leaves
from lora_jax.adapters.weights import merge_weight
from lora_jax.fields import Count, read_value
from lora_jax.placement import leaf_sharding, place
from lora_jax.quantization.leaf import Quantized, is_quantized
from lora_jax.quantization.quantize import quantize
from lora_jax.trees import leaves_with_path, replace_leaves, weights_with_path
from lora_jax.variants.lora import LORA
from lora_jax.variants.svd import balanced, matrices, some, svd


class QuantizationError(NamedTuple):
  """The error of a quantized weight, in the Frobenius norm, relative to the weight's.

  Attributes:
    rounded: of the quantized weight alone, |W - quantize(W)| / |W|.
    corrected: with the initial adapter, |W - (Q + scaling * A B)| / |W|.
  """

  rounded: float
  corrected: float


def loftq(
  config: LoraConfig,
  trainable: PyTree,
  params: PyTree,
  format: str,
  num_iterations: int = 5,
  axis: int = -2,
) -> tuple[PyTree, PyTree, dict[str, QuantizationError]]:
  """Quantizes the adapted weights, and initializes their adapter to reduce the error.

  >>> import lora_jax
  >>> params = {"kernel": jax.random.normal(jax.random.key(1), (64, 48))}
  >>> fn, x = lambda params, x: x @ params["kernel"], jnp.ones((3, 64))
  >>> config = LoraConfig(rank=8, alpha=8.0, target="kernel")
  >>> adapted = lora_jax.lora(fn, config)
  >>> trainable = adapted.init(jax.random.key(0), params, x)
  >>> base, trainable, errors = loftq(config, trainable, params, "nf4")
  >>> base["kernel"]
  Quantized(nf4, float32 of shape (64, 48))
  >>> errors["kernel"].corrected < 0.8 * errors["kernel"].rounded
  True
  >>> adapted.apply(base, trainable, x).shape
  (3, 48)

  Args:
    config: of plain LoRA. Only the weights that it adapts are quantized: `lora_jax.quantize` does
      others.
    trainable: the adapter, as `init` returns it.
    params: the base model's params, floating-point.
    format, axis: as in `lora_jax.quantize`; one axis for all weights.
    num_iterations: 1 or more.

  Returns:
    The params with quantized weights, the adapter, and the errors by path.
  Raises:
    ValueError: if the adapter is not for these params or not of plain LoRA; as `lora_jax.quantize`
      does; if a scaling is negative.
  """
  count = read_value(Count, num_iterations, "num_iterations")
  targets, weights = _checked(config, trainable, params)
  leaves: dict[str, Quantized] = {}
  fitted: dict[str, LoraWeight] = {}
  errors: dict[str, QuantizationError] = {}
  for path, weight in weights.items():
    target = targets[path]

    def rounded(w: jax.Array, path: str = path, dtype: Any = target.leaf.dtype) -> Quantized:
      leaf = quantize({path: w}, format, re.escape(path), axis)[path]
      return Quantized(leaf.arrays, format, axis, dtype)

    leaves[path], fitted[path], errors[path] = _alternated(target, weight, rounded, count)
  return replace_leaves(params, leaves), _with_weights(trainable, fitted), errors


def loftq_adapter(
  config: LoraConfig, trainable: PyTree, params: PyTree, base: PyTree
) -> tuple[PyTree, dict[str, QuantizationError]]:
  """Initializes the adapter of a base model that is quantized already: one iteration.

  The base model is unchanged: codes that others have too, or weights rounded to a format's values.
  Adapted weights that `base` has unquantized keep their adapter.

  Args:
    config: of plain LoRA.
    trainable: the adapter, as `init` returns it.
    params: the base model's params before quantization.
    base: its params after; of the same paths and shapes.

  Returns:
    The adapter, and the errors by path.
  Raises:
    ValueError: if no adapted weight differs between `params` and `base`; if the adapter is not for
      these params or not of plain LoRA; if a scaling is negative.
  """
  targets, weights = _checked(config, trainable, params)
  leaves = dict(weights_with_path(base))
  fitted: dict[str, LoraWeight] = {}
  errors: dict[str, QuantizationError] = {}
  for path, weight in weights.items():
    target, leaf = targets[path], leaves.get(path)
    if leaf is None or leaf.shape != target.leaf.shape:
      got = "no such leaf" if leaf is None else f"the shape {leaf.shape}"
      raise ValueError(f"{path}: base has {got}, expected the shape {target.leaf.shape} of params")
    near, error = _nearest(target, weight, leaf)
    if error.rounded > 0:
      fitted[path], errors[path] = near, error
  if not fitted:
    raise ValueError(
      f"none of the {len(weights)} adapted weights differs in `base` from `params`: there is no "
      "error of quantization to correct. Quantize them, as by lora_jax.quantize, or use plain LoRA"
    )
  return _with_weights(trainable, fitted), errors


def _checked(
  config: LoraConfig, trainable: PyTree, params: PyTree
) -> tuple[dict[str, Target], dict[str, LoraWeight]]:
  """Returns the targets and the adapted weights by path; params must be real and unquantized."""
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  weights = adapter_weights(trainable)
  for path, weight in weights.items():
    check_plain(path, weight, "LoftQ")
    leaf = targets[path].leaf
    if is_quantized(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
      got = f"is quantized already, as {leaf.format}" if is_quantized(leaf) else "is only a shape"
      raise ValueError(
        f"{path} {got}, and LoftQ needs the values before quantization. Load the params in a float "
        "dtype; lora_jax.loftq_adapter takes them beside the quantized ones"
      )
  return targets, weights


def _alternated(
  target: Target, weight: LoraWeight, rounded: Callable[[jax.Array], Quantized], count: int
) -> tuple[Quantized, LoraWeight, QuantizationError]:
  """Returns the best of `count` iterates of algorithm 1, and its error beside the first Q's."""
  wide = jnp.asarray(target.leaf, jnp.float32)
  best: tuple[Quantized, LoraWeight, QuantizationError] | None = None
  remaining, first = wide, 0.0
  for iteration in range(count):
    leaf = rounded(remaining)
    fitted, error = _nearest(target, weight, leaf)
    first = first if iteration else error.rounded
    if best is None or error.corrected < best[2].corrected:
      best = leaf, fitted, QuantizationError(first, error.corrected)
    remaining = merge_weight(wide, fitted, LORA, -target.scaling)
  assert best is not None, "there is an iteration"
  return best


def _nearest(target: Target, weight: LoraWeight, leaf: Any) -> tuple[LoraWeight, QuantizationError]:
  """Returns the adapter that is nearest to a weight minus its quantized one, and the errors."""
  wide = jnp.asarray(target.leaf, jnp.float32)
  values = leaf.dequantize() if is_quantized(leaf) else jnp.asarray(leaf)
  residual = wide - values.astype(jnp.float32)
  settings = weight.axes, weight.rank, weight.layers, kaiming_uniform
  site = Site(target.path, residual, *settings, scaling=target.scaling)
  with jax.default_matmul_precision("float32"):
    pair = balanced(site, some(svd(matrices(site)), slice(weight.rank)))
    a, b = (
      place(array, leaf_sharding(old))
      for array, old in zip(pair, (weight.lora_a, weight.lora_b), strict=True)
    )
    fitted = weight.replace(lora_a=a, lora_b=b)
    rest = merge_weight(residual, fitted, LORA, -target.scaling)
  norm, before, after = (float(jnp.linalg.norm(x)) for x in (wide, residual, rest))
  norm = norm or 1.0  # a weight that is initialized to 0 has no error
  return fitted, QuantizationError(before / norm, after / norm)


def _with_weights(trainable: PyTree, fitted: dict[str, LoraWeight]) -> PyTree:
  """Returns a trainable tree with some of its adapted weights replaced."""
  nodes = leaves_with_path(trainable, is_leaf=is_lora_weight)
  structure = jax.tree.structure(trainable, is_leaf=is_lora_weight)
  return jax.tree.unflatten(structure, [fitted.get(path, node) for path, node in nodes])
