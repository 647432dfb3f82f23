"""Rewrites adapters as plain LoRA, exactly, for formats of other packages that have nothing else.

QA-LoRA    A, (in / group_size, rank), becomes (in, rank): each row is repeated over its group
"""

import numpy as np

from lora_jax.adapters.delta import LORA_TABLE, LoraWeight
from lora_jax.adapters.layers import stored_shape
from lora_jax.variants import qa_lora


def is_grouped(weight: LoraWeight) -> bool:
  """Returns whether a weight is adapted by QA-LoRA, in groups of any size."""
  return {spec.name: spec.words for spec in weight.table} == qa_lora.ARRAYS


def without_groups(weight: LoraWeight, shape: tuple[int, ...]) -> LoraWeight:
  """Returns QA-LoRA's arrays of a weight as LoRA's, of the same rank and scaling.

  Args:
    weight: adapted by QA-LoRA.
    shape: of the weight.
  """
  axes, rank = weight.axes, weight.lora_b.shape[len(weight.axes.batch)]
  shape = stored_shape(shape, axes, weight.layers)
  count = axes.counts(shape)[0] // weight.lora_a.shape[-2]
  rows = np.repeat(np.asarray(weight.lora_a), count, axis=-2)
  a = rows.reshape(axes.array_shape(LORA_TABLE.specs[0].words, shape, {"rank": rank}))
  return LoraWeight(a, weight.lora_b, axes, weight.layers)
