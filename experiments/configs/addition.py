"""Addition of numbers of four digits.

    python -m experiments.addition                                             # mini, on CPUs
    python -m experiments.addition --config=experiments/configs/addition.py:smollm2
    python -m experiments.addition --sweep                                     # the ranks below

Not a task of the paper: a small base model cannot add, and the metric is exact. gpt2_e2e.py
explains the fields; the learning rates are E2E's. Expect: not run; guessing gives 0 %.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

RANKS = (1, 4, 16, 64)


def get_config(variant: str = "mini") -> Config:
  """Returns the config of a variant: mini or smollm2."""
  if variant not in ("mini", "smollm2"):
    raise ValueError(f"variant must be one of mini, smollm2, got {variant!r}")
  config = gpt2_e2e.get_config(variant)
  config.workdir = "runs/addition/{name}"  # {name}: the variant and what differs from this file
  config.data.update({"name": "addition", "num_train_records": 10_000})  # of 100,000
  config.data.update({"row_length": 64, "loss_length": 24})
  config.decoding.update({"num_inputs": 200, "num_beams": 1, "no_repeat_ngram_size": 0})
  config.decoding.update({"max_new_tokens": 8, "official_references": False})
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run: ranks at one alpha / rank, then full fine-tuning."""
  read_config(E2EConfig, config)
  scaling = config.lora.alpha / config.lora.rank
  yield from ({"lora.rank": rank, "lora.alpha": scaling * rank} for rank in RANKS)
  yield {"method": "full_finetuning"}
