"""The part that wikisql.py, samsum.py and mnli_text.py share: sets of the paper's Table 4.

The paper adapts GPT-3, whose weights are not public. `smollm2` adapts SmolLM2-135M-Instruct on
2,000 examples and decodes 200 inputs greedily; its learning rate is that of E2E. `medium` is
Table 12's recipe of LoRA on GPT-2 medium: batches of 128, 2 epochs, weight decay 0.1.
"""

from collections.abc import Iterator

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import read_config
from experiments.nlg.config import E2EConfig


def base_config(variant: str, variants: tuple[str, ...]) -> Config:
  """Returns the config of smollm2 or medium, without its data set."""
  if variant not in variants:
    raise ValueError(f"variant must be one of {', '.join(variants)}, got {variant!r}")
  config = gpt2_e2e.get_config(variant)
  config.decoding.update({"num_inputs": 200, "num_beams": 1, "no_repeat_ngram_size": 0})
  config.decoding.official_references = False
  if variant == "smollm2":
    config.data.num_train_records = 2000
  else:
    config.lora.dropout = 0.0
    config.data.update({"batch_size": 128, "num_epochs": 2})
    config.fit.accumulation_steps = 16
    config.optimizer.update({"weight_decay": 0.1, "label_smoothing": 0.0})
    config.optimizer.update({"warmup_steps": 0, "warmup_share": 0.02})
  return config


def methods(config: Config, names: tuple[str, ...]) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run of a sweep: a method's."""
  read_config(E2EConfig, config)
  for name in names:
    yield {"method": name}
