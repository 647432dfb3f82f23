"""Bases of several pretraining budgets: does LoRA come closer to full fine-tuning with better ones?

    python -m experiments.gpt2_pretrain --sweep --config.workdir=runs/bases ...
    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/e2e_budgets.py:rates

The first makes the bases (docs/gpt2_pretrain.md). `rates` trains every method on each of them, and
on new weights, with four learning rates, half a decade apart, on 2,000 lines and decodes nothing.
"""

from collections.abc import Iterator

from experiments.configs import e2e_methods
from experiments.configs.gpt2_e2e import QUERY_AND_VALUE
from experiments.workdir import Config

Changes = dict[str, object]

FOLDER = "runs/bases/data.num_train_tokens={},optimizer.warmup_steps={}/base"
BASES: dict[str, Changes] = {
  "new weights": {"model.start": "random", "model.folder": FOLDER.format(20_000_000, 100)},
  "0.2 M tokens": {"model.folder": FOLDER.format(200_000, 1)},
  "2 M tokens": {"model.folder": FOLDER.format(2_000_000, 10)},
  "20 M tokens": {"model.folder": FOLDER.format(20_000_000, 100)},
}
METHODS: dict[str, Changes] = {
  "LoRA": {"lora.rank": 4},
  "LoRA on q and v": {"lora.rank": 4, "lora.target": QUERY_AND_VALUE},
  "full": {"method": "full_finetuning"},
}
RATES = {
  "LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
  "LoRA on q and v": (3e-3, 1e-2, 3e-2, 1e-1),
  "full": (3e-4, 1e-3, 3e-3, 1e-2),
}


def get_config(sweep: str = "rates") -> Config:
  """Returns the config that the runs of `rates` change."""
  if sweep != "rates":
    raise ValueError(f"expected e2e_budgets.py:rates, got {sweep!r}")
  return e2e_methods.get_config(sweep)


def sweep(config: Config) -> Iterator[Changes]:
  """Yields what each run changes."""
  del config
  for base in BASES.values():
    for name, changes in METHODS.items():
      for rate in RATES[name]:
        yield {**base, **changes, "optimizer.learning_rate": rate}
