"""MNLI as text, a subset of 10,000 (Hu et al. 2021, Table 4): two sentences to a label's word.

    python -m experiments.mnli_text                                            # smollm2
    python -m experiments.mnli_text --config=experiments/configs/mnli_text.py:medium
    python -m experiments.mnli_text --config.method=floor                      # the majority
    python -m experiments.mnli_text --sweep                                    # the methods below

The subset's development set is the test set here, and the last 1,000 pairs of its training set
are for validation. gpt2_e2e.py explains the fields, gpt3.py the variants. Expect: 34.7 % from the
floor on all 1,000 inputs; not run otherwise.
"""

from collections.abc import Iterator

from experiments.configs import Config
from experiments.configs.gpt3 import base_config, methods


def get_config(variant: str = "smollm2") -> Config:
  """Returns the config of a variant: smollm2 or medium."""
  config = base_config(variant, ("smollm2", "medium"))
  config.workdir = "runs/mnli_text/{name}"  # {name}: the variant and what differs from this file
  config.data.update({"name": "mnli_text", "source": "data/mnli"})  # train.json and dev.json
  config.data.update({"row_length": 384, "loss_length": 32})
  config.decoding.max_new_tokens = 8
  if variant == "smollm2":
    config.data.batch_size = 4
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run."""
  return methods(config, ("lora", "full_finetuning", "frozen_base", "floor"))
