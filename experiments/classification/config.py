"""The config of `experiments.glue`; `configs/glue.py` comments each field."""

import dataclasses
from typing import ClassVar, Literal

from experiments.harness.config import AdaptationConfig, Fit, Lora, Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderModel:
  name: str
  folder: str
  dtype: str
  param_dtype: str
  scan_layers: bool
  remat: str
  hidden_dropout: float
  attention_dropout: float
  head_dropout: float
  head: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueLora(Lora):
  start: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueData:
  suite: Literal["glue", "super_glue"]
  task: str
  source: str
  tfds_dir: str
  skip_malformed: bool
  any_size: bool
  tuning: bool
  tuning_share: float
  num_train_records: int
  batch_size: int
  eval_batch_size: int
  row_lengths: tuple[int, ...]
  window: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueOptimizer(Optimizer):
  tuned_in: str
  warmup_ratio: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueFit(Fit):
  num_epochs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueConfig(AdaptationConfig):
  NAME: ClassVar[str] = "glue"
  model: EncoderModel
  lora: GlueLora
  data: GlueData
  optimizer: GlueOptimizer
  fit: GlueFit

  @property
  def head(self) -> str:
    return self.model.head
