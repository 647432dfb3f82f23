"""Compares the tensors of a model's files with those that it should have."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_jax.models.checkpoints.gguf_tensors import GGUFTensors
from lora_jax.models.checkpoints.hub import Tensors
from lora_jax.models.checkpoints.recognize import Stored


def check_tensors(
  folder: Path,
  tensors: Tensors | GGUFTensors,
  expected: Mapping[str, tuple[int, ...]],
  ignored: Callable[[str], bool] = lambda name: False,
) -> None:
  """Raises ValueError naming each tensor that is missing, unexpected, misshapen or not a float."""
  stored = {
    name: Stored(tensors.shape(name), tensors.dtype(name)) for name in tensors if not ignored(name)
  }
  faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in stored]
  faults += [
    f"unexpected {name} {tensor.shape}" for name, tensor in stored.items() if name not in expected
  ]
  faults += [
    f"{name} has shape {stored[name].shape}, expected {shape}"
    for name, shape in expected.items()
    if name in stored and stored[name].shape != shape
  ]
  faults += [
    f"{name} is of {stored[name].dtype}, expected one of {', '.join(tensors.readable)}"
    for name in expected
    if name in stored and stored[name].dtype not in tensors.readable
  ]
  if faults:
    cause = tensors.explain(stored, expected)
    more = f"; and {len(faults) - 12} more" if len(faults) > 12 else ""
    raise ValueError(
      f"{folder}: {cause}{'. ' if cause else ''}The tensors are not those of its "
      f"{tensors.described_by}: "
      f"{'; '.join(faults[:12])}{more}"
    )
