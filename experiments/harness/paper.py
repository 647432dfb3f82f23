"""Results of Hu et al. 2021 (arXiv 2106.09685v2), in our units, for comparison.

Tables 3 and 18 have the E2E NLG Challenge: all training examples, 5 epochs, GPT-2 medium or large.
Table 1 has latency. Tables 13 and 14 have DART and WebNLG, Table 4 has SAMSum by GPT-3, Table 2
GLUE's dev sets. Small models are not expected to reach these values.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Value(NamedTuple):
  """A number in the paper, and its deviation (after ±) if the paper gives one."""

  mean: float
  deviation: float | None = None


class Row(NamedTuple):
  """A row of Table 3; `trainable` as printed (rank 4 on q and v of GPT-2 M has 393,216)."""

  label: str
  trainable: str
  bleu: Value
  nist: Value
  meteor: Value
  rouge_l: Value
  cider: Value


def _row(label: str, trainable: str, *cells: str) -> Row:
  """Reads cells in the paper's notation: `68.2` or `70.4±.1`."""
  parts = (cell.split("±") for cell in cells)
  return Row(label, trainable, *(Value(*map(float, part)) for part in parts))


TABLE_3 = (  # a star there: numbers published in prior works
  _row("GPT-2 M, FT*", "354.92M", "68.2", "8.62", "46.2", "71.0", "2.47"),
  _row("GPT-2 M, Adapter L*", "0.37M", "66.3", "8.41", "45.0", "69.8", "2.40"),
  _row("GPT-2 M, Adapter L*", "11.09M", "68.9", "8.71", "46.1", "71.3", "2.47"),
  _row("GPT-2 M, Adapter H", "11.09M", "67.3±.6", "8.50±.07", "46.0±.2", "70.7±.2", "2.44±.01"),
  _row("GPT-2 M, FT Top2*", "25.19M", "68.1", "8.59", "46.0", "70.8", "2.41"),
  _row("GPT-2 M, PreLayer*", "0.35M", "69.7", "8.81", "46.1", "71.4", "2.49"),
  _row("GPT-2 M, LoRA", "0.35M", "70.4±.1", "8.85±.02", "46.8±.2", "71.8±.1", "2.53±.02"),
  _row("GPT-2 L, FT*", "774.03M", "68.5", "8.78", "46.0", "69.9", "2.45"),
  _row("GPT-2 L, Adapter L", "0.88M", "69.1±.1", "8.68±.03", "46.3±.0", "71.4±.2", "2.49±.0"),
  _row("GPT-2 L, Adapter L", "23.00M", "68.9±.3", "8.70±.04", "46.1±.1", "71.3±.2", "2.45±.02"),
  _row("GPT-2 L, PreLayer*", "0.77M", "70.3", "8.85", "46.2", "71.7", "2.47"),
  _row("GPT-2 L, LoRA", "0.77M", "70.4±.1", "8.89±.02", "46.8±.2", "72.0±.2", "2.47±.02"),
)

TABLE_1 = (  # GPT-2 M on a Quadro RTX8000, mean of 100 passes
  ("ms, of a pass", "32 x 512, 0.5M", "16 x 256, 11M", "1 x 128, 11M"),
  ("FT, LoRA", "1449.4 ± 0.8", "338.0 ± 0.6", "19.8 ± 2.7"),
  ("Adapter L", "1482.0 ± 1.0 (+2.2 %)", "354.8 ± 0.5 (+5.0 %)", "23.9 ± 2.1 (+20.7 %)"),
  ("Adapter H", "1492.2 ± 1.0 (+3.0 %)", "366.3 ± 0.5 (+8.4 %)", "25.8 ± 2.2 (+30.3 %)"),
)
NAMES_18 = ("valid_loss", "bleu", "nist", "meteor", "rouge_l", "cider")
_TABLE_18 = {  # rank: as printed, METEOR and ROUGE-L of 1
  1: (1.23, 68.72, 8.7215, 0.4565, 0.7052, 2.4329),
  2: (1.21, 69.17, 8.7413, 0.4590, 0.7052, 2.4639),
  4: (1.18, 70.38, 8.8439, 0.4689, 0.7186, 2.5349),
  8: (1.17, 69.57, 8.7457, 0.4636, 0.7196, 2.5196),
  16: (1.16, 69.61, 8.7483, 0.4629, 0.7177, 2.4985),
  32: (1.16, 69.33, 8.7736, 0.4642, 0.7105, 2.5255),
  64: (1.16, 69.24, 8.7174, 0.4651, 0.7180, 2.5070),
  128: (1.16, 68.73, 8.6718, 0.4628, 0.7127, 2.5030),
  256: (1.16, 68.92, 8.6982, 0.4629, 0.7128, 2.5012),
  512: (1.16, 68.78, 8.6857, 0.4637, 0.7128, 2.5025),
  1024: (1.17, 69.37, 8.7495, 0.4659, 0.7149, 2.5090),
}
_PERCENT = ("meteor", "rouge_l")
TABLE_18: dict[int, dict[str, float]] = {
  rank: {
    name: round(100 * value, 2) if name in _PERCENT else value
    for name, value in zip(NAMES_18, values, strict=True)
  }
  for rank, values in _TABLE_18.items()
}
"""GPT-2 M after 26,000 steps, by the rank of LoRA on q and v."""


class ScoreRow(NamedTuple):
  """A row of Table 4, 13 or 14: its scores in percent, by our metrics' names."""

  label: str
  trainable: str
  scores: dict[str, Value]


def _score_row(names: Sequence[str], label: str, trainable: str, cells: str) -> ScoreRow:
  parts = ([float(part) for part in cell.split("±")] for cell in cells.split())
  scores = {name: Value(*part) for name, part in zip(names, parts, strict=True)}
  return ScoreRow(label, trainable, scores)


_13 = ("bleu", "meteor", "mean_ter")  # METEOR and TER times 100
TABLE_13 = (
  _score_row(_13, "GPT-2 M, FT", "354M", "46.2 39 46"),
  _score_row(_13, "GPT-2 M, Adapter L", "0.37M", "42.4 36 48"),
  _score_row(_13, "GPT-2 M, Adapter L", "11M", "45.2 38 46"),
  _score_row(_13, "GPT-2 M, FT Top2", "24M", "41.0 34 56"),
  _score_row(_13, "GPT-2 M, PreLayer", "0.35M", "46.4 38 46"),
  _score_row(_13, "GPT-2 M, LoRA", "0.35M", "47.1±.2 39 46"),
  _score_row(_13, "GPT-2 L, FT", "774M", "47.0 39 46"),
  _score_row(_13, "GPT-2 L, Adapter L", "0.88M", "45.7±.1 38 46"),
  _score_row(_13, "GPT-2 L, Adapter L", "23M", "47.1±.1 39 45"),
  _score_row(_13, "GPT-2 L, PreLayer", "0.77M", "46.7 38 45"),
  _score_row(_13, "GPT-2 L, LoRA", "0.77M", "47.5±.1 39 45"),
)
_14 = tuple(f"{name}{part}" for name in _13 for part in ("_unseen", "_seen", ""))
TABLE_14 = (
  _score_row(_14, "GPT-2 M, FT", "354M", "27.7 64.2 46.5 30 45 38 76 33 53"),
  _score_row(_14, "GPT-2 M, Adapter L", "0.37M", "45.1 54.5 50.2 36 39 38 46 40 43"),
  _score_row(_14, "GPT-2 M, Adapter L", "11M", "48.3 60.4 54.9 38 43 41 45 35 39"),
  _score_row(_14, "GPT-2 M, FT Top2", "24M", "18.9 53.6 36.0 23 38 31 99 49 72"),
  _score_row(_14, "GPT-2 M, Prefix", "0.35M", "45.6 62.9 55.1 38 44 41 49 35 40"),
  _score_row(_14, "GPT-2 M, LoRA", "0.35M", "46.7±.4 62.1±.2 55.3±.2 38 44 41 46 33 39"),
  _score_row(_14, "GPT-2 L, FT", "774M", "43.1 65.3 55.5 38 46 42 53 33 42"),
  _score_row(_14, "GPT-2 L, Adapter L", "0.88M", "49.8±.0 61.1±.0 56.0±.0 38 43 41 44 35 39"),
  _score_row(_14, "GPT-2 L, Adapter L", "23M", "49.2±.1 64.7±.2 57.7±.1 39 46 43 46 33 39"),
  _score_row(_14, "GPT-2 L, Prefix", "0.77M", "47.7 63.4 56.3 39 45 42 48 34 40"),
  _score_row(_14, "GPT-2 L, LoRA", "0.77M", "48.4±.3 64.0±.3 57.0±.1 39 45 42 45 32 38"),
)
_4 = ("rouge1", "rouge2", "rougeL")
TABLE_4_SAMSUM = (  # the table's MNLI and WikiSQL are other data than ours
  _score_row(_4, "GPT-3, FT", "175,255.8M", "52.0 28.0 44.5"),
  _score_row(_4, "GPT-3, BitFit", "14.2M", "51.3 27.4 43.5"),
  _score_row(_4, "GPT-3, PreEmbed", "3.2M", "48.3 24.2 40.5"),
  _score_row(_4, "GPT-3, PreLayer", "20.2M", "50.8 27.3 43.5"),
  _score_row(_4, "GPT-3, Adapter H", "7.1M", "53.0 28.9 44.8"),
  _score_row(_4, "GPT-3, Adapter H", "40.1M", "53.2 29.0 45.1"),
  _score_row(_4, "GPT-3, LoRA", "4.7M", "53.8 29.8 45.9"),
  _score_row(_4, "GPT-3, LoRA", "37.7M", "53.4 29.2 45.1"),
)

TASKS_2 = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")


class GlueRow(NamedTuple):
  """A row of Table 2: the median of 5 seeds at their best epochs, in percent, by task."""

  model: str
  label: str
  trainable: str
  scores: dict[str, Value]


def _glue_row(model: str, label: str, trainable: str, cells: str) -> GlueRow:
  parts = ([float(part) for part in cell.split("±")] for cell in cells.split())
  scores = {task: Value(*part) for task, part in zip(TASKS_2, parts, strict=True)}
  return GlueRow(model, label, trainable, scores)


BASE, LARGE, XXL = "roberta_base", "roberta_large", "deberta_xxl"
TABLE_2 = (  # the stars and daggers there: prior works; the setup of Houlsby et al. 2019
  _glue_row(BASE, "FT*", "125.0M", "87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2"),
  _glue_row(BASE, "BitFit*", "0.1M", "84.7 93.7 92.7 62.0 91.8 84.0 81.5 90.8"),
  _glue_row(
    *(BASE, "Adapter D*", "0.3M"),
    "87.1±.0 94.2±.1 88.5±1.1 60.8±.4 93.1±.1 90.2±.0 71.5±2.7 89.7±.3",
  ),
  _glue_row(
    *(BASE, "Adapter D*", "0.9M"),
    "87.3±.1 94.7±.3 88.4±.1 62.6±.9 93.0±.2 90.6±.0 75.9±2.2 90.3±.1",
  ),
  _glue_row(
    *(BASE, "LoRA", "0.3M"),
    "87.5±.3 95.1±.2 89.7±.7 63.4±1.2 93.3±.3 90.8±.1 86.6±.7 91.5±.2",
  ),
  _glue_row(LARGE, "FT*", "355.0M", "90.2 96.4 90.9 68.0 94.7 92.2 86.6 92.4"),
  _glue_row(
    *(LARGE, "LoRA", "0.8M"),
    "90.6±.2 96.2±.5 90.9±1.2 68.2±1.9 94.9±.3 91.6±.1 87.4±2.5 92.6±.2",
  ),
  _glue_row(
    *(LARGE, "Adapter P†", "3.0M"),
    "90.2±.3 96.1±.3 90.2±.7 68.3±1.0 94.8±.2 91.9±.1 83.8±2.9 92.1±.7",
  ),
  _glue_row(
    *(LARGE, "Adapter P†", "0.8M"),
    "90.5±.3 96.6±.2 89.7±1.2 67.8±2.5 94.8±.3 91.7±.2 80.1±2.9 91.9±.4",
  ),
  _glue_row(
    *(LARGE, "Adapter H†", "6.0M"),
    "89.9±.5 96.2±.3 88.7±2.9 66.5±4.4 94.7±.2 92.1±.1 83.4±1.1 91.0±1.7",
  ),
  _glue_row(
    *(LARGE, "Adapter H†", "0.8M"),
    "90.3±.3 96.3±.5 87.7±1.7 66.3±2.0 94.7±.2 91.5±.1 72.9±2.9 91.5±.5",
  ),
  _glue_row(
    *(LARGE, "LoRA†", "0.8M"),
    "90.6±.2 96.2±.5 90.2±1.0 68.2±1.9 94.8±.3 91.6±.2 85.2±1.1 92.3±.5",
  ),
  _glue_row(XXL, "FT*", "1500.0M", "91.8 97.2 92.0 72.0 96.0 92.7 93.9 92.9"),
  _glue_row(
    *(XXL, "LoRA", "4.7M"),
    "91.9±.2 96.9±.2 92.6±.6 72.4±1.1 96.0±.1 92.9±.1 94.9±.4 93.0±.2",
  ),
)
