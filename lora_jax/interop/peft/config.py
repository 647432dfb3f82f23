"""Reads PEFT's `adapter_config.json`: which modules are adapted, and how.

A field that changes what an adapter computes and that is not known here is an error.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from lora_jax.adapters.config import Alpha
from lora_jax.fields import (
  Count,
  CountOrZero,
  Pattern,
  Within,
  pattern,
  read_section,
  read_value,
)
from lora_jax.patterns import fullmatch
from lora_jax.trees import closest_names

# Fields about initialization, training or execution, which do not change what is computed.
IGNORED = {
  "auto_mapping",
  "eva_config",
  "corda_config",
  "loftq_config",
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
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # leave the base model as it is
OTHER_METHODS = {  # fields of other methods
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
PROMPT_METHODS = ("PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


def name_of_module(name: str, value: str) -> None:
  """Raises ValueError if the value cannot be the name, or the end of a name, of a module."""
  if not value or len(value) > 1000 or re.search(r"[\s/]", value):
    raise ValueError(f"{name} must be the name of a module, got {value!r:.100}")


Name = Annotated[str, name_of_module]
NameOrPattern = Annotated[str, name_of_module, pattern]


@dataclasses.dataclass(frozen=True)
class _Fields:
  """The fields of the file that are read, with PEFT's defaults."""

  r: Count = 8
  lora_alpha: Alpha = 8
  target_modules: Pattern | tuple[Name, ...] | None = None
  exclude_modules: Pattern | tuple[Name, ...] | None = None
  rank_pattern: dict | None = None
  alpha_pattern: dict | None = None
  use_rslora: bool | None = False
  use_dora: bool | None = False
  bias: Literal["none", "all", "lora_only"] = "none"
  modules_to_save: tuple[NameOrPattern, ...] | None = None
  layers_to_transform: CountOrZero | tuple[CountOrZero, ...] | None = None
  layers_pattern: Pattern | tuple[Pattern, ...] | None = None
  lora_bias: bool | None = False
  target_parameters: tuple[Name, ...] | None = None
  base_model_name_or_path: str | None = None
  lora_dropout: Annotated[float, Within("[0, 1]")] = 0.0  # no dropout is read
  fan_in_fan_out: bool | None = None  # follows from the model
  inference_mode: bool | None = None


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """The parts of an `adapter_config.json` that determine what its adapter computes.

  Attributes:
    rank: of modules that `rank_pattern` does not name.
    alpha: of modules that `alpha_pattern` does not name.
    target_modules: names or their endings, or one regular expression, or `all-linear`.
    exclude_modules: names or one regular expression of modules that are never adapted.
    rank_pattern: ranks by regular expressions for the endings of names.
    alpha_pattern: alphas by regular expressions for the endings of names.
    use_rslora: scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    use_dora: whether all modules are adapted by DoRA (Liu et al. 2024, arXiv 2402.09353).
    bias: `none`, `all` or `lora_only`: which biases are trained.
    modules_to_save: names or their endings of fully trained modules.
    layers_to_transform: numbers of the adapted layers; None is all.
    layers_pattern: names of the lists that number the layers.
    lora_bias: whether B has a bias.
    target_parameters: names of adapted parameters, as those of stacked experts.
    base: the base model's name or path in training; "" if unknown.
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
      is_linear: whether `all-linear` includes it: a linear layer other than the head.
    """
    saved = (rf"(.*\.)?({name})(\..*)?" for name in self.modules_to_save)
    if any(fullmatch(name, module) for name in saved) or _named(module, self.exclude_modules):
      return False
    if self.target_modules == "all-linear":
      return is_linear
    if not _named(module, self.target_modules):
      return False
    if isinstance(self.target_modules, str) or module in self.target_modules:
      return True  # as in PEFT, layers_to_transform applies only to endings of names
    return self.layers_to_transform is None or self.layer_of(module) in self.layers_to_transform

  def targets_parameter(self, parameter: str) -> bool:
    """Returns whether a parameter is adapted itself, instead of through a layer."""
    return _named(parameter, self.target_parameters)

  def layer_of(self, module: str) -> int | None:
    """Returns the layer number in a module's name: the first one, as in PEFT."""
    parts = module.split(".")
    places = [i for i, part in enumerate(parts[:-1]) if part.isdecimal() and i > 0]
    for name in self.layers_pattern or (r"[^.]*",):
      for i in places:
        if fullmatch(rf"(.*\.)?({name})", ".".join(parts[:i])):
          return int(parts[i])
    return None

  def rank_of(self, module: str) -> int:
    return _by_pattern(module, self.rank_pattern, self.rank)

  def scaling_of(self, module: str) -> float:
    """Returns the scaling of B A."""
    alpha, rank = _by_pattern(module, self.alpha_pattern, self.alpha), self.rank_of(module)
    return alpha / (math.sqrt(rank) if self.use_rslora else rank)

  def saves(self, module: str) -> bool:
    """Returns whether a module, or one that contains it, is fully trained.

    As in PEFT, a name matches all modules that end with it: `norm` matches `input_layernorm`.
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
    ValueError: if it is of another method, or a field is unknown, misspelled, of another type or
      out of bounds.
  """
  _check_method(entries, path)
  known = {field.name for field in dataclasses.fields(_Fields)}
  other_keys = {"peft_type", "init_lora_weights", *IGNORED, *OTHER_METHODS}
  for key in sorted(set(entries) - known - other_keys):
    if entries[key] not in (None, False, [], {}):
      raise ValueError(
        f"{path}: unknown field {key[:100]}={repr(entries[key])[:100]}; did you mean "
        f"{', '.join(closest_names(key, known))}?"
      )
  try:
    fields = read_section(_Fields, {key: entries[key] for key in known & set(entries)})
    ranks = _values(Count, fields.rank_pattern, "rank_pattern")
    alphas = _values(Alpha, fields.alpha_pattern, "alpha_pattern")
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  layers, lists = fields.layers_to_transform, fields.layers_pattern
  config = PeftConfig(
    rank=fields.r,
    alpha=fields.lora_alpha,
    target_modules=fields.target_modules or (),
    exclude_modules=fields.exclude_modules or (),
    rank_pattern=ranks,
    alpha_pattern=alphas,
    use_rslora=bool(fields.use_rslora),
    use_dora=bool(fields.use_dora),
    bias=fields.bias,
    modules_to_save=fields.modules_to_save or (),
    layers_to_transform=(layers,) if isinstance(layers, int) else layers or None,
    layers_pattern=(lists,) if isinstance(lists, str) else lists or (),
    lora_bias=bool(fields.lora_bias),
    target_parameters=fields.target_parameters or (),
    base=fields.base_model_name_or_path or "",
  )
  if config.target_parameters and config.lora_bias:
    raise ValueError(f"{path}: PEFT has no lora_bias with target_parameters")
  if config.use_dora and (config.lora_bias or config.target_parameters):
    other = "lora_bias" if config.lora_bias else "target_parameters"
    raise ValueError(f"{path}: PEFT has no use_dora with {other}")
  if not config.target_modules and not config.target_parameters:
    raise ValueError(f"{path}: target_modules is missing; expected the names of modules")
  return config


def _check_method(entries: Mapping[str, Any], path: Path) -> None:
  """Raises ValueError if an adapter is not LoRA or DoRA, with the advice for its method."""
  method = entries.get("peft_type")
  if method is None and {"lora_parameters", "fine_tune_type"} & set(entries):
    raise ValueError(
      f"{path} is of MLX, expected PEFT's format. Fuse the adapter there (mlx_lm.fuse "
      "--de-quantize), and load the fused folder as a model"
    )
  if method in PROMPT_METHODS:
    raise ValueError(
      f"{path}: expected peft_type LORA, got {method!r}, which trains virtual tokens and no "
      "weights. There is no such adapter here"
    )
  if method != "LORA":
    raise ValueError(
      f"{path}: expected peft_type LORA, got {repr(method)[:100]}. An adapter of another "
      "method can be merged in PEFT (merge_and_unload, then save_pretrained) and the merged folder "
      "loaded as a model"
    )
  for key, name in OTHER_METHODS.items():
    if entries.get(key):
      raise ValueError(
        f"{path}: {key}={repr(entries[key])[:100]}: there is no support for {name} here. Merge the "
        "adapter in PEFT and load the merged folder as a model"
      )
  init = entries.get("init_lora_weights")
  if not any(init is plain or (init == plain and type(init) is str) for plain in PLAIN_INITS):
    raise ValueError(
      f"{path}: init_lora_weights={repr(init)[:100]} changes the base model when PEFT loads the "
      "adapter. Save it in PEFT with path_initial_model_for_weight_conversion, which makes it "
      "plain LoRA"
    )


def _values(kind: Any, patterns: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
  """Returns checked values by pattern."""
  for key in patterns or {}:
    read_value(Pattern, key, f"{name}: a key")
  items = (patterns or {}).items()
  return {key: read_value(kind, value, f"{name}[{key!r}]") for key, value in items}


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
  """Returns whether a regular expression matches a whole name, or one of several names ends it."""
  if isinstance(names, str):
    return fullmatch(names, module)
  return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
  for ending, value in patterns.items():
    if fullmatch(rf"(.*\.)?({ending})", module):
      return value
  return default
