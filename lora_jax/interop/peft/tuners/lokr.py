"""LoKr: the two matrices of a Kronecker product, each whole or as a pair of factors.

    base_model.model.model.layers.0.self_attn.q_proj.lokr_w1     (out1, in1)    w1, transposed
    base_model.model.model.layers.0.self_attn.q_proj.lokr_w2_a   (out2, rank)   w2_b, transposed
    base_model.model.model.layers.0.self_attn.q_proj.lokr_w2_b   (rank, in2)    w2_a, transposed

PEFT has a pair for W2 if the rank is less than half of its longer side, and with `decompose_both`
for W1 in the same way. Written are these: another pair is multiplied out, which is exact, and a
whole W2 gets a rank that keeps it whole, with the alpha of the same scaling.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.fields import LokrFields
from lora_jax.interop.peft.leaves import Part
from lora_jax.interop.peft.modules import Arrays, Module
from lora_jax.interop.peft.parts import AdapterParts
from lora_jax.interop.peft.tuners.tuner import (
  Parts,
  Shapes,
  Tuner,
  Written,
  alpha_fields,
  key,
  only,
  rank_fields,
)
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.variants.lokr import factors_of, lokr_variant, weight

THEIRS = {  # where ours are (in, out)
  **{"w1": "lokr_w1", "w1_a": "lokr_w1_b", "w1_b": "lokr_w1_a"},
  **{"w2": "lokr_w2", "w2_a": "lokr_w2_b", "w2_b": "lokr_w2_a"},
}
Sides = tuple[tuple[int, int], tuple[int, int]]
"""The shapes of W1 and W2, (in1, out1) and (in2, out2)."""


def _sides(module: Module, factor: int) -> Sides:
  (in1, in2), (out1, out2) = (factors_of(n, factor) for n in (module.inputs, *module.outputs))
  return (in1, out1), (in2, out2)


def _is_pair(rank: int, side: tuple[int, int]) -> bool:
  return rank < max(side) / 2


def _shapes(
  config: PeftConfig, modules: Sequence[Module], tensors: Sequence[StoredTensor]
) -> Shapes:
  del tensors
  fields: LokrFields = config.fields
  shapes: Shapes = {}
  for module in modules:
    rank, sides = config.rank_of(module.name), _sides(module, fields.decompose_factor)
    for name, side in zip(("lokr_w1", "lokr_w2"), sides, strict=True):
      num_inputs, num_outputs = side
      if (name == "lokr_w2" or fields.decompose_both) and _is_pair(rank, side):
        shapes[key(module, f"{name}_a")] = num_outputs, rank
        shapes[key(module, f"{name}_b")] = rank, num_inputs
      else:
        shapes[key(module, name)] = num_outputs, num_inputs
  return shapes


def _read(
  config: PeftConfig, modules: Sequence[Module], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  del leaves
  parts = {}
  for module in modules:
    ours: dict[str, np.ndarray] = {}
    for name in ("w1", "w2"):
      is_whole = key(module, THEIRS[name]) in arrays
      for each in (name,) if is_whole else (f"{name}_a", f"{name}_b"):
        ours[each] = arrays[key(module, THEIRS[each])].T
    if "w2" in ours:
      ours = _multiplied_out(ours, "w1")  # there is no variant with a pair for W1 only
    decompose = "none" if "w2" in ours else "w2" if "w1" in ours else "both"
    variant = lokr_variant(config.fields.decompose_factor, decompose)
    rank, scaling = config.rank_of(module.name), config.scaling_of(module.name)
    parts[module] = [Part(variant, ours, rank, scaling)]
  return parts


def _multiplied_out(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
  """Returns the arrays with one matrix whole."""
  if name in arrays:
    return arrays
  pair = f"{name}_a", f"{name}_b"
  rest = {other: array for other, array in arrays.items() if other not in pair}
  return rest | {name: arrays[pair[0]] @ arrays[pair[1]]}


def _write(parts: Parts, adapter: AdapterParts) -> Written:
  del adapter
  of_modules = {module: only(of_module) for module, of_module in parts.items()}
  factor = _factor(of_modules)
  both = all("w1_a" in part.arrays for part in of_modules.values())
  tensors: Arrays = {}
  ranks: dict[Module, int] = {}
  alphas: dict[Module, float] = {}
  for module, part in of_modules.items():
    rank, arrays = part.rank, part.arrays
    side1, side2 = _sides(module, factor)
    if "w2" in arrays:
      rank = max(rank, math.ceil(max(side2) / 2))
    if not both or not _is_pair(rank, side1):
      arrays = _multiplied_out(arrays, "w1")
    if not _is_pair(rank, side2):
      arrays = _multiplied_out(arrays, "w2")
    for name, array in arrays.items():
      tensors[key(module, THEIRS[name])] = array.T
    ranks[module], alphas[module] = rank, part.scaling * rank
  fields = {"decompose_both": both, "decompose_factor": factor}
  return Written(rank_fields(ranks) | alpha_fields(alphas) | fields, tensors)


def _factor(parts: Mapping[Module, Part]) -> int:
  """Returns PEFT's one `decompose_factor`, with which all matrices have these sizes."""
  sizes = {module: _sizes(part.arrays) for module, part in parts.items()}
  longest = max(max(module.inputs, *module.outputs) for module in parts)
  firsts = (size for (in1, out1), _ in sizes.values() for size in (in1, out1))
  for factor in (-1, *range(1, max(*firsts, math.isqrt(longest)) + 1)):
    if all(_sides(module, factor) == size for module, size in sizes.items()):
      return factor
  first = {f"{m.name} {m.inputs} x {m.outputs[0]}": size[0] for m, size in sizes.items()}
  shown = ", ".join(f"W1 {size} of {name}" for name, size in list(first.items())[:4])
  raise ValueError(
    f"PEFT's LoKr has one decompose_factor for all modules, and none gives {shown}. Take "
    "lora_jax.to_lora, or train with one factor"
  )


def _sizes(arrays: Mapping[str, np.ndarray]) -> Sides:
  """Returns the shapes of W1 and W2."""

  def size(name: str) -> tuple[int, int]:
    if name in arrays:
      num_inputs, num_outputs = arrays[name].shape
      return num_inputs, num_outputs
    return arrays[f"{name}_a"].shape[0], arrays[f"{name}_b"].shape[1]

  return size("w1"), size("w2")


TUNER = Tuner("LoKr", (weight,), _shapes, _read, _write, has_conv1d=False, splits=False)
