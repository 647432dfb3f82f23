"""SmolLM2 on E2E: adapters trained on the rounded weights that are served, or on the original ones.

    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/smollm2_served.py
    for q in rtn2 rtn3 Q4_0 nf4 Q8_0; do
      python -m experiments.evaluate runs/smollm2/served/method=lora,* --rounded_to=$q
    done
    python -m experiments.report runs/smollm2/served/* runs/smollm2/served/*/evaluations/*

W is the dequantized file, Q(W) the same with linear weights rounded to a format. On 1,500
examples, the sweep trains LoRA on W and on each Q(W), QA-LoRA on formats whose blocks have a
minimum, into which it merges, and last LoftQ on each Q(W), which is LoRA with another start. The
loop evaluates the adapter trained on W on each Q(W).
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.configs.smollm2_rates import Changes, best_rate
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig

FORMATS = ("rtn2", "rtn3", "Q4_0", "nf4", "Q8_0")  # the most useful first
WITH_MINIMUM = ("rtn2", "rtn3")


def get_config() -> Config:
  """Returns the config that the runs change."""
  config = gpt2_e2e.get_config("smollm2")
  config.workdir = "runs/smollm2/served"
  config.seed = 1
  config.data.num_train_records = 1500
  config.decoding.update({"num_inputs": 200, "num_beams": 1})
  return config


def sweep(config: Config) -> Iterator[Changes]:
  """Yields the changed fields of each run."""
  read_config(E2EConfig, config)
  rate: Changes = {"optimizer.learning_rate": best_rate("LoRA, rank 16")}
  yield {"method": config.method, **rate}
  for name in FORMATS:
    yield {"model.rounded_to": name, **rate}
  for name in WITH_MINIMUM:
    yield {"method": "qa_lora", "model.rounded_to": name, **rate}
  yield {"method": "qa_lora", **rate}  # the file's own Q4_1
  for name in FORMATS:
    yield {"method": "loftq", "model.rounded_to": name, **rate}
