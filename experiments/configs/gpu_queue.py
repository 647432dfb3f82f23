"""All runs of SmolLM2 on E2E that are worth a GPU: all examples, ranks, variants, five seeds.

    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/gpu_queue.py
    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/gpu_queue.py:tiny

The most useful runs come first, so the queue can be stopped at any time; the same command resumes
it and skips finished runs. Learning rates are those of smollm2_rates.py; `RANKS` keep the scaling
of rank 16. LoRA's variants come last, with the sizes and learning rates of variants.py; those
without a learning rate there are left out, and named. `tiny` takes one step of every run on a few
examples, on a CPU, as a check.
"""

from collections.abc import Iterator

from experiments.comparison.plan import changes_of
from experiments.configs import Config, gpt2_e2e, variants
from experiments.configs.smollm2_rates import ARMS, Changes, best_rate
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

SEEDS = (1, 2, 3, 4, 5)
RANKS = (1, 2, 4, 8, 32, 64)


def get_config(size: str = "full") -> Config:
  """Returns the config that the runs change."""
  if size not in ("full", "tiny"):
    raise ValueError(f"expected gpu_queue.py or gpu_queue.py:tiny, got {size!r}")
  config = gpt2_e2e.get_config("smollm2")
  config.workdir = f"runs/smollm2/gpu_{size}"
  config.seed = SEEDS[0]
  config.keep_freed_memory = False
  config.data.update({"num_train_records": 0, "num_valid_records": 0})
  config.data.update({"batch_size": 32, "loss_length": 80})
  config.decoding.batch_size = 64
  if size == "full":
    # Weights stay float32: bfloat16 would lose the small updates of full fine-tuning.
    config.model.update({"dtype": "bfloat16", "scan_layers": True})
  else:
    config.data.update({"num_train_records": 16, "num_valid_records": 4, "batch_size": 2})
    config.fit.num_train_steps = 1
    config.decoding.update({"num_inputs": 1, "num_beams": 2, "max_new_tokens": 4})
  return config


def sweep(config: Config) -> Iterator[Changes]:
  """Yields the changed fields of each run: methods and ranks by seed, then variants by seed."""
  read_config(E2EConfig, config)
  scaling = config.lora.alpha / config.lora.rank
  rate = best_rate("LoRA, rank 16")
  for seed in SEEDS:
    for arm, changes in ARMS.items():
      yield {**changes, "optimizer.learning_rate": best_rate(arm), "seed": seed}
    for rank in RANKS:
      alpha = {"lora.rank": rank, "lora.alpha": scaling * rank}
      yield {**alpha, "optimizer.learning_rate": rate, "seed": seed}
  yield from variant_runs()


def variant_runs() -> Iterator[Changes]:
  """Yields the changed fields of the runs of LoRA's variants, and names those left out."""
  if unknown := [arm for arm, rate in variants.BEST.items() if rate is None]:
    print(f"left out, as their learning rates are not known yet: {', '.join(unknown)}")
  for seed in SEEDS:
    for arm, best in variants.BEST.items():
      if best is not None:
        settings = {"optimizer.learning_rate": best, "optimizer.warmup_share": 0.1, "seed": seed}
        yield changes_of(arm, "smollm2", settings)
