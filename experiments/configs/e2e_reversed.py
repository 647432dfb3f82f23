"""E2E reversed: the slots of a restaurant from a text about it.

    python -m experiments.e2e_reversed                                         # mini, on CPUs
    python -m experiments.e2e_reversed --config=experiments/configs/e2e_reversed.py:smollm2
    python -m experiments.e2e_reversed --config.method=floor                   # copying
    python -m experiments.e2e_reversed --sweep                                 # the sizes below

Not a task of the paper: a small base model knows nothing of the answer's format, and the metric is
exact. gpt2_e2e.py explains the fields; the learning rates are E2E's. Expect: not run, and from the
floor on all inputs 5.0 % exact and 72.6 % of the slots.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

SIZES = (100, 1000, 10_000, 0)  # training examples, as in the paper's Table 16; 0 is all


def get_config(variant: str = "mini") -> Config:
  """Returns the config of a variant: mini or smollm2."""
  if variant not in ("mini", "smollm2"):
    raise ValueError(f"variant must be one of mini, smollm2, got {variant!r}")
  config = gpt2_e2e.get_config(variant)
  config.workdir = "runs/e2e_reversed/{name}"  # {name}: the variant and what differs from this file
  config.data.update({"name": "e2e_reversed", "row_length": 192, "loss_length": 120})
  config.optimizer.update({"warmup_steps": 0, "warmup_share": 0.1})  # 100 examples are 6 steps
  config.decoding.update({"num_inputs": 500, "num_beams": 1, "no_repeat_ngram_size": 0})
  config.decoding.update({"max_new_tokens": 96, "official_references": False})
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run: LoRA and full fine-tuning by the number of examples."""
  read_config(E2EConfig, config)
  for method in ("lora", "full_finetuning"):
    yield from ({"method": method, "data.num_train_records": size} for size in SIZES)
