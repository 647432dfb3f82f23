"""WebNLG 2017 (Hu et al. 2021, Table 14): triples to text, with unseen categories in the test set.

    python -m experiments.webnlg                                               # mini, on CPUs
    python -m experiments.webnlg --config=experiments/configs/webnlg.py:smollm2
    python -m experiments.webnlg --config=experiments/configs/webnlg.py:medium
    python -m experiments.webnlg --config.method=floor                         # without a model
    python -m experiments.webnlg --sweep                                       # the methods below

gpt2_e2e.py explains the fields and the variants. `medium` is the paper's recipe; `mini` and
`smollm2` have E2E's learning rates, which were not tuned on WebNLG. Expect: BLEU 26.6 from the
floor on all 1,862 inputs; not run otherwise.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

METHODS = ("lora", "full_finetuning", "adapter_l", "prefix_layer", "frozen_base", "floor")


def get_config(variant: str = "mini") -> Config:
  """Returns the config of a variant: mini, smollm2, or the paper's small, medium or large."""
  config = gpt2_e2e.get_config(variant)
  config.workdir = "runs/webnlg/{name}"  # {name}: the variant and what differs from this file
  config.data.update({"name": "webnlg", "source": "data/webnlg"})  # a folder with the three files
  config.decoding.update({"length_penalty": 0.8, "official_references": False})
  if variant == "mini":
    config.data.update({"row_length": 256, "loss_length": 112})
    config.decoding.update({"num_inputs": 1862, "max_new_tokens": 80})
  elif variant == "smollm2":
    config.data.update({"row_length": 320, "loss_length": 144, "batch_size": 4})
    config.decoding.update({"num_inputs": 630, "max_new_tokens": 80})
  else:
    config.decoding.num_inputs = 1862
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run: a method's."""
  read_config(E2EConfig, config)
  for method in METHODS:
    yield {"method": method}
