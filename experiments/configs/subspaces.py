"""Subspaces of adapters: the runs and sizes of `python -m experiments.subspaces`.

docs/subspaces.md says what is measured. The runs are of `experiments.gpt2_e2e`, on the embedded
base model or SmolLM2, with the settings of configs/variants.py and the ranks below.
"""

import dataclasses

from experiments.configs import Config, variants
from experiments.configs.gpt2_e2e import MINI_RATES

SEEDS = (1, 2)  # the second one only at the larger rank
SCALING = 2.0  # alpha / rank
ROUNDING = "Q4_0"  # of the base model's weights: the noise floor
RANDOM_RATE = 1e-3  # the learning rate on random weights: LoRA's best in configs/e2e_budgets.py
NUM_LAYERS = 4  # shown in Figures 6 and 7
WEIGHT_SHARE = 0.1  # of a weight's directions in Figure 8, the first ones


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a study.

  Attributes:
    ranks: the smaller and the larger one.
    lines, valid_lines: training and validation examples of each run.
  """

  ranks: tuple[int, int] = (8, 64)
  lines: int = 4000
  valid_lines: int = 500


FULL = Sizes()
TINY = Sizes(ranks=(2, 8), lines=64, valid_lines=24)  # to see all parts work; says nothing


def get_config(base: str = "embedded") -> Config:
  """Returns the config that all runs on a base model change: embedded or smollm2."""
  return variants.get_config(base)


def learning_rate(base: str, rank: int, is_random: bool) -> float:
  """Returns the learning rate of a run.

  Those of the embedded model were chosen by validation loss, at these or near ranks. SmolLM2's is
  that of rank 16; it was not tuned for other ranks or random weights.
  """
  usual: float = get_config(base).optimizer.learning_rate
  if base != "embedded":
    return usual
  return RANDOM_RATE if is_random else MINI_RATES.get(rank, usual)
