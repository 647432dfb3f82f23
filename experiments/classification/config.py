"""The config of `experiments.glue`; `configs/glue.py` explains each field."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from experiments.harness.config import (
  AdaptationConfig,
  Dtype,
  Epochs,
  Fit,
  Length,
  Lora,
  Name,
  Optimizer,
  PartOfOne,
  Records,
  Remat,
  Rows,
  StepsOrZero,
)
from lora_jax.data.sets import glue, superglue
from lora_jax.fields import LocalPath, Pattern, Share, Within, nonempty


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderModel:
  name: Name
  folder: LocalPath
  dtype: Dtype
  param_dtype: Dtype
  scan_layers: bool
  remat: Remat
  hidden_dropout: Share
  attention_dropout: Share
  head_dropout: Share
  head: Annotated[Pattern, nonempty]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueLora(Lora):
  start: LocalPath


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueData:
  suite: Literal["glue", "super_glue"]
  task: str
  source: LocalPath
  tfds_dir: LocalPath
  skip_malformed: bool
  any_size: bool
  tuning: bool
  tuning_share: PartOfOne
  num_train_records: Records
  batch_size: Rows
  eval_batch_size: Rows
  row_lengths: tuple[Length, ...]
  window: Rows

  def __post_init__(self):
    tasks = (glue if self.suite == "glue" else superglue).TASKS
    if self.task not in tasks:
      raise ValueError(
        f"data.task must be one of {', '.join(tasks)} with data.suite={self.suite}, got "
        f"{self.task!r}"
      )
    if not self.row_lengths or list(self.row_lengths) != sorted(set(self.row_lengths)):
      raise ValueError(
        f"data.row_lengths must be increasing numbers of tokens, such as (32, 64, 128), got "
        f"{self.row_lengths}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueOptimizer(Optimizer):
  tuned_in: LocalPath
  warmup_ratio: Annotated[float, Within("[0, 1]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueFit(Fit):
  eval_every_steps: StepsOrZero  # 0 is every epoch
  num_epochs: Epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueConfig(AdaptationConfig):
  NAME: ClassVar[str] = "glue"
  model: EncoderModel
  lora: GlueLora
  data: GlueData
  optimizer: GlueOptimizer
  fit: GlueFit

  def __post_init__(self):
    super().__post_init__()
    self.check_batch(self.data.batch_size, self.data.row_lengths[-1])

  @property
  def head(self) -> str:
    return self.model.head
