"""Intrinsic dimension: the runs and sizes of `python -m experiments.intrinsic_dimension`.

docs/subspaces.md says what is measured. The runs are of `experiments.gpt2_e2e`, on base models of
several pretraining budgets (configs/e2e_budgets.py); the first two are pretrained by
`python -m experiments.gpt2_pretrain --sweep`, as docs/gpt2_pretrain.md says.
"""

import dataclasses

from experiments.configs import Config, variants
from experiments.configs.e2e_budgets import BASES as FOLDERS
from experiments.configs.e2e_budgets import Changes

BASES: dict[str, Changes] = {
  "new weights": {"model.start": "random"},  # the embedded model's shape
  "0.2 M tokens": FOLDERS["0.2 M tokens"],
  "2 M tokens": FOLDERS["2 M tokens"],
  "20 M tokens": {},  # the embedded model
}
FULL_RATES = {"new weights": 1e-3, "0.2 M tokens": 1e-3, "2 M tokens": 3e-3, "20 M tokens": 3e-3}
"""The learning rates of full fine-tuning: the best in configs/e2e_budgets.py."""

SHARE = 0.9  # of full fine-tuning's gain, which d90 reaches
SEED = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a study.

  Attributes:
    dims: of the random subspaces, rising.
    rates: their learning rates; the best by validation loss counts.
    lines, valid_lines: training and validation examples of each run.
  """

  dims: tuple[int, ...] = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
  rates: tuple[float, ...] = (1e-2, 1e-1, 1.0)
  lines: int = 2000
  valid_lines: int = 500


FULL = Sizes()
TINY = Sizes(dims=(4, 16), rates=(0.1, 1.0), lines=64, valid_lines=24)  # says nothing


def get_config() -> Config:
  """Returns the config that all runs change."""
  return variants.get_config("embedded")
