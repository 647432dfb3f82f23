"""DART 1.1.1 (Hu et al. 2021, Table 13): triples of tables to text.

    python -m experiments.dart                                                 # mini, on CPUs
    python -m experiments.dart --config.data.name=dart_dev                     # without train.json
    python -m experiments.dart --config=experiments/configs/dart.py:smollm2
    python -m experiments.dart --config=experiments/configs/dart.py:medium
    python -m experiments.dart --config.method=floor                           # without a model
    python -m experiments.dart --sweep                                         # the methods below

`dart_dev` trains and validates on parts of the development set; its results are named DART-dev.
gpt2_e2e.py explains the fields and the variants. `medium` is the paper's recipe; `mini` and
`smollm2` have E2E's learning rates, which were not tuned on DART. Expect: not run.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

METHODS = ("lora", "full_finetuning", "frozen_base", "floor")


def get_config(variant: str = "mini") -> Config:
  """Returns the config of a variant: mini, smollm2, or the paper's small, medium or large."""
  config = gpt2_e2e.get_config(variant)
  config.workdir = "runs/dart/{name}"  # {name}: the variant and what differs from this file
  config.data.update({"name": "dart", "source": "data/dart"})  # a folder with the files
  config.lora.dropout = 0.0
  config.optimizer.update({"weight_decay": 0.0, "label_smoothing": 0.0})
  config.decoding.update({"length_penalty": 0.8, "official_references": False})
  if variant in ("mini", "smollm2"):
    config.data.update({"row_length": 256, "loss_length": 120})
    config.decoding.update({"num_inputs": 630, "max_new_tokens": 80})
  else:
    config.decoding.num_inputs = 4159
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run: a method's."""
  read_config(E2EConfig, config)
  for method in METHODS:
    yield {"method": method}
