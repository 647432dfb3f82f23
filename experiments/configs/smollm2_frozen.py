"""SmolLM2 on E2E without training: 0 and 5 solved examples in the prompt, 200 test inputs.

    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/smollm2_frozen.py
    python -m experiments.report runs/smollm2/frozen/*

The base model does not separate punctuation, so its texts are tokenized like the references.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig


def get_config() -> Config:
  """Returns the config that the runs change."""
  config = gpt2_e2e.get_config("smollm2")
  config.workdir = "runs/smollm2/frozen"
  config.method = "frozen_base"
  config.data.update({"row_length": 256, "loss_length": 128, "batch_size": 4})
  config.decoding.update({"num_inputs": 200, "num_beams": 1, "tokenize": True})
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run."""
  read_config(E2EConfig, config)
  for prompt, shots in (("newline", 5), ("newline", 0), ("chat", 5), ("chat", 0)):
    yield {"data.prompt": prompt, "decoding.num_shots": shots}
