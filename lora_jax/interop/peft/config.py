"""Reads PEFT's `adapter_config.json`: which modules are adapted, and how.

A field that changes what an adapter computes and that is not known here is an error.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_jax.adapters.config import Alpha
from lora_jax.fields import Count, CountOrZero, Pattern, read_section, read_value
from lora_jax.interop.peft.fields import FIELDS, IGNORED, Fields
from lora_jax.interop.peft.names import by_pattern, named
from lora_jax.patterns import fullmatch
from lora_jax.trees import closest_names

COMMON = {"peft_type", "auto_mapping", "peft_version", "revision", "task_type"}
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # leave the base model as it is
OTHER_METHODS = {  # fields of other methods
  "use_qalora": "QALoRA",
  "use_bdlora": "BD-LoRA",
  "layer_replication": "layer replication",
  "alora_invocation_tokens": "activated LoRA",
  "arrow_config": "Arrow",
  "kasa_config": "KaSA",
  "monteclora_config": "MonteCLoRA",
  "ensure_weight_tying": "tied adapters",
}
PROMPT_TUNING = "PROMPT_TUNING"
PROMPT_METHODS = ("PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """The parts of an `adapter_config.json` that determine what its adapter computes.

  Attributes:
    peft_type: the method.
    fields: all that are read, for those of one method only.
    rank: of modules that `rank_pattern` does not name; 1 for methods without a rank.
    alpha: of modules that `alpha_pattern` does not name.
    target_modules: names or their endings, or one regular expression, or `all-linear`.
    exclude_modules: names or one regular expression of modules that are never adapted.
    rank_pattern: ranks by regular expressions for the endings of names.
    alpha_pattern: alphas by regular expressions for the endings of names.
    use_rslora: scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    use_dora: whether all modules are adapted by DoRA (Liu et al. 2024, arXiv 2402.09353).
    bias: `none`, `all` or `lora_only`: which biases are trained; also for the other methods, whose
      word for `lora_only` is another.
    modules_to_save: names or their endings of fully trained modules.
    layers_to_transform: numbers of the adapted layers; None is all.
    layers_pattern: names of the lists that number the layers.
    lora_bias: whether B has a bias.
    target_parameters: names of adapted parameters, as those of stacked experts.
    tokens: the ids of trained rows by the name of their embedding; "" is the model's.
    base: the base model's name or path in training; "" if unknown.
  """

  peft_type: str
  fields: Any  # one of `FIELDS`
  rank: int = 1
  alpha: float = 1.0
  target_modules: str | tuple[str, ...] = ()
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
  tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  base: str = ""

  def targets(self, module: str, is_linear: bool = True) -> bool:
    """Returns whether a module is adapted.

    Args:
      module: its name.
      is_linear: whether `all-linear` includes it: a linear layer other than the head.
    """
    saved = (rf"(.*\.)?({name})(\..*)?" for name in self.modules_to_save)
    if any(fullmatch(name, module) for name in saved) or named(module, self.exclude_modules):
      return False
    if self.target_modules == "all-linear":
      return is_linear
    if not named(module, self.target_modules):
      return False
    if isinstance(self.target_modules, str) or module in self.target_modules:
      return True  # as in PEFT, layers_to_transform applies only to endings of names
    return self.layers_to_transform is None or self.layer_of(module) in self.layers_to_transform

  def targets_parameter(self, parameter: str) -> bool:
    """Returns whether a parameter is adapted itself, instead of through a layer."""
    return named(parameter, self.target_parameters)

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
    return by_pattern(module, self.rank_pattern, self.rank)

  def scaling_of(self, module: str) -> float:
    """Returns the scaling of B A."""
    alpha, rank = by_pattern(module, self.alpha_pattern, self.alpha), self.rank_of(module)
    return alpha / (math.sqrt(rank) if self.use_rslora else rank)

  def saves(self, module: str) -> bool:
    """Returns whether a module, or one that contains it, is fully trained.

    As in PEFT, a name matches all modules that end with it: `norm` matches `input_layernorm`.
    """
    parts = module.split(".")
    whole = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(name.endswith(tuple(self.modules_to_save)) for name in whole)


_OURS = {  # attributes of `PeftConfig` with other names than the fields
  "r": "rank",
  "init_r": "rank",
  "lora_alpha": "alpha",
  "base_model_name_or_path": "base",
}


def parse(entries: Mapping[str, Any], path: Path) -> PeftConfig:
  """Returns the config in the object of an `adapter_config.json`.

  Args:
    entries: the object.
    path: of its file, for messages.
  Raises:
    ValueError: if it is of another method, or a field is unknown, misspelled, of another type or
      out of bounds.
  """
  method = _method(entries, path)
  ignored = {*IGNORED[method], *OTHER_METHODS}  # of the other methods none is set
  fields = read_fields(FIELDS[method], ignored, entries, path)
  try:
    config = _config(method, fields)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  _check_combinations(config, path)
  return config


def read_fields(
  kind: type[T], ignored: Collection[str], entries: Mapping[str, Any], path: Path
) -> T:
  """Returns the checked fields of one method.

  Args:
    kind: the dataclass of those that are read.
    ignored: the names of others that do not change what an adapter computes.
    entries: the object of an `adapter_config.json`.
    path: of its file, for messages.
  Raises:
    ValueError: if a field is unknown and set, misspelled, of another type or out of bounds.
  """
  known = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
  for key in sorted(set(entries) - known - {*COMMON, *ignored}):
    if entries[key] not in (None, False, [], {}):
      raise ValueError(
        f"{path}: unknown field {key[:100]}={repr(entries[key])[:100]}; did you mean "
        f"{', '.join(closest_names(key, known))}?"
      )
  try:
    return read_section(kind, {key: entries[key] for key in known & set(entries)})
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _config(method: str, fields: Fields) -> PeftConfig:
  """Returns a config of checked fields; those that are None or unset are the defaults."""
  values = {_OURS.get(key, key): value for key, value in vars(fields).items()}
  common = {field.name for field in dataclasses.fields(PeftConfig)} & set(values)
  config = PeftConfig(
    method, fields, **{key: values[key] for key in common if values[key] is not None}
  )
  layers, lists = config.layers_to_transform, config.layers_pattern
  ranks = {} if method == "ADALORA" else config.rank_pattern  # its are lists of booleans
  return dataclasses.replace(
    config,
    rank_pattern=_values(Count, ranks, "rank_pattern"),
    alpha_pattern=_values(Alpha, config.alpha_pattern, "alpha_pattern"),
    bias="lora_only" if config.bias.endswith("_only") else config.bias,
    layers_to_transform=(layers,) if isinstance(layers, int) else layers or None,
    layers_pattern=(lists,) if isinstance(lists, str) else lists or (),
    tokens=_tokens(values.get("trainable_token_indices")),
  )


def _tokens(indices: Any) -> dict[str, tuple[int, ...]]:
  """Returns the ids of trained rows by the name of their embedding."""
  if not isinstance(indices, Mapping):
    return {"": indices} if indices else {}
  return {
    key: read_value(tuple[CountOrZero, ...], ids, f"trainable_token_indices[{key!r}]")
    for key, ids in indices.items()
  }


def _check_combinations(config: PeftConfig, path: Path) -> None:
  """Raises ValueError if PEFT has no such combination of fields, or nothing is adapted."""
  if config.target_parameters and config.lora_bias:
    raise ValueError(f"{path}: PEFT has no lora_bias with target_parameters")
  if config.use_dora and (config.lora_bias or config.target_parameters):
    other = "lora_bias" if config.lora_bias else "target_parameters"
    raise ValueError(f"{path}: PEFT has no use_dora with {other}")
  if not config.target_modules and not config.target_parameters:
    raise ValueError(f"{path}: target_modules is missing; expected the names of modules")
  if config.peft_type == "VERA" and not config.fields.save_projection:
    raise ValueError(
      f"{path}: save_projection=False: A and B are not in the file, and only PyTorch's random "
      "numbers would give them again. Train with save_projection=True, PEFT's default, or merge "
      "the adapter in PEFT and load the merged folder as a model"
    )


def _method(entries: Mapping[str, Any], path: Path) -> str:
  """Returns the method; raises ValueError with advice if it, or its extension, is not read."""
  method = entries.get("peft_type")
  if method is None and {"lora_parameters", "fine_tune_type"} & set(entries):
    raise ValueError(
      f"{path} is of MLX, expected PEFT's format. Fuse the adapter there (mlx_lm.fuse "
      "--de-quantize), and load the fused folder as a model"
    )
  expected = f"expected peft_type {', '.join(list(FIELDS)[:-1])} or {list(FIELDS)[-1]}"
  if method == PROMPT_TUNING:
    raise ValueError(
      f"{path}: {expected}, got {method!r}, which trains virtual tokens and no weights. Read it by "
      "lora_jax.interop.load_peft_prompt"
    )
  if method in PROMPT_METHODS:
    raise ValueError(
      f"{path}: {expected}, got {method!r}, which trains virtual tokens and no weights. There is "
      "no such adapter here"
    )
  if not isinstance(method, str) or method not in FIELDS:
    raise ValueError(
      f"{path}: {expected}, got {repr(method)[:100]}. An adapter of another method can be merged "
      "in PEFT (merge_and_unload, then save_pretrained) and the merged folder loaded as a model"
    )
  for key, name in OTHER_METHODS.items():
    if entries.get(key):
      raise ValueError(
        f"{path}: {key}={repr(entries[key])[:100]}: there is no support for {name} here. Merge the "
        "adapter in PEFT and load the merged folder as a model"
      )
  init = entries.get("init_lora_weights")
  plain = any(init is plain or (init == plain and type(init) is str) for plain in PLAIN_INITS)
  if method == "LORA" and not plain:
    raise ValueError(
      f"{path}: init_lora_weights={repr(init)[:100]} changes the base model when PEFT loads the "
      "adapter. Save it in PEFT with path_initial_model_for_weight_conversion, which makes it "
      "plain LoRA"
    )
  return method


def _values(kind: Any, patterns: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Returns checked values by pattern."""
  for key in patterns:
    read_value(Pattern, key, f"{name}: a key")
  return {key: read_value(kind, value, f"{name}[{key!r}]") for key, value in patterns.items()}
