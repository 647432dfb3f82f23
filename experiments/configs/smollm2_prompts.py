"""SmolLM2 on E2E: which prompt format to use, by validation loss (experiments/nlg/prompts.py).

    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/smollm2_prompts.py
    python -m experiments.report runs/smollm2/prompts/*

For each format, the loss of the frozen base model and that of LoRA after 500 examples. All formats
supervise the same text, with two differences: the first token of "separator" includes a space, and
"chat" has one more token after the end token, which is certain, so its loss per token is lower by
about 1/27. Its examples are twice as long, and its batches have twice as many rows: all formats get
the same number of updates.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

ROWS = {"newline": 4, "separator": 4, "chat": 8}  # of a batch


def get_config() -> Config:
  """Returns the config that the runs change; its rows hold the longest chats."""
  config = gpt2_e2e.get_config("smollm2")
  config.workdir = "runs/smollm2/prompts"
  config.data.update({"num_train_records": 500, "num_valid_records": 200})
  config.data.update({"row_length": 256, "loss_length": 128, "batch_size": ROWS["newline"]})
  config.decoding.num_inputs = 0
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run."""
  read_config(E2EConfig, config)
  for method in ("frozen_base", config.method):
    for prompt, rows in ROWS.items():
      yield {"method": method, "data.prompt": prompt, "data.batch_size": rows}
