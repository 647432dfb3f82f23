"""PEFT's `adapter_config.json`: which modules it adapts, and how.

Read strictly: a field that changes what an adapter computes and that is not known here is an error.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.trees import closest_names

# Fields that say how an adapter was begun, trained or is run, and nothing about what it computes.
OF_NO_MATTER = {
  "auto_mapping",
  "eva_config",
  "corda_config",
  "fan_in_fan_out",
  "inference_mode",
  "loftq_config",
  "lora_dropout",
  "lora_ga_config",
  "megatron_config",
  "megatron_core",
  "peft_version",
  "qalora_group_size",
  "revision",
  "runtime_config",
  "task_type",
  "velora_config",
}
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # leave the base as it is
OTHER_METHODS = {  # fields that make an adapter of another method
  "use_qalora": "QALoRA",
  "use_bdlora": "BD-LoRA",
  "layer_replication": "layer replication",
  "trainable_token_indices": "trainable tokens",
  "alora_invocation_tokens": "activated LoRA",
  "arrow_config": "Arrow",
  "kasa_config": "KaSA",
  "monteclora_config": "MonteCLoRA",
  "ensure_weight_tying": "tied adapters",
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """What an `adapter_config.json` says of the function that its adapter computes.

  Attributes:
    rank: of modules that `rank_pattern` does not name.
    alpha: of modules that `alpha_pattern` does not name.
    target_modules: names or their endings, or one regular expression, or `all-linear`.
    exclude_modules: likewise; never adapted.
    rank_pattern: regular expressions for the endings of names, to ranks.
    alpha_pattern: likewise, to alphas.
    use_rslora: scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    use_dora: whether all modules are adapted by DoRA (Liu et al. 2024, arXiv 2402.09353).
    bias: `none`, `all` or `lora_only`: which biases are trained.
    modules_to_save: names or their endings of modules that are trained whole.
    layers_to_transform: numbers of the layers that are adapted; None is all.
    layers_pattern: names of the lists that the layers are numbered in.
    lora_bias: whether B has a bias.
    target_parameters: names of parameters that are adapted themselves, as stacked experts'.
    base: the model that it was trained on, by a name or path of then; "" if it is not said.
  """

  rank: int
  alpha: float
  target_modules: str | tuple[str, ...]
  exclude_modules: str | tuple[str, ...] = ()
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  use_rslora: bool = False
  use_dora: bool = False
  bias: str = "none"
  modules_to_save: tuple[str, ...] = ()
  layers_to_transform: tuple[int, ...] | None = None
  layers_pattern: tuple[str, ...] = ()
  lora_bias: bool = False
  target_parameters: tuple[str, ...] = ()
  base: str = ""

  def targets(self, module: str, is_linear: bool = True) -> bool:
    """Returns whether a module is adapted.

    Args:
      module: its name.
      is_linear: whether it is a linear layer other than the head, as `all-linear` means them.
    """
    inside = any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)
    if inside or _named(module, self.exclude_modules):
      return False
    if self.target_modules == "all-linear":
      return is_linear
    if not _named(module, self.target_modules):
      return False
    if isinstance(self.target_modules, str) or module in self.target_modules:
      return True  # as in PEFT, an expression or a whole name says the layer itself
    return self.layers_to_transform is None or self._layer(module) in self.layers_to_transform

  def targets_parameter(self, parameter: str) -> bool:
    """Returns whether a parameter is adapted itself; its module is no layer of a common kind."""
    return _named(parameter, self.target_parameters)

  def _layer(self, module: str) -> int | None:
    """Returns the number in a module's name; as in PEFT, the first one in the lists named."""
    for name in self.layers_pattern or (r"[^.]*",):
      if match := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module):
        return int(match[1])
    return None

  def rank_of(self, module: str) -> int:
    return _by_pattern(module, self.rank_pattern, self.rank)

  def scaling_of(self, module: str) -> float:
    """Returns what the product of B and A is multiplied by."""
    alpha, rank = _by_pattern(module, self.alpha_pattern, self.alpha), self.rank_of(module)
    return alpha / (math.sqrt(rank) if self.use_rslora else rank)

  def saves(self, module: str) -> bool:
    """Returns whether a module, or one that it is a part of, is trained whole.

    As in PEFT, a name also means modules whose own names end with it: `norm`, `input_layernorm`.
    """
    parts = module.split(".")
    whole = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(name.endswith(tuple(self.modules_to_save)) for name in whole)


def parse(entries: Mapping[str, Any], path: Path) -> PeftConfig:
  """Returns the config in the object of an `adapter_config.json`.

  Args:
    entries: the object.
    path: of its file, for messages.
  Raises:
    ValueError: if it is of another method, or a field is unknown, missing or ill-typed.
  """
  if entries.get("peft_type") != "LORA":
    raise ValueError(f"{path}: expected peft_type LORA, got {entries.get('peft_type')!r}")
  for key, method in OTHER_METHODS.items():
    if entries.get(key):
      raise ValueError(f"{path}: {key}={entries[key]!r}: {method} does not exist here yet")
  known = {item.name for item in dataclasses.fields(PeftConfig)} - {"rank", "alpha", "base"}
  known |= {"r", "lora_alpha", "peft_type", "init_lora_weights", "base_model_name_or_path"}
  init = entries.get("init_lora_weights")
  if init not in PLAIN_INITS:
    raise ValueError(
      f"{path}: init_lora_weights={init!r} changes the base when PEFT loads the adapter. Save it "
      "in PEFT with path_initial_model_for_weight_conversion, which makes it a plain one"
    )
  for key in sorted(set(entries) - known - OF_NO_MATTER - set(OTHER_METHODS)):
    if entries[key] not in (None, False, [], {}):
      raise ValueError(
        f"{path}: the field {key}={entries[key]!r} is not known here; near: "
        f"{', '.join(closest_names(key, known))}"
      )

  def field(name: str, kind: Any, default: Any) -> Any:
    value = entries.get(name)
    value = default if value is None else value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
      raise ValueError(f"{path}: {name} is {value!r}, expected {_kinds(kind)}")
    return value

  def names(name: str) -> str | tuple[str, ...]:
    value = field(name, (str, list), [])
    return value if isinstance(value, str) else tuple(value)

  rank = field("r", int, 8)  # PEFT's defaults
  ranks = field("rank_pattern", dict, {})
  for name, value in {"r": rank, **ranks}.items():
    if type(value) is not int or value < 1:
      raise ValueError(f"{path}: the rank {name!r} is {value!r}, expected a positive integer")
  layers = field("layers_to_transform", (int, list), []) if "layers_to_transform" in entries else []
  pattern = names("layers_pattern")
  config = PeftConfig(
    rank=rank,
    alpha=field("lora_alpha", (int, float), 8),
    target_modules=names("target_modules"),
    exclude_modules=names("exclude_modules"),
    rank_pattern=ranks,
    alpha_pattern=field("alpha_pattern", dict, {}),
    use_rslora=field("use_rslora", bool, False),
    use_dora=field("use_dora", bool, False),
    bias=field("bias", str, "none"),
    modules_to_save=tuple(field("modules_to_save", list, [])),
    layers_to_transform=((layers,) if isinstance(layers, int) else tuple(layers)) or None,
    layers_pattern=(pattern,) if isinstance(pattern, str) else pattern,
    lora_bias=field("lora_bias", bool, False),
    target_parameters=tuple(field("target_parameters", list, [])),
    base=field("base_model_name_or_path", str, ""),
  )
  if config.bias not in ("none", "all", "lora_only"):
    raise ValueError(f"{path}: bias is {config.bias!r}, expected none, all or lora_only")
  if config.target_parameters and config.lora_bias:
    raise ValueError(f"{path}: PEFT has no lora_bias with target_parameters")
  if config.use_dora and (config.lora_bias or config.target_parameters):
    other = "lora_bias" if config.lora_bias else "target_parameters"
    raise ValueError(f"{path}: PEFT has no use_dora with {other}")
  if not config.target_modules and not config.target_parameters:
    raise ValueError(f"{path}: target_modules is missing; expected the names of modules")
  return config


def shortest_endings(chosen: Iterable[str], modules: Sequence[str]) -> list[str]:
  """Returns the shortest endings of names that match the chosen modules and no others.

  >>> shortest_endings(["h.0.attn.q", "h.1.attn.q"], ["h.0.attn.q", "h.1.attn.q", "h.0.mlp.up"])
  ['q']
  """
  chosen = list(chosen)
  for count in range(1, max(name.count(".") for name in chosen) + 2):
    endings = list(dict.fromkeys(".".join(name.split(".")[-count:]) for name in chosen))
    whole = not any(ending[0].isdecimal() for ending in endings)
    if whole and {name for name in modules if _named(name, endings)} == set(chosen):
      return endings
  return chosen


def usual(values: Iterable[Any]) -> Any:
  """Returns the commonest of several values."""
  return Counter(values).most_common(1)[0][0]


def pattern_of(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """Returns the commonest value of the modules, and the others by the endings of their names.

  >>> pattern_of({"h.0.q": 2, "h.0.v": 2, "h.1.q": 2, "h.0.up": 8, "h.1.up": 8})
  (2, {'up': 8})
  """
  most, by_ending = usual(values.values()), {}
  for value in dict.fromkeys(values.values()):
    if value != most:
      names_with_value = [name for name, item in values.items() if item == value]
      by_ending |= dict.fromkeys(shortest_endings(names_with_value, list(values)), value)
  return most, by_ending


def _named(module: str, names: str | Iterable[str]) -> bool:
  """Tells whether a regular expression matches a whole name, or one of several ends it."""
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return default


def _kinds(kind: Any) -> str:
  kinds = kind if isinstance(kind, tuple) else (kind,)
  return " or ".join(part.__name__ for part in kinds)
