"""Merges QA-LoRA into a quantized base model by adding the update to the blocks' minima.

    w + delta = d * code + (m + delta)          delta is the same in all of the block

Codes and scales are unchanged; only `m` is rounded again, to float16.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.copies import merged_leaves
from lora_jax.adapters.delta import LoraWeight, adapter_extra, adapter_weights
from lora_jax.adapters.layers import spread_layers
from lora_jax.adapters.targets import Target, find_leaves
from lora_jax.axes import RANK
from lora_jax.quantization.formats import FORMATS
from lora_jax.quantization.leaf import Quantized, is_quantized
from lora_jax.transform.factors import Factor
from lora_jax.trees import replace_leaves
from lora_jax.variants.qa_lora import ARRAYS, ungrouped

MERGEABLE = [name for name, kind in FORMATS.items() if "m" in kind.parts]
"""The formats whose blocks have a minimum that is one float16 number."""


def merge_quantized(
  config: LoraConfig, params: PyTree, trainable: PyTree
) -> tuple[PyTree, dict[str, float]]:
  """Merges a QA-LoRA adapter into the quantized weights that it adapts.

  The formats and sizes are unchanged. The only error is that of rounding each block's new minimum
  to float16, at most 2**-11 of it. Fully trained leaves of the config are replaced.

  Args:
    config: the adapter's config with its variant, as passed to `lora_jax.lora`.
    params: the base model's params; every adapted weight is quantized as Q4_1 or Q5_1 along its
      (last) input axis, and a group is a whole number of blocks.
    trainable: the adapter.

  Returns:
    The params, and by path the error of each adapted weight: its norm relative to the update's, 0
    without an update. It is large for small updates, such as those of a short training.
  Raises:
    ValueError: naming the weight, if it is not quantized so, is adapted by another variant, or a
      minimum exceeds float16's range; if the adapter is not for these params.
  """
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  weights = adapter_weights(trainable)
  for path, weight in weights.items():
    _check(targets[path], weight)
  merged, errors = {}, {}
  for path, weight in weights.items():
    merged[path], errors[path] = _merged(targets[path], weight)
  return replace_leaves(params, merged | merged_leaves(extra, adapter_extra(trainable))), errors


def _check(target: Target, weight: LoraWeight) -> None:
  path, leaf, dim = target.path, target.leaf, weight.axes.inputs[-1]
  if {spec.name: spec.words for spec in weight.table} != ARRAYS:
    raise ValueError(
      f"{path} is adapted by {weight.table}, and only QA-LoRA merges into quantized weights: "
      "others do not change a block by one number. Merge into floats: "
      "merge(lora_jax.dequantize(params), trainable)"
    )
  if not is_quantized(leaf):
    raise ValueError(
      f"{path} is not quantized; the adaptation's merge(params, trainable) is for it"
    )
  if leaf.format not in MERGEABLE:
    raise ValueError(
      f"{path} is stored as {leaf.format}, whose blocks have no float16 minimum to add the "
      f"update to; expected one of {', '.join(MERGEABLE)}"
    )
  if leaf.axis + leaf.ndim != dim:
    raise ValueError(
      f"{path}: its blocks run along axis {leaf.axis + leaf.ndim} of the shape {leaf.shape}, and "
      f"QA-LoRA's groups along its input axis {dim}; expected the same axis"
    )
  group_size, block = _group_size(leaf, weight), FORMATS[leaf.format].block
  assert block is not None, "formats with a minimum have blocks"
  if group_size % block:
    raise ValueError(
      f"{path}: groups of {group_size} inputs are not whole blocks of {leaf.format}, which have "
      f"{block}; train with a group_size that is a multiple of {block}"
    )


def _group_size(leaf: Any, weight: LoraWeight) -> int:
  num_inputs, _ = weight.axes.counts(leaf.shape)
  return num_inputs // weight.lora_a.shape[-2]


def _merged(target: Target, weight: LoraWeight) -> tuple[Quantized, float]:
  leaf = target.leaf
  minima, error, size = _added(leaf, weight, jnp.float32(target.scaling))
  if not np.isfinite(error):
    raise ValueError(
      f"{target.path}: a minimum exceeds float16's largest number, 65504, after merging; the "
      "adapter has diverged"
    )
  merged = Quantized({**leaf.arrays, "m": minima}, leaf.format, leaf.axis, leaf.dtype)
  return merged, float(error / size) if size else 0.0


@jax.jit
def _added(
  leaf: Quantized, weight: LoraWeight, scaling: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the minima plus the update, float16; the norms of its rounding and of the update."""
  axes, minima = weight.axes, leaf.arrays["m"].astype(jnp.float32)
  *lead, dim = axes.inputs
  a, b = (Factor(weight.arrays[name], axes.labels(words)) for name, words in ARRAYS.items())
  rows = ungrouped(a, axes.inputs, [*(leaf.shape[other] for other in lead), minima.shape[-1]])
  if weight.layers is not None:
    stack = axes.batch[0]
    rows, b = (spread_layers(x, stack, weight.layers, leaf.shape[stack], 0.0) for x in (rows, b))
  stored = (*(other for other in range(leaf.ndim) if other != dim), dim)
  delta = scaling * rows.sum_over(b, (RANK,)).along(stored)
  merged = (minima + delta).astype(jnp.float16)
  error = (merged.astype(jnp.float32) - minima) - delta
  return merged, jnp.linalg.norm(error), jnp.linalg.norm(delta)
