"""A method of PEFT: what it stores of each module, and how that is read and written."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.adapters.delta import LoraWeight
from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.leaves import Part
from lora_jax.interop.peft.modules import PREFIX, Arrays, Module
from lora_jax.interop.peft.names import pattern_of
from lora_jax.interop.peft.parts import AdapterParts
from lora_jax.models.checkpoints.hub import StoredTensor

Shapes = dict[str, tuple[int, ...]]
Parts = Mapping[Module, Sequence[Part | None]]
"""Of each module, the part of each of our leaves; None for those that are not adapted."""


class Written(NamedTuple):
  """The fields of `adapter_config.json` that are the method's own, and the tensors by name."""

  fields: dict[str, Any]
  arrays: Arrays


def no_shared(arrays: Arrays) -> dict[str, LoraWeight]:
  """Returns the shared nodes of a method that has none."""
  del arrays
  return {}


@dataclasses.dataclass(frozen=True)
class Tuner:
  """How PEFT stores one of its methods.

  Attributes:
    name: of the method, for messages.
    equations: the `weight` functions of the variants that it is here.
    shapes: `shapes(config, modules, tensors)`, the shapes of its tensors by name.
    read: `read(config, modules, arrays, leaves)`, the parts of each module.
    write: `write(parts, adapter)`, the opposite; raises ValueError for what PEFT does not have.
    read_shared: the nodes of arrays that all weights share, by path, from the tensors.
    has_linear: whether PEFT has it for linear layers.
    has_conv1d: whether also for GPT-2's `Conv1D`, a linear layer stored as (in, out).
    has_embeddings: whether it has it for embeddings.
    splits: whether a module's arrays divide into those of the weights that it fuses.
    only_biases: the value of `bias` that trains those of the adapted modules; None without `bias`.
    dropout: the field of a dropout that is LoRA's, or None.
  """

  name: str
  equations: tuple[Callable[..., Any], ...]
  shapes: Callable[[PeftConfig, Sequence[Module], Sequence[StoredTensor]], Shapes]
  read: Callable[
    [PeftConfig, Sequence[Module], Arrays, Mapping[str, Any]], dict[Module, list[Part]]
  ]
  write: Callable[[Parts, AdapterParts], Written]
  read_shared: Callable[[Arrays], dict[str, LoraWeight]] = no_shared
  has_linear: bool = True
  has_conv1d: bool = True
  has_embeddings: bool = False
  splits: bool = True
  only_biases: str | None = None
  dropout: str | None = None

  def check(self, where: Path, modules: Sequence[Module]) -> None:
    """Raises ValueError naming a module for which PEFT lacks the method, or whose is not read.

    Args:
      where: the file or folder, for messages.
      modules: the adapted ones.
    """
    for module in modules:
      if reason := self._reason(module):
        raise ValueError(
          f"{where}: {module.name} {reason}. Take plain LoRA, by lora_jax.to_lora or "
          "lora_jax.convert, or merge the adapter: lora_jax.interop.save_merged, or "
          "merge_and_unload in PEFT"
        )

  def _reason(self, module: Module) -> str:
    stored = module.stored
    if stored.is_parameter or stored.expert is not None:
      return f"is of experts, for which PEFT has no {self.name}"
    if module.is_conv:
      return f"is a convolution, whose {self.name} PEFT stores in another way"
    if stored.is_embedding:
      return "" if self.has_embeddings else f"is an embedding, for which PEFT has no {self.name}"
    if not self.has_linear:
      return f"is a linear layer, for which PEFT has no {self.name}"
    if not stored.transposed and not self.has_conv1d:
      return f"is a Conv1D of transformers, for which PEFT has no {self.name}"
    if len(stored.paths) > 1 and not self.splits:
      return f"is the fused {', '.join(stored.paths)}, whose {self.name} there cannot be divided"
    return ""


def key(module: Module, name: str) -> str:
  """Returns the name of a tensor in the file."""
  return f"{PREFIX}{module.name}.{name}"


def only(parts: Sequence[Part | None]) -> Part:
  """Returns the part of a module that fuses no weights."""
  (part,) = parts
  assert part is not None, "a module with no adapted weight is not written"
  return part


def joined(
  parts: Sequence[Part | None],
  outputs: Sequence[int],
  of_inputs: Sequence[str],
  of_outputs: Sequence[str],
) -> dict[str, np.ndarray]:
  """Returns the arrays of a module from those of the weights that it fuses.

  Ranks add up, with zeros for the other weights' outputs; equal arrays of inputs are written once.

  Args:
    parts: of the weights, None for those that are not adapted.
    outputs: the number of outputs of each.
    of_inputs: the names of arrays (..., rank), which all outputs share.
    of_outputs: the names of arrays (rank, out).
  """
  blocks: list[dict[str, np.ndarray]] = []
  starts = np.cumsum([0, *outputs])
  for part, start, stop in zip(parts, starts, starts[1:], strict=False):
    if part is None:
      continue
    arrays = part.arrays
    same = (b for b in blocks if all(np.array_equal(b[name], arrays[name]) for name in of_inputs))
    block = next(same, None)
    if block is None:
      rank = arrays[of_outputs[0]].shape[0]
      zeros = {name: np.zeros((rank, starts[-1]), np.float32) for name in of_outputs}
      block = {name: arrays[name] for name in of_inputs} | zeros
      blocks.append(block)
    for name in of_outputs:
      block[name][:, start:stop] = arrays[name]
  return {
    name: np.concatenate([block[name] for block in blocks], axis=-1 if name in of_inputs else 0)
    for name in (*of_inputs, *of_outputs)
  }


def rank_fields(ranks: Mapping[Module, int], name: str = "r") -> dict[str, Any]:
  """Returns the fields of the ranks of modules."""
  rank, others = pattern_of({module.name: rank for module, rank in ranks.items()})
  return {name: rank, "rank_pattern": others}


def alpha_fields(alphas: Mapping[Module, float]) -> dict[str, Any]:
  """Returns the fields of the alphas of modules."""
  alpha, others = pattern_of({module.name: whole_number(a) for module, a in alphas.items()})
  return {"alpha": alpha, "alpha_pattern": others}


def whole_number(value: float) -> float:
  """Returns an integer where a number is one, as PEFT writes it."""
  return int(value) if value == int(value) else value


def one_of_all(values: Mapping[Module, Any], tuner: str, field: str) -> Any:
  """Returns the value that all modules have; raises ValueError if they differ."""
  different = list(dict.fromkeys(values.values()))
  if len(different) > 1:
    examples = [next(m.name for m in values if values[m] == value) for value in different[:2]]
    raise ValueError(
      f"PEFT's {tuner} has one {field} for all modules, and {examples[0]} has {different[0]}, "
      f"{examples[1]} {different[1]}. Take plain LoRA, by lora_jax.to_lora or lora_jax.convert"
    )
  return different[0]
