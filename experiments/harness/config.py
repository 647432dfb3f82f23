"""The sections that experiments' configs share, as frozen dataclasses, and their strict reading.

A ConfigDict ends where an experiment begins, at the top of its `run`:

    config = read_config(E2EConfig, config)  # from here on pyright knows the fields
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_jax.fields import (
  read_section,
)
from lora_jax.training.mesh import make_mesh

# The linear layers of the zoo's blocks, as PEFT's all-linear has them: not the heads, embeddings
# and routers, nor the experts of a mixture, which are single three-dimensional weights.
ALL_LINEAR = r".*/(attn/(query|key|value|out)|mlp/(shared/)?(gate|up|down))/kernel"

Config = TypeVar("Config", bound="RunConfig")


@dataclasses.dataclass(frozen=True)
class Lora:
  rank: int
  alpha: float
  dropout: float
  target: str  # a pattern of paths
  init: str


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: float
  weight_decay: float
  b1: float
  b2: float
  eps: float
  schedule: Literal["linear", "cosine", "constant"]
  warmup_steps: int
  clip_norm: float


@dataclasses.dataclass(frozen=True)
class Fit:
  eval_every_steps: int
  checkpoint_every_steps: int
  log_every_steps: int
  accumulation_steps: int


@dataclasses.dataclass(frozen=True)
class MeshShape:
  data: int
  fsdp: int
  tensor: int

  def make(self) -> Mesh:
    return make_mesh(self.data, self.fsdp, self.tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """The config of any run. `NAME` is the experiment's."""

  NAME: ClassVar[str]
  experiment: str
  variant: str
  workdir: str
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
  """The config of a run that trains."""

  keep_freed_memory: bool
  optimizer: Optimizer
  fit: Fit
  mesh: MeshShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptationConfig(TrainingConfig):
  """The config of a run that adapts a base by one of `harness.methods`."""

  method: str
  lora: Lora

  @property
  def head(self) -> str | tuple[str, ...]:
    """Patterns of the leaves that every method trains fully."""
    return ()


def read_config(kind: type[Config], source: ConfigDict | Mapping[str, Any]) -> Config:
  """Returns the config of an experiment.

  Args:
    kind: the experiment's dataclass.
    source: nested values. A field with a default in `kind` may be missing: it was added after runs
      had been stored.
  Raises:
    ValueError: naming the field, if the config is of another experiment, or a field is unknown,
      missing or of another type.
  """
  values = source.to_dict() if isinstance(source, ConfigDict) else source
  if values.get("experiment") != kind.NAME:
    raise ValueError(
      f"this is a config of {values.get('experiment')!r}, and the experiment is {kind.NAME!r}. "
      f"Start it with python -m experiments.{values.get('experiment')}"
    )
  return read_section(kind, with_pattern(values))


def with_pattern(values: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a nested config with the pattern that `lora.target=all-linear` stands for."""
  lora = values.get("lora")
  if not isinstance(lora, Mapping) or lora.get("target") != "all-linear":
    return values
  return dict(values, lora=dict(lora, target=ALL_LINEAR))


def replace_fields(config: Config, changes: Mapping[str, Any]) -> Config:
  """Returns a config with some fields changed, by dotted name; errors as of `read_config`."""
  values = dataclasses.asdict(config)
  for dotted, value in changes.items():
    *sections, name = dotted.split(".")
    part = values
    for section in sections:
      part = part[section]
    part[name] = value
  return read_config(type(config), values)


def flat(values: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
  """Returns the fields of a nested config by dotted name."""
  fields: dict[str, Any] = {}
  for name, value in dict(values).items():
    nested = isinstance(value, Mapping | ConfigDict)
    fields |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
  return fields
