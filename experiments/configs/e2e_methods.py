"""Methods on the embedded base and E2E: which learning rate for each, then all with three seeds.

    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/e2e_methods.py:rates
    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/e2e_methods.py:seeds

`rates` trains every method with four learning rates, half a decade apart, on 2,000 lines and
decodes nothing; the best by validation loss stands in `BEST`. `seeds` is the table: 4,000 lines,
one epoch, the 630 test inputs.
"""

from collections.abc import Iterator

from experiments.configs import gpt2_e2e
from experiments.configs.gpt2_e2e import QUERY_AND_VALUE
from experiments.workdir import Config

Changes = dict[str, object]

METHODS: dict[str, Changes] = {
  "LoRA": {},
  "LoRA, rank 4 on q and v": {"lora.rank": 4, "lora.target": QUERY_AND_VALUE},
  "full": {"method": "full_finetuning"},
  "random base, LoRA": {"model.start": "random"},
  "random base, full": {"model.start": "random", "method": "full_finetuning"},
}
RATES = {
  "LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
  "LoRA, rank 4 on q and v": (3e-3, 1e-2, 3e-2, 1e-1),
  "full": (3e-4, 1e-3, 3e-3, 1e-2),
  "random base, LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
  "random base, full": (3e-4, 1e-3, 3e-3, 1e-2),
}
BEST = {
  "LoRA": 1e-2,
  "LoRA, rank 4 on q and v": 1e-2,
  "full": 3e-3,
  "random base, LoRA": 3e-3,
  "random base, full": 1e-3,
}
SEEDS = (1, 2, 3)


def get_config(sweep: str = "seeds") -> Config:
  """Returns the config that the runs of `rates` or `seeds` change."""
  if sweep not in ("rates", "seeds"):
    raise ValueError(f"expected e2e_methods.py:rates or :seeds, got {sweep!r}")
  config = gpt2_e2e.get_config("mini")
  config.seed = SEEDS[0]
  config.fit.eval_every_steps = 1_000_000  # at the end alone
  if sweep == "rates":
    config.data.num_train_records = 2000
    config.decoding.num_inputs = 0
  return config


def sweep(config: Config) -> Iterator[Changes]:
  """Yields what each run changes."""
  if not config.decoding.num_inputs:
    for name, changes in METHODS.items():
      for rate in RATES[name]:
        yield {**changes, "optimizer.learning_rate": rate}
    return
  for seed in SEEDS:
    for name, changes in METHODS.items():
      yield {**changes, "optimizer.learning_rate": BEST[name], "seed": seed}
  yield {"method": "frozen_base"}
