"""LN tuning: whole normalizations. An adapter without adapted weights is one.

    base_model.model.transformer.ln_f.ln_tuning_layers.weight   (D,)   ln_f/scale, fully trained
    base_model.model.transformer.ln_f.ln_tuning_layers.bias     (D,)   ln_f/bias

PEFT copies any module that is named; other ones than normalizations are written as
`modules_to_save`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.modules import PREFIX
from lora_jax.interop.peft.names import shortest_endings
from lora_jax.interop.peft.tuners.tuner import Shapes, Written
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.models.checkpoints.stored import stored_shape

LAYER = "ln_tuning_layers"


def layer_name(stored: StoredTensor) -> str:
  """Returns the name in the file of a tensor of a tuned module."""
  module, _, kind = stored.name.rpartition(".")
  return f"{PREFIX}{module}.{LAYER}.{kind}"


def tuned_tensors(
  where: Path, config: PeftConfig, tensors: Sequence[StoredTensor]
) -> list[StoredTensor]:
  """Returns the tensors of the modules that are tuned; raises ValueError if there are none."""
  norms = [stored for stored in tensors if config.targets(stored.module, is_linear=False)]
  if not norms:
    names = dict.fromkeys(stored.module.rpartition(".")[2] for stored in tensors)
    raise ValueError(
      f"{where}: target_modules {config.target_modules!r} match none of this model's: "
      f"{', '.join(sorted(names))}"
    )
  return norms


def norm_shapes(tuned: Sequence[StoredTensor], leaves: Mapping[str, Any]) -> Shapes:
  """Returns the shapes of tuned tensors, by name."""
  return {layer_name(stored): stored_shape(stored, leaves) for stored in tuned}


def is_norm(tensors: Sequence[StoredTensor], leaves: Mapping[str, Any]) -> bool:
  """Returns whether a module's tensors are those of a normalization: vectors."""
  return all(len(stored_shape(stored, leaves)) == 1 for stored in tensors)


def as_tuned(
  written: Written, tensors: Sequence[StoredTensor], leaves: Mapping[str, Any]
) -> Written:
  """Returns fully trained modules, as they are stored with LoRA, as those of LN tuning.

  Args:
    written: the field `modules_to_save`, and the tensors.
    tensors: of the model.
    leaves: of the base model, or their shapes.
  Raises:
    ValueError: if none is a normalization.
  """
  by_module: dict[str, list[StoredTensor]] = {}
  for stored in tensors:
    by_module.setdefault(stored.module, []).append(stored)
  saved, biases = written.fields.get("modules_to_save", []), written.fields["bias"]
  if biases != "none":
    raise ValueError(
      "PEFT's LN tuning trains no biases of other modules than those that are whole, and `extra` "
      f"has {biases} biases. Train them with LoRA, or save_merged of lora_jax.interop"
    )
  norms = [name for name in saved if name in by_module and is_norm(by_module[name], leaves)]
  if not norms:
    raise ValueError(
      f"nothing is adapted, and of the fully trained {', '.join(saved)} none is a normalization, "
      "of which PEFT's LN tuning needs one. Save the model as a whole: lora_jax.interop.save_merged"
    )
  arrays = dict(written.arrays)
  for stored in (stored for name in norms for stored in by_module[name]):
    arrays[layer_name(stored)] = arrays.pop(f"{PREFIX}{stored.name}")
  fields: dict[str, Any] = {"target_modules": shortest_endings(norms, list(by_module))}
  if others := [name for name in saved if name not in norms]:
    fields["modules_to_save"] = others
  return Written(fields, arrays)
