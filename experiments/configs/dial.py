"""A dial for the distance of a task: Wikipedia with a part of the vocabulary permuted.

    python -m experiments.dial --config.data.percent=10                        # mini, on CPUs
    python -m experiments.dial --config=experiments/configs/dial.py:smollm2
    python -m experiments.dial --config.data.source=FOLDER                     # text files
    python -m experiments.dial --sweep                                         # percentages below

Not a task of the paper. The measure is the validation loss. `embedded` are 39 short articles, which
is enough to see the dial work; a folder of text files, whose articles a line `<|endoftext|>`
separates, gives more to learn. gpt2_e2e.py explains the fields. Expect: not run.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

PERCENT = (0.0, 1.0, 10.0, 30.0, 100.0)
METHODS = ("lora", "full_finetuning", "frozen_base")


def get_config(variant: str = "mini") -> Config:
  """Returns the config of a variant: mini or smollm2."""
  if variant not in ("mini", "smollm2"):
    raise ValueError(f"variant must be one of mini, smollm2, got {variant!r}")
  config = gpt2_e2e.get_config(variant)
  config.workdir = "runs/dial/{name}"  # {name}: the variant and what differs from this file
  config.data.update({"name": "dial", "percent": 0.0, "prompt": "separator"})
  config.data.update({"num_train_records": 0, "num_valid_records": 0, "num_epochs": 5})
  config.data.update({"batch_size": 4, "row_length": 256, "loss_length": 256})
  config.optimizer.update({"warmup_steps": 0, "warmup_share": 0.1})
  config.fit.update({"eval_every_steps": 20})
  config.decoding.update({"num_inputs": 0, "official_references": False})
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run: a method's, at a percentage."""
  read_config(E2EConfig, config)
  for percent in PERCENT:
    yield from ({"method": method, "data.percent": percent} for method in METHODS)
