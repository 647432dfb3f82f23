"""The config of a plan, with its bounds."""

import dataclasses
from typing import Annotated, Literal, get_args

from experiments.harness.config import Devices, Length, Remat, RunConfig
from lora_jax.fields import Pattern, Positive, Share, Within, nonempty

RowsOrAuto = Annotated[int, Within("[0, 1_048_576]")]
PlanMethod = Literal["lora", "full_finetuning"]


def different_methods(name: str, value: tuple[str, ...]) -> None:
  """Raises ValueError if there is no method, or one is given twice."""
  if not value or len(set(value)) < len(value):
    methods = ", ".join(get_args(PlanMethod))
    raise ValueError(f"{name} must be some of {methods}, each once, got {value!r}")


@dataclasses.dataclass(frozen=True)
class PlanLora:
  rank: Annotated[int, Within("[1, 1_048_576]")]
  alpha: Positive
  dropout: Share
  target: Annotated[Pattern, nonempty]


@dataclasses.dataclass(frozen=True)
class PlanMesh:
  data: Devices
  tensor: Devices


@dataclasses.dataclass(frozen=True)
class PlanData:
  batch_size: RowsOrAuto
  row_length: Length
  loss_chunk: Annotated[int, Within("[0, 1_048_576]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
  """The config of a plan."""

  NAME = "gpt3_plan"
  topology: Annotated[str, nonempty]
  model: Annotated[str, nonempty]
  base: Literal["bfloat16", "float32", "int8", "nf4"]
  remat: Remat
  methods: Annotated[tuple[PlanMethod, ...], different_methods]
  lora: PlanLora
  data: PlanData
  mesh: PlanMesh
