"""Compares LoRA with full fine-tuning on base models of several pretraining budgets.

    python -m experiments.gpt2_pretrain --sweep --config.workdir=runs/bases ...
    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/e2e_budgets.py:rates
    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/e2e_budgets.py:seeds

The first command pretrains the base models (docs/gpt2_pretrain.md). `rates` trains every method on
each of them, and on random weights, with four learning rates, half a decade apart, on 2,000
examples, and decodes nothing; `BEST` has the best by validation loss. `seeds` is the table of
docs/gpt2_e2e.md: 4,000 examples, one epoch, the 630 test inputs.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.configs.gpt2_e2e import QUERY_AND_VALUE
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

Changes = dict[str, object]

FOLDER = "runs/bases/data.num_train_tokens={},optimizer.warmup_steps={}/base"
BASES: dict[str, Changes] = {
  "new weights": {"model.start": "random", "model.folder": FOLDER.format(20_000_000, 100)},
  "0.2 M tokens": {"model.folder": FOLDER.format(200_000, 1)},
  "2 M tokens": {"model.folder": FOLDER.format(2_000_000, 10)},
  "20 M tokens": {"model.folder": FOLDER.format(20_000_000, 100)},
}
ARMS: dict[str, Changes] = {
  "LoRA": {"lora.rank": 4},
  "full": {"method": "full_finetuning"},
  "LoRA on q and v": {"lora.rank": 4, "lora.target": QUERY_AND_VALUE},
}
RATES = {
  "LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
  "full": (3e-4, 1e-3, 3e-3, 1e-2),
  "LoRA on q and v": (3e-3, 1e-2, 3e-2, 1e-1),
}
BEST = {
  "LoRA": {"new weights": 1e-3, "0.2 M tokens": 3e-3, "2 M tokens": 3e-3, "20 M tokens": 1e-2},
  "full": {"new weights": 1e-3, "0.2 M tokens": 1e-3, "2 M tokens": 3e-3, "20 M tokens": 3e-3},
  "LoRA on q and v": dict.fromkeys(BASES, 1e-2),
}
SEEDS = (1, 2, 3)


def get_config(sweep: str = "seeds") -> Config:
  """Returns the config that the runs of `rates` or `seeds` change."""
  if sweep not in ("rates", "seeds"):
    raise ValueError(f"expected e2e_budgets.py:rates or :seeds, got {sweep!r}")
  config = gpt2_e2e.get_config("mini")
  config.seed = SEEDS[0]
  config.fit.eval_every_steps = 1_000_000  # only at the end
  if sweep == "rates":
    config.data.num_train_records = 2000
    config.decoding.num_inputs = 0
  return config


def sweep(config: Config) -> Iterator[Changes]:
  """Yields the changed fields of each run."""
  read_config(E2EConfig, config)
  if not config.decoding.num_inputs:
    for arm, changes in ARMS.items():
      for base in BASES.values():
        for rate in RATES[arm]:
          yield {**base, **changes, "optimizer.learning_rate": rate}
    return
  for base in BASES.values():
    yield {**base, "method": "frozen_base"}
  for arm, changes in ARMS.items():
    for seed in SEEDS:
      for name, base in BASES.items():
        rate = BEST[arm][name]
        yield {**base, **changes, "optimizer.learning_rate": rate, "seed": seed}
