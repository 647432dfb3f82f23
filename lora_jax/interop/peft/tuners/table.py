"""The methods of PEFT other than LoRA, by `peft_type`."""

from collections.abc import Mapping

from lora_jax.adapters.delta import Variant
from lora_jax.interop.peft.tuners import adalora, hira, ia3, loha, lokr, miss, tokens, vera
from lora_jax.interop.peft.tuners.tuner import Tuner

TUNERS: Mapping[str, Tuner] = {
  "ADALORA": adalora.TUNER,
  "VERA": vera.TUNER,
  "HIRA": hira.TUNER,
  "LOHA": loha.TUNER,
  "LOKR": lokr.TUNER,
  "MISS": miss.TUNER,
  "IA3": ia3.TUNER,
  "TRAINABLE_TOKENS": tokens.TUNER,
}
"""LN_TUNING, which adapts no weight, is in `norms.py`."""


def tuner_type(variant: Variant) -> str:
  """Returns the `peft_type` of a variant of its own, and LORA for all others."""
  names = (name for name, tuner in TUNERS.items() if variant.weight in tuner.equations)
  return next(names, "LORA")
