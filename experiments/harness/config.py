"""Defines the sections that experiments' configs share, with their bounds, and reads them strictly.

Each experiment turns its ConfigDict into a dataclass at the top of its `run`:

    config = read_config(E2EConfig, config)  # from here on pyright knows the fields
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_jax.fields import (
  LocalPath,
  NonEmptyPath,
  NonNegative,
  Pattern,
  Positive,
  Share,
  Within,
  check_fields,
  nonempty,
  read_section,
  read_value,
)
from lora_jax.training.mesh import local_rows, make_mesh

# The linear layers of the zoo's blocks, like PEFT's all-linear: no heads, embeddings or routers,
# and no experts of a mixture, which are single three-dimensional weights.
ALL_LINEAR = r".*/(attn/(query|key|value|out)|mlp/(shared/)?(gate|up|down))/kernel"

Config = TypeVar("Config", bound="RunConfig")

MAX_BATCH_TOKENS = 2**24
AUTO = "auto"

# Upper bounds are far above any use. They refuse a slip that would take all memory or never end.
Seed = Annotated[int, Within("[0, 4_294_967_295]")]  # jax.random.key takes 32 bits and drops more
Steps = Annotated[int, Within("[1, 1_000_000_000_000]")]
StepsOrZero = Annotated[int, Within("[0, 1_000_000_000_000]")]
Rows = Annotated[int, Within("[1, 1_048_576]")]
Length = Annotated[int, Within("[1, 1_048_576]")]  # tokens
LengthOrZero = Annotated[int, Within("[0, 1_048_576]")]
Records = Annotated[int, Within("[0, 1_000_000_000]")]  # 0 is all, or none
Epochs = Annotated[int, Within("[1, 10_000]")]
PartOfOne = Annotated[float, Within("(0, 1)")]
Devices = Annotated[int, Within("[1, 1_048_576]")]

Dtype = Literal["float32", "bfloat16", "float16"]
DtypeOrAuto = Literal["auto", Dtype]
ParamDtype = Literal[Dtype, "stored", "int8", "nf4"]
ParamDtypeOrAuto = Literal["auto", ParamDtype]
Attention = Literal["compact", "xla", "cudnn"]
Remat = Literal[
  "",
  "nothing_saveable",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
  "everything_saveable",
]


def plain_name(name: str, value: str) -> None:
  """Raises ValueError if the value is not one that the name of a folder may contain."""
  if not re.fullmatch(r"[\w,=+-][\w.,=+-]{0,99}|", value):
    raise ValueError(
      f"{name} must be at most 100 letters, digits and signs of _.,=+- and not start with a dot, "
      f"since it names the run's folder; got {value[:200]!r}"
    )


Name = Annotated[str, plain_name]


@dataclasses.dataclass(frozen=True)
class Lora:
  rank: Annotated[int, Within("[1, 1_048_576]")]
  alpha: Positive
  dropout: Share
  target: Annotated[Pattern, nonempty]
  init: Literal["kaiming_uniform", "gaussian", "original_code", "copied_blocks"]

  @property
  def token_ids(self) -> tuple[int, ...]:
    """The tokens whose embeddings are trained, too."""
    return ()


@dataclasses.dataclass(frozen=True)
class TopLayers:
  num_layers: Annotated[int, Within("[1, 65_536]")] = 2  # defaults are for runs stored without it


@dataclasses.dataclass(frozen=True)
class RandomSubspace:
  dim: Annotated[int, Within("[1, 16_777_216]")] = 1000
  layer_scales: bool = False


@dataclasses.dataclass(frozen=True)
class Prefix:
  num_prefix: Annotated[int, Within("[0, 65_536]")] = 8
  num_infix: Annotated[int, Within("[0, 65_536]")] = 8

  def __post_init__(self):
    if not self.num_prefix + self.num_infix:
      raise ValueError(
        "prefix.num_prefix=0 and prefix.num_infix=0 leave no slot; raise one of them"
      )


@dataclasses.dataclass(frozen=True)
class Bottleneck:
  width: Annotated[int, Within("[1, 65_536]")] = 16
  num_dropped: Annotated[int, Within("[0, 65_536]")] = 1


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: Positive
  weight_decay: NonNegative
  b1: Share
  b2: Share
  eps: Positive
  schedule: Literal["linear", "cosine", "constant"]
  warmup_steps: StepsOrZero
  clip_norm: NonNegative


@dataclasses.dataclass(frozen=True)
class Fit:
  eval_every_steps: Steps
  checkpoint_every_steps: Steps
  log_every_steps: Steps
  accumulation_steps: Rows
  checkpoint_every_seconds: NonNegative = 300.0  # the default is for runs that were stored without


@dataclasses.dataclass(frozen=True)
class MeshShape:
  data: Devices
  fsdp: Devices
  tensor: Devices

  def make(self) -> Mesh:
    return make_mesh(self.data, self.fsdp, self.tensor)


@dataclasses.dataclass(frozen=True)
class Distributed:
  """The section `distributed` of a config.

  Attributes:
    coordinator_address: HOST:PORT of process 0; `auto` for what JAX detects; "" is one process.
    num_processes: 0 for what JAX detects.
    process_id: the number of this process, from 0; -1 for what JAX detects.
  """

  coordinator_address: str = ""
  num_processes: Annotated[int, Within("[0, 1_048_576]")] = 0
  process_id: Annotated[int, Within("[-1, 1_048_575]")] = -1

  def __post_init__(self):
    check_fields(self)
    if self.is_set and not re.fullmatch(rf"{AUTO}|.+:\d+", self.coordinator_address):
      raise ValueError(
        f"distributed.coordinator_address must be HOST:PORT of process 0, or {AUTO}; got "
        f"{self.coordinator_address!r}"
      )

  @property
  def is_set(self) -> bool:
    """Tells whether there are several processes."""
    return bool(self.coordinator_address or self.num_processes or self.process_id >= 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """The config of any run. `NAME` is the experiment's.

  `AFTER_TRAINING` names the sections that training does not depend on: with other values a run is
  not trained again, and only what follows is repeated. `MACHINES` names those that change its
  rounding at most.
  """

  NAME: ClassVar[str]
  AFTER_TRAINING: ClassVar[tuple[str, ...]] = ()
  MACHINES: ClassVar[tuple[str, ...]] = ()
  experiment: str
  variant: Name
  workdir: LocalPath
  seed: Seed

  def __post_init__(self):
    check_fields(self)

  def to_json(self) -> dict[str, Any]:
    """Returns the config as `config.json` has it: its folder may be moved."""
    values = dataclasses.asdict(self)
    del values["workdir"]
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
  """The config of a run that trains."""

  MACHINES: ClassVar[tuple[str, ...]] = ("mesh", "distributed")
  keep_freed_memory: bool
  optimizer: Optimizer
  fit: Fit
  mesh: MeshShape
  distributed: Distributed = Distributed()

  def __post_init__(self):
    super().__post_init__()
    if self.distributed.is_set:
      raise ValueError(
        "the command connects processes before it reads its config; in Python, call "
        "experiments.harness.machines.join first, and leave config.distributed as it is"
      )

  def to_json(self) -> dict[str, Any]:
    """Returns the config as `config.json` has it: other processes may resume the run."""
    values = super().to_json()
    del values["distributed"]
    return values

  def local_rows(self, batch_size: int, accumulation_steps: int = 1) -> list[int] | None:
    """Returns this process's rows of a batch; None, which is all, if it is the only process."""
    if jax.process_count() == 1:
      return None
    return local_rows(self.mesh.make(), batch_size, accumulation_steps)

  def check_batch(self, batch_size: int, row_length: int) -> None:
    """Raises ValueError if a batch is too large, or cannot be split over steps and devices."""
    if batch_size * row_length > MAX_BATCH_TOKENS:
      raise ValueError(
        f"data.batch_size={batch_size} rows of {row_length} tokens are "
        f"{batch_size * row_length:,} tokens, expected at most {MAX_BATCH_TOKENS:,} a step. "
        "Choose fewer or shorter rows"
      )
    parts = self.fit.accumulation_steps * self.mesh.data * self.mesh.fsdp
    if batch_size % parts:
      raise ValueError(
        f"data.batch_size={batch_size} must be a multiple of fit.accumulation_steps * mesh.data * "
        f"mesh.fsdp = {parts}, over which its rows are split"
      )

  def check_warmup(self, num_train_steps: int) -> None:
    """Raises ValueError if the warmup is longer than the training."""
    if self.optimizer.warmup_steps > num_train_steps:
      raise ValueError(
        f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be at most the "
        f"{num_train_steps} steps of the training. Lower it, or train for longer"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptationConfig(TrainingConfig):
  """The config of a run that adapts a base model by one of `harness.methods`."""

  method: str
  lora: Lora
  top_layers: TopLayers = TopLayers()
  random_subspace: RandomSubspace = RandomSubspace()
  prefix: Prefix = Prefix()
  bottleneck: Bottleneck = Bottleneck()

  @property
  def head(self) -> str | tuple[str, ...]:
    """Patterns of the leaves that every method trains fully."""
    return ()


def check_at_most(name: str, value: int, limit_name: str, limit: int) -> None:
  """Raises ValueError if a field's value exceeds a limit."""
  if value > limit:
    raise ValueError(f"{name}={value} must be at most {limit_name} = {limit}")


def read_output(flag: str, value: str | Path, *endings: str) -> Path:
  """Returns the path that a flag names for files to write.

  Args:
    flag: its name, for messages.
    value: its value; one of the endings may be part of it.
    endings: of the files' names, after that value; none means that it is the file itself.
  Raises:
    ValueError: if it cannot be written: it is empty, not local, a folder, or below a file.
  """
  path = Path(read_value(NonEmptyPath, str(value), flag))
  path = path.with_suffix("") if path.suffix in endings else path
  for parent in path.parents:
    if parent.exists() and not parent.is_dir():
      raise ValueError(f"{flag}={value}: {parent} is a file, expected a folder")
  for file in (Path(f"{path}{ending}") for ending in endings or ("",)):
    if file.is_dir():
      raise ValueError(f"{flag}={value}: {file} is a folder, expected a file to write")
  return path


def check_attention(attention: str, dtype: str) -> None:
  """Raises ValueError if the attention cannot run on this machine, or in this dtype."""
  backend = jax.default_backend()
  if attention == "cudnn" and (backend != "gpu" or dtype == "float32"):
    raise ValueError(
      "model.attention=cudnn needs an NVIDIA GPU and model.dtype=bfloat16 or float16, got "
      f"{'a ' + backend.upper()} and {dtype}. Choose compact or xla"
    )


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
  """Returns a nested config, with `lora.target=all-linear` replaced by its pattern."""
  lora = values.get("lora")
  if not isinstance(lora, Mapping) or lora.get("target") != "all-linear":
    return values
  return dict(values, lora=dict(lora, target=ALL_LINEAR))


def replace_fields(config: Config, changes: Mapping[str, Any]) -> Config:
  """Returns a config with some fields changed, by dotted name; errors as in `read_config`."""
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
