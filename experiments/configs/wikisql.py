"""WikiSQL, rebuilt columns (Hu et al. 2021, Table 4): questions to queries.

    python -m experiments.wikisql                                              # smollm2
    python -m experiments.wikisql --config=experiments/configs/wikisql.py:medium
    python -m experiments.wikisql --sweep                                      # the methods below

The tables' columns are rebuilt (docs/data_sets.md), so that no result belongs beside the paper's.
gpt2_e2e.py explains the fields, gpt3.py the variants. Expect: not run.
"""

from collections.abc import Iterator

from experiments.configs import Config
from experiments.configs.gpt3 import base_config, methods


def get_config(variant: str = "smollm2") -> Config:
  """Returns the config of a variant: smollm2 or medium."""
  config = base_config(variant, ("smollm2", "medium"))
  config.workdir = "runs/wikisql/{name}"  # {name}: the variant and what differs from this file
  config.data.update({"name": "wikisql", "source": "data/wikisql", "max_length": 384})
  config.data.update({"row_length": 384, "loss_length": 176})  # the longest query has 170 tokens
  config.decoding.max_new_tokens = 128
  if variant == "smollm2":
    config.data.batch_size = 4
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run."""
  return methods(config, ("lora", "full_finetuning", "frozen_base"))
