"""SmolLM2 on E2E: the learning rate of each method, by validation loss on 1,000 examples.

    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/smollm2_rates.py
    python -m experiments.report runs/smollm2/rates/*

Four learning rates for every method, half a decade apart, one epoch, with a seed that no table
reports. If the best rate is the smallest or largest, move the method's rates by half a decade.
`BEST` has the rates for smollm2_finals.py, smollm2_served.py and gpu_queue.py; None marks those
not run yet.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.configs.gpt2_e2e import QUERY_AND_VALUE
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

Changes = dict[str, object]

ARMS: dict[str, Changes] = {  # the most useful first
  "LoRA, rank 16": {"lora.rank": 16},
  "full": {"method": "full_finetuning"},
  "LoRA, rank 4, q,v": {"lora.rank": 4, "lora.target": QUERY_AND_VALUE},
  "LoRA, rank 4": {"lora.rank": 4},
  "DoRA, rank 16": {"method": "dora", "lora.rank": 16},
}
RATES: dict[str, tuple[float, ...]] = dict.fromkeys(ARMS, (3e-4, 1e-3, 3e-3, 1e-2))
RATES["full"] = (1e-4, 3e-4, 1e-3, 3e-3)
RATES["LoRA, rank 4, q,v"] = (1e-3, 3e-3, 1e-2, 3e-2)
BEST: dict[str, float | None] = {
  "LoRA, rank 16": 3e-3,
  "full": 3e-4,
  "LoRA, rank 4, q,v": 1e-2,
  "LoRA, rank 4": 3e-3,
  "DoRA, rank 16": 3e-3,
}
SEED = 0


def get_config() -> Config:
  """Returns the config that the runs change."""
  config = gpt2_e2e.get_config("smollm2")
  config.workdir = "runs/smollm2/rates"
  config.seed = SEED
  config.data.num_train_records = 1000
  config.decoding.num_inputs = 0
  return config


def sweep(config: Config) -> Iterator[Changes]:
  """Yields the changed fields of each run."""
  read_config(E2EConfig, config)
  for arm, changes in ARMS.items():
    for rate in RATES[arm]:
      yield {**changes, "optimizer.learning_rate": rate}


def best_rate(arm: str) -> float:
  """Returns the best rate of an arm; raises ValueError if it is not known yet."""
  rate = BEST[arm]
  if rate is None:
    raise ValueError(
      f"the learning rate of {arm} is not known yet: run the sweep of smollm2_rates.py, and write "
      "the best one into BEST there"
    )
  return rate
