"""SmolLM2 on E2E: the table of docs/smollm2.md, on 4,000 examples, one epoch, 630 test inputs.

    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/smollm2_finals.py
    python -m experiments.report runs/smollm2/finals/* runs/e2e_template

The first seed of every method comes first, then the other seeds of three methods.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.configs.smollm2_rates import ARMS, Changes, best_rate
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

SEEDS = (1, 2, 3)
SEVERAL_SEEDS = ("LoRA, rank 16", "full", "LoRA, rank 4, q,v")


def get_config() -> Config:
  """Returns the config that the runs change."""
  config = gpt2_e2e.get_config("smollm2")
  config.workdir = "runs/smollm2/finals"
  config.seed = SEEDS[0]
  return config


def sweep(config: Config) -> Iterator[Changes]:
  """Yields the changed fields of each run."""
  read_config(E2EConfig, config)
  for seed in SEEDS:
    for arm, changes in ARMS.items():
      if seed == SEEDS[0] or arm in SEVERAL_SEEDS:
        yield {**changes, "optimizer.learning_rate": best_rate(arm), "seed": seed}
