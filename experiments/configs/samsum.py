"""SAMSum (Hu et al. 2021, Table 4): chats to summaries.

    python -m experiments.samsum                                               # smollm2
    python -m experiments.samsum --config.method=floor                         # lead-3
    python -m experiments.samsum --sweep                                       # the methods below

GPT-2 has too few positions for the longest chats. gpt2_e2e.py explains the fields, gpt3.py the
variant. Expect: ROUGE-1 near 31 from the floor; not run otherwise.
"""

from collections.abc import Iterator

from experiments.configs import Config
from experiments.configs.gpt3 import base_config, methods


def get_config(variant: str = "smollm2") -> Config:
  """Returns the config of the one variant, smollm2."""
  config = base_config(variant, ("smollm2",))
  config.workdir = "runs/samsum/{name}"  # {name}: the variant and what differs from this file
  config.data.update({"name": "samsum", "source": "data/samsum", "max_length": 2048})
  config.data.update({"row_length": 1152, "loss_length": 256, "batch_size": 2})
  config.decoding.update({"max_new_tokens": 96, "batch_size": 8})
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run."""
  return methods(config, ("lora", "full_finetuning", "frozen_base", "floor"))
