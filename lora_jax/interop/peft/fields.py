"""The fields of `adapter_config.json` that are read, of each of PEFT's methods, with its defaults.

Other fields are about initialization, training or execution, and listed in `IGNORED`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from lora_jax.adapters.config import Alpha
from lora_jax.fields import Count, CountOrZero, Pattern, Within, pattern


def name_of_module(name: str, value: str) -> None:
  """Raises ValueError if the value cannot be the name, or the end of a name, of a module."""
  if not value or len(value) > 1000 or re.search(r"[\s/]", value):
    raise ValueError(f"{name} must be the name of a module, got {value!r:.100}")


def factor(name: str, value: int) -> None:
  """Raises ValueError if the value is not LoKr's `decompose_factor`."""
  if value < 1 and value != -1:
    raise ValueError(f"{name} must be -1 or a positive integer, got {value}")


Name = Annotated[str, name_of_module]
NameOrPattern = Annotated[str, name_of_module, pattern]
Names = Pattern | tuple[Name, ...] | None
Dropout = Annotated[float, Within("[0, 1]")]  # only in training


@dataclasses.dataclass(frozen=True)
class Fields:
  """Those of all methods."""

  target_modules: Names = None
  exclude_modules: Names = None
  modules_to_save: tuple[NameOrPattern, ...] | None = None
  base_model_name_or_path: str | None = None
  fan_in_fan_out: bool | None = None  # follows from the model
  inference_mode: bool | None = None


@dataclasses.dataclass(frozen=True)
class LayerFields(Fields):
  """Those of methods that can be restricted to some layers."""

  layers_to_transform: CountOrZero | tuple[CountOrZero, ...] | None = None
  layers_pattern: Pattern | tuple[Pattern, ...] | None = None


@dataclasses.dataclass(frozen=True)
class LoraFields(LayerFields):
  r: Count = 8
  lora_alpha: Alpha = 8
  rank_pattern: dict | None = None
  alpha_pattern: dict | None = None
  use_rslora: bool | None = False
  use_dora: bool | None = False
  bias: Literal["none", "all", "lora_only"] = "none"
  lora_bias: bool | None = False
  target_parameters: tuple[Name, ...] | None = None
  trainable_token_indices: tuple[CountOrZero, ...] | dict | None = None
  lora_dropout: Dropout = 0.0


@dataclasses.dataclass(frozen=True)
class AdaLoraFields(LayerFields):
  init_r: Count = 12
  lora_alpha: Alpha = 8
  rank_pattern: dict | None = None  # of booleans: the triplets that are left
  bias: Literal["none", "all", "lora_only"] = "none"
  lora_dropout: Dropout = 0.0


@dataclasses.dataclass(frozen=True)
class VeraFields(LayerFields):
  r: Count = 256
  save_projection: bool = True
  bias: Literal["none", "all", "vera_only"] = "none"
  vera_dropout: Dropout = 0.0


@dataclasses.dataclass(frozen=True)
class HiraFields(LayerFields):
  r: Count = 32
  hira_dropout: Dropout = 0.0


@dataclasses.dataclass(frozen=True)
class LohaFields(LayerFields):
  r: Count = 8
  alpha: Alpha = 8
  rank_pattern: dict | None = None
  alpha_pattern: dict | None = None
  rank_dropout: Dropout = 0.0
  module_dropout: Dropout = 0.0


@dataclasses.dataclass(frozen=True)
class LokrFields(LohaFields):
  decompose_both: bool = False
  decompose_factor: Annotated[int, factor] = -1


@dataclasses.dataclass(frozen=True)
class MissFields(LayerFields):
  r: Count = 64
  mini_r: Count = 1
  init_weights: bool | Literal["bat", "mini"] = True  # also the mode
  bias: Literal["none", "all", "MiSS_only"] = "none"
  miss_dropout: Dropout = 0.0


@dataclasses.dataclass(frozen=True)
class Ia3Fields(Fields):
  feedforward_modules: Names = None


@dataclasses.dataclass(frozen=True)
class TokenFields(Fields):
  token_indices: tuple[CountOrZero, ...] = ()


FIELDS: Mapping[str, type[Fields]] = {
  "LORA": LoraFields,
  "ADALORA": AdaLoraFields,
  "VERA": VeraFields,
  "HIRA": HiraFields,
  "LOHA": LohaFields,
  "LOKR": LokrFields,
  "MISS": MissFields,
  "IA3": Ia3Fields,
  "TRAINABLE_TOKENS": TokenFields,
  "LN_TUNING": Fields,
}
"""By `peft_type`, as `TUNERS` of `tuners/table.py`."""

_LORA = {
  *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config"),
  *("megatron_core", "qalora_group_size", "runtime_config", "velora_config", "init_lora_weights"),
}
_BUDGET = {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
_LYCORIS = {"init_weights", "rank_dropout_scale", "use_effective_conv2d"}  # of convolutions
IGNORED: Mapping[str, set[str]] = {
  "LORA": _LORA,
  "ADALORA": {*_LORA, *_BUDGET, "total_step", "r"},
  "VERA": {"projection_prng_key", "d_initial", "init_weights"},
  "HIRA": {"init_weights", "rank_pattern"},  # which has no effect in PEFT 0.21
  "LOHA": _LYCORIS,
  "LOKR": _LYCORIS,
  "MISS": set(),
  "IA3": {"init_ia3_weights"},
  "TRAINABLE_TOKENS": {"init_weights"},
  "LN_TUNING": set(),
}
