"""The configs of the experiments that generate text; the files in `configs/` comment each field."""

import dataclasses
from typing import ClassVar, Literal

from experiments.harness.config import AdaptationConfig, Fit, Optimizer, RunConfig, TrainingConfig
from lora_jax.data.sets.e2e import Form, Split

Checkpoint = Literal["best", "last"]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  folder: str
  dtype: str
  param_dtype: str
  scan_layers: bool
  remat: str
  attention: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepingFit(Fit):
  loss_chunk: int
  keep: Checkpoint


# ---- gpt2_e2e, and the template that is compared with it -----------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EModel(LanguageModel):
  start: Literal["pretrained", "random"]


@dataclasses.dataclass(frozen=True)
class Texts:
  form: Form
  source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EData(Texts):
  num_train_records: int
  num_valid_records: int
  num_epochs: int
  packing: bool
  batch_size: int
  row_length: int
  loss_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EOptimizer(Optimizer):
  label_smoothing: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EFit(KeepingFit):
  num_train_steps: int


@dataclasses.dataclass(frozen=True)
class Inputs:
  split: Split
  num_inputs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(Inputs):
  num_beams: int
  length_penalty: float
  no_repeat_ngram_size: int
  max_new_tokens: int
  scoring: Literal["transformers", "reference"]
  batch_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EConfig(AdaptationConfig):
  NAME: ClassVar[str] = "gpt2_e2e"
  model: E2EModel
  data: E2EData
  optimizer: E2EOptimizer
  fit: E2EFit
  decoding: Decoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateConfig(RunConfig):
  NAME: ClassVar[str] = "e2e_template"
  experiment: str = "e2e_template"
  variant: str = ""
  seed: int = 0
  method: str = "template"
  data: Texts = Texts("reference", "embedded")
  decoding: Inputs = Inputs("test", 630)


# ---- finetune ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserData:
  file: str
  valid_file: str
  valid_share: float
  chat_template: str
  today: str
  ignored_fields: tuple[str, ...]
  row_length: int
  truncate: bool
  packing: bool
  batch_size: int
  num_epochs: int


@dataclasses.dataclass(frozen=True)
class Samples:
  count: int
  max_new_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(AdaptationConfig):
  NAME: ClassVar[str] = "finetune"
  method: str = "lora"  # the method of runs that were stored before there was a choice
  model: LanguageModel
  data: UserData
  fit: KeepingFit
  samples: Samples


# ---- gpt2_pretrain -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainData:
  folder: str
  prepared: str
  vocab_size: int
  held_out_every: int
  num_valid_rows: int
  num_train_tokens: int
  batch_size: int
  row_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainModel:
  embed_dim: int
  num_layers: int
  num_heads: int
  num_positions: int
  dtype: str
  scan_layers: bool
  attention: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainFit(Fit):
  loss_chunk: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
  NAME: ClassVar[str] = "gpt2_pretrain"
  data: PretrainData
  model: PretrainModel
  fit: PretrainFit
