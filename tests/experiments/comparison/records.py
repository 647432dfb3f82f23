"""Records of runs that were not made, for tests of the summary and the page."""

import numpy as np

from experiments.comparison.plan import FROZEN

INPUTS = 60
LABELS = {"lora": 0.0, "dora": 0.1, "lora_rank1_v": 0.4, "full_finetuning": -0.3}
PARAMETERS = {"lora": 1000, "dora": 1020, "lora_rank1_v": 30, "full_finetuning": 90_000}


def records(differences=LABELS, seeds=(1, 2, 3), spread=0.0):
  """Returns records on the embedded base model: rates, seeds, draws and costs of each arm.

  Args:
    differences: in loss to the first arm, nats per token.
    seeds: of the reported runs.
    spread: the deviation over the seeds, nats per token.
  """
  generator = np.random.default_rng(0)
  tokens = [20] * INPUTS
  by_input = generator.normal(size=INPUTS)
  frozen = record("rates", FROZEN, 0.0, 0, 4.9) | {"wikipedia_loss": 4.3}
  made = [frozen]
  for arm, difference in differences.items():
    for_rates = ((1e-3, 2.0), (3e-3, 1.8), (1e-2, 1.9))
    made += [record("rates", arm, rate, 0, loss + difference) for rate, loss in for_rates]
    for seed in seeds:
      mean = 1.6 + difference + spread * generator.normal()
      losses = 20 * (mean + by_input / 4) + 0.05 * generator.normal(size=INPUTS)
      of_seed = record("seeds", arm, 3e-3, seed, float(losses.sum() / sum(tokens)))
      measured = {"input_losses": losses.tolist(), "input_tokens": tokens, "wikipedia_loss": 4.5}
      made.append(of_seed | measured)
    for_draws = ((1e-3, 2.0), (2e-3, 1.9), (3e-3, 1.8))
    made += [record("effort", arm, rate, 4, loss + difference) for rate, loss in for_draws]
    costs = {"gflop": 30.0, "step_megabytes": 400.0, "step_seconds": 0.5, "step_ratio": 1.0}
    made.append({"stage": "costs", "arm": arm, "base": "embedded", **costs})
  return made


def record(stage, arm, rate, seed, loss, status="finished"):
  return {
    "stage": stage,
    "arm": arm,
    "base": "embedded",
    "seed": seed,
    "status": status,
    "settings": {"optimizer.learning_rate": rate},
    "valid_loss": loss,
    "parameters": PARAMETERS.get(arm, 0),
    "adapter_bytes": 4 * PARAMETERS.get(arm, 0),
    "train_seconds": 3600.0,
    "device": "1 x cpu",
    "commit": "0123456789ab",
  }
