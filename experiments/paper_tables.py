"""Values of Hu et al. 2021 (arXiv 2106.09685v2) that ours are set beside, in our units.

Both tables are of the E2E NLG Challenge: all of the training lines, 5 epochs, GPT-2 medium or
large. A value is not one that a small model is expected to reach.
"""

from typing import NamedTuple


class Value(NamedTuple):
  """A figure of the paper's and what stands behind its ± there, if anything."""

  mean: float
  deviation: float | None = None


class Row(NamedTuple):
  """A row of Table 3. `trainable` is as printed; rank 4 on q and v of GPT-2 M is 393,216."""

  what: str
  trainable: str
  bleu: Value
  nist: Value
  meteor: Value
  rouge_l: Value
  cider: Value


def _row(what: str, trainable: str, *cells: str) -> Row:
  """Reads cells as the paper prints them: `68.2` or `70.4±.1`."""
  parts = (cell.split("±") for cell in cells)
  return Row(what, trainable, *(Value(*map(float, part)) for part in parts))


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
"""GPT-2 M after 26,000 steps, by rank of LoRA on q and v."""
