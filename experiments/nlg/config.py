"""Configs of the experiments that generate text; the files in `configs/` explain each field."""

import dataclasses
from datetime import datetime
from typing import Annotated, ClassVar, Literal

from experiments.harness.config import (
  AdaptationConfig,
  Attention,
  Dtype,
  DtypeOrAuto,
  Epochs,
  Fit,
  Length,
  LengthOrZero,
  Lora,
  Optimizer,
  ParamDtype,
  ParamDtypeOrAuto,
  PartOfOne,
  Records,
  Remat,
  Rows,
  RunConfig,
  Steps,
  StepsOrZero,
  TrainingConfig,
  check_at_most,
)
from lora_jax.data.sets.e2e import Form, Split
from lora_jax.fields import CountOrZero, LocalPath, NonEmptyPath, Share, Within
from lora_jax.models.checkpoints.loaded_weights import weights_format

Checkpoint = Literal["best", "last"]
Prompt = Literal["separator", "newline", "chat"]
Rounding = Literal["", "Q8_0", "Q4_0", "nf4", "rtn3", "rtn2"]
Shots = Annotated[int, Within("[0, 100]")]
NewTokens = Annotated[int, Within("[1, 65_536]")]
DataSet = Literal[
  "e2e",
  "webnlg",
  "dart",
  "dart_dev",
  "wikisql",
  "samsum",
  "mnli_text",
  "e2e_reversed",
  "addition",
  "dial",
]
FROM_FILES = ("webnlg", "dart", "dart_dev", "wikisql", "samsum", "mnli_text")
Inputs = Annotated[int, Within("[0, 1_000_000]")]

MAX_BEAM_TOKENS = 2**24


def day(name: str, value: str) -> None:
  """Raises ValueError if the value is not a date."""
  try:
    datetime.fromisoformat(value)
  except ValueError:
    raise ValueError(f"{name} must be a date such as 2024-07-26, got {value!r}") from None


def check_chunk(chunk: int, name: str, length: int) -> None:
  """Raises ValueError if `fit.loss_chunk` does not divide a row's target tokens; 0 is all."""
  if chunk and (chunk > length or length % chunk):
    raise ValueError(f"fit.loss_chunk={chunk} must divide {name}={length}, or be 0, which is all")


@dataclasses.dataclass(frozen=True)
class TextLora(Lora):
  tokens: tuple[CountOrZero | str, ...] = ()  # ids, or texts until a run starts

  @property
  def token_ids(self) -> tuple[int, ...]:
    return tuple(map(int, self.tokens))


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  folder: LocalPath
  dtype: DtypeOrAuto
  param_dtype: ParamDtypeOrAuto
  scan_layers: bool
  remat: Remat
  attention: Attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepingFit(Fit):
  loss_chunk: LengthOrZero
  keep: Checkpoint


# ---- gpt2_e2e on all its data sets, and the template that is compared with it --------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EModel(LanguageModel):
  dtype: Dtype
  param_dtype: ParamDtype
  start: Literal["pretrained", "random"]
  rounded_to: Rounding = ""  # defaults are for runs that were stored without the field

  def __post_init__(self):
    if self.start == "random" and weights_format(self.param_dtype):
      raise ValueError(
        f"model.param_dtype={self.param_dtype} is for pretrained weights; with model.start=random "
        "choose float32, bfloat16 or float16"
      )
    if self.rounded_to and self.param_dtype != "float32":
      raise ValueError(
        f"model.rounded_to={self.rounded_to} rounds float32 weights, and model.param_dtype is "
        f"{self.param_dtype}. Set model.param_dtype=float32"
      )


@dataclasses.dataclass(frozen=True)
class Texts:
  form: Form
  source: NonEmptyPath
  name: DataSet = "e2e"  # defaults are for runs that were stored without the field
  any_size: bool = False

  def __post_init__(self):
    name, source = self.name, self.source
    if name != "e2e" and (self.form != "reference" or source == "download"):
      raise ValueError(
        f"data.form={self.form} and data.source={source}: official and download are for "
        f"data.name=e2e, and data.name is {name}. Set data.form=reference, and data.source to "
        f"{'the folder of its files' if name in FROM_FILES else 'embedded'}"
      )
    if name in FROM_FILES and source == "embedded":
      raise ValueError(
        f"data.source=embedded: the files of data.name={name} do not come with lora_jax; expected "
        "the folder that has them (docs/data_sets.md)"
      )
    if name == "addition" and source != "embedded":
      raise ValueError(
        f"data.source={source}: data.name=addition reads no files; expected data.source=embedded"
      )
    if self.any_size and name not in FROM_FILES:
      raise ValueError(
        f"data.any_size=True has no effect with data.name={name}; it is for {', '.join(FROM_FILES)}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EData(Texts):
  num_train_records: Records
  num_valid_records: Records
  num_epochs: Epochs
  packing: bool
  batch_size: Rows
  row_length: Length
  loss_length: Length
  prompt: Prompt = "separator"
  shuffled_completions: bool = False
  max_length: Annotated[int, Within("[128, 1_048_576]")] = 512
  percent: Annotated[float, Within("[0, 100]")] = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.name != "e2e" and self.prompt == "chat":
      raise ValueError(
        f"data.prompt=chat: its instruction is for data.name=e2e, and data.name is {self.name}. "
        "Choose newline or separator"
      )
    if self.name != "dial" and self.percent:
      raise ValueError(
        f"data.percent={self.percent:g} permutes the vocabulary of data.name=dial, and data.name "
        f"is {self.name}. Set data.percent=0"
      )
    if self.name == "dial" and self.shuffled_completions:
      raise ValueError(
        "data.shuffled_completions=True has no effect with data.name=dial, whose texts have no "
        "inputs. Set it to False"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EOptimizer(Optimizer):
  label_smoothing: Share
  warmup_share: Share = 0.0

  def __post_init__(self):
    if self.warmup_share and self.warmup_steps:
      raise ValueError(
        f"optimizer.warmup_share={self.warmup_share} and optimizer.warmup_steps="
        f"{self.warmup_steps} exclude each other; set one of them to 0"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EFit(KeepingFit):
  num_train_steps: StepsOrZero


@dataclasses.dataclass(frozen=True)
class DecodedInputs:
  split: Split
  num_inputs: Inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(DecodedInputs):
  num_beams: Annotated[int, Within("[1, 1_024]")]
  length_penalty: Annotated[float, Within("[-100, 100]")]
  no_repeat_ngram_size: Annotated[int, Within("[0, 65_536]")]
  max_new_tokens: NewTokens
  scoring: Literal["transformers", "reference"]
  batch_size: Rows
  num_shots: Shots = 0
  tokenize: bool = False
  official_references: bool = False

  def __post_init__(self):
    size = self.batch_size * self.num_beams * self.max_new_tokens
    if size > MAX_BEAM_TOKENS:
      raise ValueError(
        f"decoding.batch_size={self.batch_size} inputs with decoding.num_beams={self.num_beams} "
        f"and decoding.max_new_tokens={self.max_new_tokens} are {size:,} tokens at once, expected "
        f"at most {MAX_BEAM_TOKENS:,}. Lower one of them"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EConfig(AdaptationConfig):
  NAME: ClassVar[str] = "gpt2_e2e"
  AFTER_TRAINING: ClassVar[tuple[str, ...]] = ("decoding",)
  model: E2EModel
  lora: TextLora
  data: E2EData
  optimizer: E2EOptimizer
  fit: E2EFit
  decoding: Decoding

  def __post_init__(self):
    super().__post_init__()
    data = self.data
    self.check_batch(data.batch_size, data.row_length)
    if data.loss_length > data.row_length:
      raise ValueError(
        f"data.loss_length={data.loss_length} must be at most data.row_length={data.row_length}"
      )
    check_chunk(self.fit.loss_chunk, "data.loss_length", data.loss_length)
    if data.name == "dial" and self.decoding.num_inputs:
      raise ValueError(
        f"decoding.num_inputs={self.decoding.num_inputs}: data.name=dial is measured by its loss "
        "and decodes nothing. Set decoding.num_inputs=0"
      )
    for field in ("tokenize", "official_references"):
      if data.name != "e2e" and getattr(self.decoding, field):
        raise ValueError(
          f"decoding.{field}=True is for data.name=e2e, and data.name is {data.name}. Set it to "
          "False"
        )

  def check_steps(self) -> None:
    """Raises ValueError if the warmup is longer than the training, as in some older runs."""
    if self.fit.num_train_steps:
      self.check_warmup(self.fit.num_train_steps)

  def check_positions(self, num_positions: int, num_reserved: int = 0) -> None:
    """Raises ValueError if decoded texts are longer than the model's positions.

    Rows may be longer: positions restart with each example.

    Args:
      num_positions: the model's.
      num_reserved: the positions of the slots of prefix methods.
    """
    if self.decoding.num_inputs:
      length = self.decoding.max_new_tokens + 1  # after a prompt of at least one token
      name = "1 + decoding.max_new_tokens"
      limit = "the model's positions" + (f" but {num_reserved} slots" if num_reserved else "")
      check_at_most(name, length, limit, num_positions - num_reserved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateConfig(RunConfig):
  NAME: ClassVar[str] = "e2e_template"
  AFTER_TRAINING: ClassVar[tuple[str, ...]] = ("decoding",)
  workdir: NonEmptyPath
  experiment: str = "e2e_template"
  variant: str = ""
  seed: int = 0
  method: str = "template"
  data: Texts = Texts("reference", "embedded")
  decoding: DecodedInputs = DecodedInputs("test", 630)


# ---- finetune ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserData:
  file: LocalPath
  valid_file: LocalPath
  valid_share: PartOfOne
  chat_template: LocalPath
  today: Annotated[str, day]
  ignored_fields: tuple[str, ...]
  row_length: LengthOrZero
  truncate: bool
  packing: bool
  batch_size: Rows
  num_epochs: Epochs


@dataclasses.dataclass(frozen=True)
class Samples:
  count: Annotated[int, Within("[0, 10_000]")]
  max_new_tokens: NewTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(AdaptationConfig):
  NAME: ClassVar[str] = "finetune"
  AFTER_TRAINING: ClassVar[tuple[str, ...]] = ("samples",)
  method: str = "lora"  # the method of runs that were stored before there was a choice
  model: LanguageModel
  lora: TextLora
  data: UserData
  fit: KeepingFit
  samples: Samples

  def __post_init__(self):
    super().__post_init__()
    self.check_batch(self.data.batch_size, self.data.row_length or 1)
    if self.data.row_length:
      check_at_most("fit.loss_chunk", self.fit.loss_chunk, "data.row_length", self.data.row_length)

  def check_positions(self, num_positions: int, num_slots: int) -> None:
    """Raises ValueError if rows or answers are longer than the model reads.

    Args:
      num_positions: the model's longest sequence in training, tokens.
      num_slots: its longest sequence in decoding, tokens.
    """
    longest = "the model's longest sequence"
    check_at_most("data.row_length", self.data.row_length, longest, num_positions)
    check_at_most("fit.loss_chunk", self.fit.loss_chunk, longest, num_positions)
    if self.samples.count:
      length = self.samples.max_new_tokens + 1  # after a prompt of at least one token
      check_at_most("1 + samples.max_new_tokens", length, longest, num_slots)


# ---- gpt2_pretrain -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainData:
  folder: LocalPath
  prepared: NonEmptyPath
  vocab_size: Annotated[int, Within("[257, 65_536]")]  # bytes and the end of text; 16 bits
  held_out_every: Annotated[int, Within("[2, 1_000_000_000]")]
  num_valid_rows: Annotated[int, Within("[1, 1_000_000_000]")]
  num_train_tokens: Steps
  batch_size: Rows
  row_length: Length


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainModel:
  embed_dim: Annotated[int, Within("[1, 65_536]")]
  num_layers: Annotated[int, Within("[1, 1_024]")]
  num_heads: Annotated[int, Within("[1, 65_536]")]
  num_positions: Length
  dtype: DtypeOrAuto
  scan_layers: bool
  attention: Attention

  def __post_init__(self):
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f"model.num_heads={self.num_heads} must divide model.embed_dim={self.embed_dim}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainFit(Fit):
  loss_chunk: LengthOrZero


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
  NAME: ClassVar[str] = "gpt2_pretrain"
  data: PretrainData
  model: PretrainModel
  fit: PretrainFit

  @property
  def num_train_steps(self) -> int:
    return max(1, self.data.num_train_tokens // (self.data.batch_size * self.data.row_length))

  def __post_init__(self):
    super().__post_init__()
    data = self.data
    self.check_batch(data.batch_size, data.row_length)
    check_at_most(
      "data.row_length", data.row_length, "model.num_positions", self.model.num_positions
    )
    check_chunk(self.fit.loss_chunk, "data.row_length", data.row_length)

  def check_steps(self) -> None:
    """Raises ValueError if the warmup is longer than the training, as in some older runs."""
    self.check_warmup(self.num_train_steps)
