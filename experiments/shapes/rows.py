"""Parameter counts of Hu et al. 2021 (arXiv 2106.09685v2), Tables 2, 3, 4, 13, 14 and 15.

Each row has a method at the size that the paper gives, or where it gives none at the size whose
count is the nearest to the printed one; the paper's formula (section 5.1), in numbers; the printed
counts by table; and, where these differ, what is known of it.

    D, L     width and layers of the model      r    rank, or width of a bottleneck
    lp, li   prefix and infix tokens            k    adapted matrices of a layer
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lora_jax as lj
from experiments.harness.paper import (
  BASE,
  LARGE,
  TABLE_2,
  TABLE_3,
  TABLE_4_SAMSUM,
  TABLE_13,
  TABLE_14,
  XXL,
)
from experiments.harness.paper_gpt3 import TABLE_15
from experiments.shapes.models import (
  DEBERTA_XXL,
  GPT2_LARGE,
  GPT2_MEDIUM,
  GPT3,
  MODELS,
  ROBERTA_BASE,
  ROBERTA_LARGE,
  Adapt,
  Config,
  count,
)

MILLION, BILLION = 10**6, 10**9
TOP2 = "FT Top2"
GPT2_TABLES = "3 13 14"
ENCODERS = {BASE: "RoBERTa base", LARGE: "RoBERTa large", XXL: "DeBERTa XXL"}


class Note(NamedTuple):
  """What is known of a printed count that the method's count does not give.

  Attributes:
    text: a sentence.
    explains: a count that reads as the printed one; None if none is known.
  """

  text: str
  explains: int | None = None


class Row(NamedTuple):
  """A method on a model in the paper's tables.

  Attributes:
    model: a key of `MODELS`.
    label: the paper's name, and the size.
    method: adapts a function.
    formula: the paper's, in symbols.
    value: the formula's value.
    printed: the count by table, as printed.
    note: on a printed count that differs, or on the size.
    has_head: whether the model has a classification head of two labels, which is trained.
    unrolled: whether the method needs layers that are not scanned.
  """

  model: str
  label: str
  method: Adapt
  formula: str
  value: int
  printed: Mapping[str, str]
  note: Note | None = None
  has_head: bool = False
  unrolled: bool = False

  @property
  def name(self) -> str:
    return f"{self.model}, {self.label}"

  @property
  def config(self) -> Config:
    config = MODELS[self.model]
    return dataclasses.replace(config, num_labels=2) if self.has_head else config

  @property
  def trained(self) -> int:
    """The number of parameters that the method trains, from its `init`."""
    return count(self.config, self.method, self.unrolled)


def reading(printed: str, count: int) -> str:
  """Returns how a printed count is read so that it is a count; "" if it is not.

  >>> reading("0.37M", 368784), reading("301.9M", 301_989_888), reading("0.35M", 393_216)
  ('rounded', 'cut off', '')
  """
  number, unit = printed[:-1].replace(",", ""), {"M": MILLION, "B": BILLION}[printed[-1]]
  digits = len(number.partition(".")[2])
  ways = {
    "rounded": f"{count / unit:.{digits}f}",
    "cut off": f"{math.floor(count / unit * 10**digits) / 10**digits:.{digits}f}",
    "rounded, of 2^20": f"{count / 2**20:.{digits}f}" if unit == MILLION else "",
    "rounded to millions": f"{round(count / MILLION)}.0" if unit == MILLION else "",
  }
  return next((way for way, text in ways.items() if text == number), "")


# ---- the paper's formulae ------------------------------------------------------------------------


def lora_count(config: Config, rank: int, num_matrices: int) -> int:
  """Returns 2 k L D r, for k matrices a layer."""
  return 2 * num_matrices * config.num_layers * config.embed_dim * rank


def adapter_count(config: Config, width: int, num_adapters: int, num_norms: int = 0) -> int:
  """Returns L_adpt (2 D r + r + D) + 2 L_ln D."""
  dim = config.embed_dim
  return num_adapters * (2 * dim * width + width + dim) + 2 * num_norms * dim


def layer_count(config: Config) -> int:
  """Returns 12 D^2 + 13 D, the weights of one layer."""
  return 12 * config.embed_dim**2 + 13 * config.embed_dim


def gpt2_count(config: Config) -> int:
  """Returns the weights of a GPT-2: tied embeddings, positions, layers, the last norm."""
  rows = config.vocab_size + config.num_positions
  return config.num_layers * layer_count(config) + (rows + 2) * config.embed_dim


def encoder_count(config: Config, num_labels: int = 2) -> int:
  """Returns the weights of a RoBERTa with its head, of one table of one token type."""
  dim = config.embed_dim
  rows = config.vocab_size + config.num_positions + 1
  head = dim**2 + dim + num_labels * (dim + 1)
  return config.num_layers * layer_count(config) + (rows + 2) * dim + head


def deberta_count(config: Config, num_labels: int = 2) -> int:
  """Returns the weights of a DeBERTa-v2 with a convolution and its head.

  It has tokens, 512 distances with their norm, and the norm of the embeddings; the convolution of
  three tokens has a norm, too.
  """
  dim = config.embed_dim
  tables = (config.vocab_size + 2 + 512 + 2) * dim
  convolution = 3 * dim**2 + dim + 2 * dim
  head = dim**2 + dim + num_labels * (dim + 1)
  return config.num_layers * layer_count(config) + tables + convolution + head


# ---- the rows ------------------------------------------------------------------------------------

PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def target_of(matrices: str) -> str:
  """Returns the pattern of the attention's matrices by their letters in the paper.

  >>> target_of("qv")
  '.*/attn/(query|value)/kernel'
  """
  return rf".*/attn/({'|'.join(PROJECTIONS[letter] for letter in matrices)})/kernel"


def lora_of(matrices: str, rank: int) -> Adapt:
  """Returns LoRA of some of the attention's matrices, as `Wq, Wv` of the paper's Table 5."""
  config = lj.LoraConfig(rank, float(rank), target=target_of(matrices))
  return functools.partial(lj.lora, config=config)


def _full(model: str, formula: str, value: int, printed: dict[str, str], **fields: Any) -> Row:
  return Row(model, "FT", lj.full_finetuning, formula, value, printed, **fields)


def _lora(model: str, matrices: str, rank: int, printed: dict[str, str], **fields: Any) -> Row:
  method, label = lora_of(matrices, rank), f"LoRA, {matrices}, r = {rank}"
  value = lora_count(MODELS[model], rank, len(matrices))
  return Row(model, label, method, "2 k L D r", value, printed, **fields)


def _adapter(
  model: str, kind: str, width: int, printed: dict[str, str], num_dropped: int = 0, **fields: Any
) -> Row:
  layers = MODELS[model].num_layers - num_dropped
  make = {
    "L": lj.lin_config,
    "H": lj.houlsby_config,
    "P": lj.pfeiffer_config,
    "D": functools.partial(lj.adapter_drop_config, num_dropped=num_dropped),
  }[kind]
  method = functools.partial(lj.bottleneck_adapter, config=make(width))
  num_adapters, num_norms = 2 * layers if kind == "H" else layers, layers if kind == "L" else 0
  value = adapter_count(MODELS[model], width, num_adapters, num_norms)
  label = f"Adapter {kind}, r = {width}" + (f", {layers} layers" if num_dropped else "")
  norms = " + 2 L_ln D" if num_norms else ""
  formula = f"{num_adapters} (2 D r + r + D){norms}"
  return Row(model, label, method, formula, value, printed, **fields)


def _prefix(model: str, kind: str, slots: int, printed: dict[str, str], **fields: Any) -> Row:
  dim, layers = MODELS[model].embed_dim, MODELS[model].num_layers
  make = lj.prefix_embedding if kind == "PreEmbed" else lj.prefix_layer
  method = functools.partial(make, num_slots=slots)
  formula = "D (lp + li)" if kind == "PreEmbed" else "L D (lp + li)"
  value = slots * dim * (1 if kind == "PreEmbed" else layers)
  return Row(model, f"{kind}, lp + li = {slots}", method, formula, value, printed, **fields)


def _both(kind: str, rank: int, slots: int, printed: dict[str, str], **fields: Any) -> Row:
  lora, prefix = _lora("GPT-3", "qv", rank, {}), _prefix("GPT-3", kind, slots, {})
  short = {"PreEmbed": "PE", "PreLayer": "PL"}[kind]
  return Row(
    "GPT-3",
    f"LoRA+{short}, qv, r = {rank}, lp + li = {slots}",
    lambda fn: lj.compose(fn, lora.method, prefix.method),
    f"{lora.formula} + {prefix.formula}",
    lora.value + prefix.value,
    printed,
    **fields,
  )


PRINTED: Mapping[str, Sequence[tuple[str, str]]] = {
  "2": [(f"{ENCODERS[row.model]}, {row.label.rstrip('*†')}", row.trainable) for row in TABLE_2],
  "3": [(row.label.rstrip("*"), row.trainable) for row in TABLE_3],
  "4": [(row.label, row.trainable) for row in TABLE_4_SAMSUM],
  "13": [(row.label, row.trainable) for row in TABLE_13],
  "14": [(row.label.replace("Prefix", "PreLayer"), row.trainable) for row in TABLE_14],
  "15": [(f"GPT-3, {label}", trained) for label, trained, *_ in TABLE_15[1:]],
}
"""The labels and counts of the paper's tables, as printed."""


def in_tables(tables: str, label: str, nth: int = 0) -> dict[str, str]:
  """Returns a printed count by table.

  Args:
    tables: their numbers, with spaces.
    label: of the row, the same in all of them.
    nth: the number of the row among those of this label.

  >>> in_tables("3 13", "GPT-2 M, Adapter L", 1)
  {'3': '11.09M', '13': '11M'}
  """
  return {
    table: [count for name, count in PRINTED[table] if name == label][nth]
    for table in tables.split()
  }


def _of_one_thousandth(config: Config, count: int) -> Note:
  thousandth = round(gpt2_count(config) / 1000)
  return Note(
    f"The print is 0.1 % of the model, {thousandth:,}: the share that Li and Liang 2021 give for "
    f"prefix tuning. The nearest count is {count:,}",
    thousandth,
  )


def _lora_of_15(matrices: str, rank: int) -> dict[str, str]:
  """Returns the count that Table 15 prints of LoRA on some matrices."""
  words = {"v": "Wv", "qv": "Wq Wv", "qkvo": "all"}[matrices]
  return in_tables("15", f"GPT-3, LoRA, {words}, r {rank}")


_SEVEN_PERCENT = Note(
  "The formula gives less, by 1 to 8 %, and no whole number of positions rounds to the print"
)
FT3 = "12 L D^2 + 13 L D + (V + P + 2) D"
ROWS: tuple[Row, ...] = (
  # Table 2
  _full(
    *("RoBERTa base", "that of GPT-2, and a head", encoder_count(ROBERTA_BASE)),
    *(in_tables("2", "RoBERTa base, FT"),),
    has_head=True,
  ),
  Row(
    "RoBERTa base",
    "BitFit",
    lj.bitfit,
    "11 L D + D",
    11 * 12 * 768 + 768,
    in_tables("2", "RoBERTa base, BitFit"),
  ),
  _adapter("RoBERTa base", "D", 48, in_tables("2", "RoBERTa base, Adapter D"), num_dropped=8),
  _adapter("RoBERTa base", "D", 48, in_tables("2", "RoBERTa base, Adapter D", 1)),
  _lora("RoBERTa base", "qv", 8, in_tables("2", "RoBERTa base, LoRA")),
  _full(
    *("RoBERTa large", "that of GPT-2, and a head", encoder_count(ROBERTA_LARGE)),
    *(in_tables("2", "RoBERTa large, FT"),),
    has_head=True,
  ),
  _lora("RoBERTa large", "qv", 8, in_tables("2", "RoBERTa large, LoRA")),
  _adapter("RoBERTa large", "P", 64, in_tables("2", "RoBERTa large, Adapter P")),
  _adapter("RoBERTa large", "P", 16, in_tables("2", "RoBERTa large, Adapter P", 1)),
  _adapter("RoBERTa large", "H", 64, in_tables("2", "RoBERTa large, Adapter H")),
  _adapter("RoBERTa large", "H", 8, in_tables("2", "RoBERTa large, Adapter H", 1)),
  _full(
    *("DeBERTa XXL", "that of GPT-2, a convolution and a head", deberta_count(DEBERTA_XXL)),
    *(in_tables("2", "DeBERTa XXL, FT"),),
    note=Note("He et al. 2021 call the model 1.5B; the print repeats it in millions"),
    has_head=True,
  ),
  _lora(
    *("DeBERTa XXL", "qv", 16, in_tables("2", "DeBERTa XXL, LoRA")),
    note=Note(
      "The paper's Table 10 has r = 8, whose count is half of the print; its scripts have 16",
      lora_count(DEBERTA_XXL, 16, 2),
    ),
  ),
  # Tables 3, 13 and 14
  _full(
    *("GPT-2 M", FT3, gpt2_count(GPT2_MEDIUM), in_tables(GPT2_TABLES, "GPT-2 M, FT")),
    note=Note(
      "354.82M is the count, and the same formula gives the 774.03M of GPT-2 L: a digit of 354.92M "
      "is wrong"
    ),
  ),
  _adapter("GPT-2 M", "L", 6, in_tables(GPT2_TABLES, "GPT-2 M, Adapter L")),
  _adapter("GPT-2 M", "L", 224, in_tables(GPT2_TABLES, "GPT-2 M, Adapter L", 1)),
  _adapter(
    *("GPT-2 M", "H", 112, in_tables("3", "GPT-2 M, Adapter H")),
    note=Note(
      "11.09M is the count of Adapter L with r = 224; no r gives it for Adapter H",
      adapter_count(GPT2_MEDIUM, 224, 24, 24),
    ),
  ),
  Row(
    *("GPT-2 M", TOP2, functools.partial(lj.top_layers, num_layers=2)),
    *(
      "2 (12 D^2 + 13 D)",
      2 * layer_count(GPT2_MEDIUM),
      in_tables(GPT2_TABLES, "GPT-2 M, FT Top2"),
    ),
    unrolled=True,
  ),
  _prefix(
    *("GPT-2 M", "PreLayer", 14, in_tables(GPT2_TABLES, "GPT-2 M, PreLayer")),
    note=_of_one_thousandth(GPT2_MEDIUM, 14 * 24 * 1024),
  ),
  _lora(
    *("GPT-2 M", "qv", 4, in_tables(GPT2_TABLES, "GPT-2 M, LoRA")),
    note=_of_one_thousandth(GPT2_MEDIUM, lora_count(GPT2_MEDIUM, 4, 2)),
  ),
  _full("GPT-2 L", FT3, gpt2_count(GPT2_LARGE), in_tables(GPT2_TABLES, "GPT-2 L, FT")),
  _adapter("GPT-2 L", "L", 8, in_tables(GPT2_TABLES, "GPT-2 L, Adapter L")),
  _adapter("GPT-2 L", "L", 248, in_tables(GPT2_TABLES, "GPT-2 L, Adapter L", 1)),
  _prefix(
    *("GPT-2 L", "PreLayer", 17, in_tables(GPT2_TABLES, "GPT-2 L, PreLayer")),
    note=_of_one_thousandth(GPT2_LARGE, 17 * 36 * 1280),
  ),
  _lora(
    *("GPT-2 L", "qv", 4, in_tables(GPT2_TABLES, "GPT-2 L, LoRA")),
    note=_of_one_thousandth(GPT2_LARGE, lora_count(GPT2_LARGE, 4, 2)),
  ),
  # Tables 4 and 15
  _full(
    *(
      "GPT-3",
      FT3,
      gpt2_count(GPT3),
      in_tables("4", "GPT-3, FT") | in_tables("15", "GPT-3, full fine-tuning"),
    ),
    note=Note(
      "The shape of Brown et al. 2020 (Table 2.1) with a vocabulary of 50,257 and 2,048 positions "
      "has 651.5M fewer"
    ),
  ),
  Row(
    *(
      "GPT-3",
      "BitFit",
      lj.bitfit,
      "11 L D + D",
      11 * 96 * 12288 + 12288,
      in_tables("4", "GPT-3, BitFit"),
    ),
    note=Note(
      "14.2M is 12 L D, one D a layer more than the biases of attention (4 D), MLP (5 D) and norms "
      "(2 D)",
      12 * 96 * 12288,
    ),
  ),
  *(
    _prefix(
      *("GPT-3", "PreEmbed", lp + 8),
      in_tables("15", f"GPT-3, PreEmbed, {lp} + 8{' tokens' if lp == 32 else ''}")
      | (in_tables("4", "GPT-3, PreEmbed") if lp == 256 else {}),
    )
    for lp in (32, 64, 128, 256, 512)
  ),
  *(
    _prefix(
      *("GPT-3", "PreLayer", lp + li),
      (in_tables("4", "GPT-3, PreLayer") if li == 8 else {})
      | in_tables("15", f"GPT-3, PreLayer, {lp} + {li}"),
      note=_SEVEN_PERCENT,
    )
    for lp, li in ((2, 2), (8, 0), (8, 8), (32, 4), (64, 0))
  ),
  *(
    _adapter(
      *("GPT-3", "H", width),
      (in_tables("4", "GPT-3, Adapter H", {1: 0, 8: 1}[width]) if width in (1, 8) else {})
      | in_tables("15", f"GPT-3, Adapter_H, r {width}"),
    )
    for width in (1, 4, 8, 16, 64)
  ),
  *(
    _lora("GPT-3", matrices, rank, in_table_4 | _lora_of_15(matrices, rank))
    for matrices, rank, in_table_4 in (
      ("v", 2, in_tables("4", "GPT-3, LoRA")),
      *(("qv", 1, {}), ("qv", 2, {}), ("qkvo", 1, {}), ("qv", 4, {}), ("qkvo", 2, {})),
      ("qv", 8, in_tables("4", "GPT-3, LoRA", 1)),
      *(("qkvo", 4, {}), ("qv", 64, {})),
    )
  ),
  _lora(
    *("GPT-3", "qkvo", 64, _lora_of_15("qkvo", 64)),
    note=Note("603.8M is twice the print of q and v, 301.9M, which was cut off", 2 * 301_900_000),
  ),
  *(
    _both("PreEmbed", rank, 12, in_tables("15", f"GPT-3, LoRA + PreEmbed, r {rank}, 8 + 4"))
    for rank in (8, 32, 64)
  ),
  _both(
    *("PreLayer", 8, 12, in_tables("15", "GPT-3, LoRA + PreLayer, r 8, 8 + 4")),
    note=Note("Its PreLayer part is 7 % above the formula, as other rows of PreLayer are"),
  ),
)
