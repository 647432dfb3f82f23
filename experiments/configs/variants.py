"""LoRA's variants on E2E: the arms, sizes and base configs of `python -m experiments.variants`.

    python -m experiments.gpt2_e2e --config=experiments/configs/variants.py:embedded
    python -m experiments.gpt2_e2e --config=experiments/configs/variants.py:smollm2

These are single LoRA runs; the comparison's have a few fields changed.
docs/variants_comparison.md has the plan, the rules and the results. What may decide a result is
fixed here before the runs: the margin, the seeds, the arms, the learning rates tried, the examples.
"""

import dataclasses
from collections.abc import Mapping

from experiments.configs import Config, gpt2_e2e
from experiments.harness.config import ALL_LINEAR

Changes = dict[str, object]

MARGIN = 0.02  # nats per token: smaller differences do not matter
CONTROL = "lora"
RANK = 4  # of the control, whose number of trained parameters the others match ...
TOLERANCE = 0.05  # ... by this share
SCALING = 2.0  # alpha / rank, which is held: alpha is 2 * rank at every rank
ONE_PROJECTION = r".*/attn/value/kernel"


@dataclasses.dataclass(frozen=True)
class Arm:
  """One row of the comparison.

  Attributes:
    method: of harness/methods.py.
    is_matched: whether its rank is free, so that it can have the control's number of parameters.
      The others keep their own size, and are not ranked.
    changes: other fields of its runs. A rank here is the arm's own.
    name: of its runs; "" is the method.
    label: in tables and plots; "" is the method's.
  """

  method: str
  is_matched: bool = True
  changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
  name: str = ""
  label: str = ""


MATCHED = (
  *("lora", "dora", "pissa", "olora", "milora", "lora_ga", "eva", "corda", "lora_fa", "lora_plus"),
  *("lora_xs", "loha", "lokr", "hira", "miss", "adalora", "relora", "chain_of_lora", "dylora"),
  "rand_lora",
)
# Of E2E's inputs on the embedded base model: the signs and words of the slots, the end of texts.
TOKENS = {
  **{"<|endoftext|>": 0, ":": 26, "|": 92, " family": 1196, " area": 1206, " near": 1322},
  **{" food": 3173, " price": 6790, " rating": 7191},
}
ARMS: dict[str, Arm] = {
  arm.name or arm.method: arm
  for arm in (
    *map(Arm, MATCHED),
    Arm("vera", changes={"lora.rank": 128}, is_matched=False),
    Arm("ia3", is_matched=False),
    Arm("ln_tuning", is_matched=False),
    Arm("trainable_tokens", changes={"lora.tokens": tuple(TOKENS.values())}, is_matched=False),
    Arm("uni_lora", changes={"lora.rank": RANK}, is_matched=False),
    Arm("tiny_lora", changes={"lora.rank": 2}, is_matched=False),
    Arm(
      "lora",
      changes={"lora.rank": 1, "lora.target": ONE_PROJECTION},
      is_matched=False,
      name="lora_rank1_v",
      label="LoRA, rank 1, v only",
    ),
    Arm("full_finetuning", is_matched=False),
  )
}
BEST_KNOWN = (  # on SmolLM2; fixed before any run
  *("lora", "dora", "pissa", "adalora", "lora_ga", "lora_fa", "vera", "loha", "lokr", "ia3"),
)
WITH_BLEU = ("lora", "dora", "pissa", "adalora", "lora_fa")  # with three seeds, on SmolLM2


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a comparison.

  Attributes:
    rate_lines, lines, draw_lines: training examples of a run that chooses a learning rate, of one
      that is reported, and of a random draw.
    rate_points: learning rates of each arm, half a decade apart, before any are added.
    valid_lines: validation examples.
    seeds: of the reported runs.
    draws: random draws of each arm.
    decoded_inputs: test inputs of the runs with BLEU.
    smollm2: whether SmolLM2 is trained too.
  """

  rate_lines: int = 1000
  rate_points: Mapping[str, int] = dataclasses.field(
    default_factory=lambda: {"embedded": 4, "smollm2": 3}
  )
  lines: int = 4000
  draw_lines: int = 1000
  valid_lines: int = 500
  seeds: tuple[int, ...] = (1, 2, 3)
  draws: int = 12
  decoded_inputs: int = 200
  smollm2: bool = True


FULL = Sizes()
TINY = Sizes(  # minutes, to see all parts work; its results say nothing
  rate_lines=48,
  rate_points={"embedded": 3},
  lines=64,
  draw_lines=48,
  valid_lines=24,
  seeds=(1, 2),
  draws=1,
  smollm2=False,
)
RATE_SEED = 0  # not reported
DRAW_SEED = 4  # not reported
MAX_ADDED_RATES = 6

# SmolLM2's best learning rates of the stage smollm2_rates, for configs/gpu_queue.py; None marks
# those not run yet.
BEST: dict[str, float | None] = dict.fromkeys(BEST_KNOWN)


def get_config(base: str = "embedded") -> Config:
  """Returns the config that all runs on a base model change: embedded or smollm2."""
  if base not in ("embedded", "smollm2"):
    raise ValueError(f"expected variants.py:embedded or variants.py:smollm2, got {base!r}")
  config = gpt2_e2e.get_config("mini" if base == "embedded" else "smollm2")
  config.lora.update({"rank": RANK, "alpha": SCALING * RANK, "target": ALL_LINEAR})
  config.data.num_valid_records = FULL.valid_lines
  config.data.loss_length = 88 if base == "embedded" else 72  # as few as these examples need
  config.optimizer.update({"warmup_steps": 0, "warmup_share": 0.1})
  config.fit.update({"eval_every_steps": 1_000_000, "checkpoint_every_steps": 1_000_000})
  config.decoding.update({"num_inputs": 0, "official_references": False})
  return config
