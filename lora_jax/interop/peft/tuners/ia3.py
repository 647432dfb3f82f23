"""(IA)^3: one gain for each module, over its outputs or, of `feedforward_modules`, its inputs.

    base_model.model.model.layers.0.self_attn.k_proj.ia3_l   (out, 1)   ia3_gain
    base_model.model.model.layers.0.mlp.down_proj.ia3_l      (1, in)    ia3_gain

A gain over outputs scales the module's bias too. That of a fused module is those of its weights,
concatenated, with ones for those that are not adapted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.leaves import Part, split_outputs
from lora_jax.interop.peft.modules import Arrays, Module
from lora_jax.interop.peft.names import shortest_endings
from lora_jax.interop.peft.parts import AdapterParts
from lora_jax.interop.peft.tuners.tuner import Parts, Shapes, Tuner, Written, key
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.patterns import fullmatch
from lora_jax.variants.ia3 import IA3, IA3_FEEDFORWARD, INPUTS, weight

NAME = "ia3_l"


def _scales_inputs(config: PeftConfig, module: Module) -> bool:
  """Returns whether a module is one of `feedforward_modules`: without a dot before an ending."""
  names = config.fields.feedforward_modules or ()
  return fullmatch(names, module.name) if isinstance(names, str) else module.name.endswith(names)


def _shapes(
  config: PeftConfig, modules: Sequence[Module], tensors: Sequence[StoredTensor]
) -> Shapes:
  del tensors
  return {
    key(m, NAME): (1, m.inputs) if _scales_inputs(config, m) else (sum(m.outputs), 1)
    for m in modules
  }


def _read(
  config: PeftConfig, modules: Sequence[Module], arrays: Arrays, leaves: Mapping[str, Any]
) -> dict[Module, list[Part]]:
  del leaves
  parts = {}
  for module in modules:
    gain = arrays[key(module, NAME)].reshape(-1)
    if _scales_inputs(config, module):
      variant, gains = IA3_FEEDFORWARD, [gain] * len(module.outputs)
    else:
      variant, gains = IA3, split_outputs(gain, module.outputs)
    parts[module] = [Part(variant, {"ia3_gain": each}) for each in gains]
  return parts


def _write(parts: Parts, adapter: AdapterParts) -> Written:
  arrays: Arrays = {}
  of_inputs: list[str] = []
  for module, of_module in parts.items():
    if any(part and part.variant.arrays == INPUTS for part in of_module):
      of_inputs.append(module.name)
      arrays[key(module, NAME)] = _gain_of_inputs(module, of_module)[None]
    else:
      _check_bias(module, of_module, adapter)
      gains = [
        np.ones(size, np.float32) if part is None else part.arrays["ia3_gain"]
        for part, size in zip(of_module, module.outputs, strict=True)
      ]
      arrays[key(module, NAME)] = np.concatenate(gains)[:, None]
  known = adapter.module_names
  of_outputs = [module.name for module in parts if module.name not in of_inputs]
  inputs = shortest_endings(of_inputs, known) if of_inputs else []
  if any(name.endswith(tuple(inputs)) for name in of_outputs):  # PEFT needs no dot before them
    inputs = of_inputs
  outputs = shortest_endings(of_outputs, known) if of_outputs else []
  fields = {"target_modules": [*outputs, *inputs], "feedforward_modules": inputs}
  return Written(fields, arrays)


def _gain_of_inputs(module: Module, parts: Sequence[Part | None]) -> np.ndarray:
  """Returns the gain that all weights of a module have."""
  gains = [p.arrays["ia3_gain"] for p in parts if p is not None and p.variant.arrays == INPUTS]
  if len(gains) < len(parts) or not all(np.array_equal(gain, gains[0]) for gain in gains):
    raise ValueError(
      f"PEFT scales the inputs of {module.name} as a whole, and {', '.join(module.stored.paths)} "
      "have different gains, or none. Merge the adapter: lora_jax.interop.save_merged"
    )
  return gains[0]


def _check_bias(module: Module, parts: Sequence[Part | None], adapter: AdapterParts) -> None:
  """Raises ValueError unless exactly the module's bias is scaled, as in PEFT."""
  stored = next((t for t in adapter.tensors if t.is_bias and t.module == module.name), None)
  biases = stored.paths if stored else [None] * len(parts)
  for path, bias, part in zip(module.stored.paths, biases, parts, strict=True):
    scaled = adapter.biases[path].path if path in adapter.biases else None
    if part is not None and scaled != bias:
      raise ValueError(
        f"PEFT's (IA)^3 scales {bias or 'no bias'} with {path}, and the adapter's variant scales "
        f"{scaled or 'no bias'}. Merge the adapter: lora_jax.interop.save_merged"
      )


TUNER = Tuner("(IA)^3", (weight,), _shapes, _read, _write)
