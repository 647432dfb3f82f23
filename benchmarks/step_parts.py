"""The parts of a LoRA step on a CPU, and the effect of single changes.

    python -m benchmarks.step_parts                           # the embedded base model
    python -m benchmarks.step_parts --model small --turns 5   # GPT-2 small's shape, random weights
    python -m benchmarks.step_parts --model smollm2 --turns 5 # after make smollm2
    python -m benchmarks.step_parts --changes none            # the first table only

The step is that of `lora_jax packed` in `benchmarks.e2e_epoch`: packed rows of E2E's examples, LoRA
of rank 16 on all linear layers, AdamW, logits only for supervised tokens. glibc keeps freed memory.

The first table has the operations of one step, as JAX's profiler records them:

    calls      operations of the compiled program that ran
    gflop      operations in their matmuls, 10^9
    ms, share  their time, and its part of all operations' time
    gflop/s    of their matmuls

Large are the matmuls with weights (at least three quarters of the operations of a square weight's),
small those of LoRA and attention; a weight of fewer features may count as small. Operations can run
two at a time: the line below the table compares the sum of their times with a step's.

The second table has the same step with one change each, in turns; `x` is the median of the turns'
ratios to the unchanged step, with quartiles. The losses of the first step must agree.

    all logits  computed at every token, also where the loss needs none
    recomputed  the backward pass recomputes the layers; only their inputs are kept
    vector 512  XLA may use vectors of 512 bits (`xla_cpu_prefer_vector_width`)
    fast math   XLA may change operations' results (`xla_cpu_enable_fast_math`)
    bfloat16    computed in bfloat16, on the same float32 weights
"""

import argparse
import dataclasses
import random
import re
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from benchmarks import e2e_epoch, smollm2
from benchmarks.arguments import count
from benchmarks.turns import ratio, take_turns, timed
from experiments.harness.flops import instruction_flops
from experiments.harness.table import aligned
from lora_jax.data import batches, text
from lora_jax.data.sets import e2e
from lora_jax.models.checkpoints.pretrained import find_pretrained
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer
from lora_jax.models.zoo import load_causal_lm
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.mesh import make_mesh, place_batch

LARGE, SMALL, OTHERS = "large matmuls", "small matmuls", "others"
UNCHANGED, ALL_LOGITS = "unchanged", "all logits"
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # XLA's options, the model's fields
  ALL_LOGITS: ({}, {}),
  "recomputed": ({}, {"remat": "nothing_saveable"}),
  "vector 512": ({"xla_cpu_prefer_vector_width": "512"}, {}),
  "fast math": ({"xla_cpu_enable_fast_math": True}, {}),
  "bfloat16": ({}, {"dtype": "bfloat16"}),
}
AGREEMENT = {"bfloat16": 1e-2}  # of the first losses, relative; 1e-4 for the others
CALLERS = re.compile(r"(while|call|conditional)[.\d]*$")  # they last as long as what they call


class Setting(NamedTuple):
  """What is trained.

  Attributes:
    model: a language model of the zoo.
    params: of the model, float32.
    target: pattern of the adapted weights.
    batch: of every step.
  """

  model: nn.Module
  params: PyTree
  target: str
  batch: batches.Batch

  def change(self, name: str) -> "Setting":
    """Returns the setting with a change, apart from options of XLA."""
    if name == UNCHANGED:
      return self
    config = dataclasses.replace(self.model.config, **CHANGES[name][1])  # pyright: ignore
    model = type(self.model)(config)  # pyright: ignore[reportCallIssue]
    batch = with_all_logits(self.batch) if name == ALL_LOGITS else self.batch
    return self._replace(model=model, batch=batch)


class Step:
  """A compiled step; each call makes an update."""

  def __init__(self, setting: Setting, xla_options: Mapping[str, Any]):
    step, self.state, self.frozen, _ = e2e_epoch.prepare(
      setting.model, setting.params, setting.batch, setting.target
    )
    self.batch = place_batch(make_mesh(), setting.batch)  # pyright: ignore[reportArgumentType]
    lowered = step.lower(self.state, self.frozen, self.batch)
    self.program = lowered.compile(compiler_options=dict(xla_options))

  def __call__(self) -> jax.Array:
    self.state, metrics = self.program(self.state, self.frozen, self.batch)
    return metrics.loss


# ---- the parts of a step ---------------------------------------------------------------


def recorded(step: Step) -> list[tuple[str, float]]:
  """Returns the operations of one step, as the profiler records them: name, milliseconds."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready((step(), step.state))
    (file,) = Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of JAX's binding; an error aborts it
    return [
      (event.name, event.duration_ns / 1e6)
      for plane in profile.planes
      for line in plane.lines
      for event in line.events
      if any(name == "hlo_op" for name, _ in event.stats) and not CALLERS.match(event.name)
    ]


def parts(
  events: Sequence[tuple[str, float]], flops: Mapping[str, float], least_large: float
) -> list[list[str]]:
  """Returns the rows of the first table.

  Args:
    events: name and milliseconds of each operation that ran.
    flops: floating-point operations in the matmuls of each, by name.
    least_large: the fewest of a large matmul.
  """
  total = sum(ms for _, ms in events)
  by_kind: dict[str, list[tuple[str, float]]] = {LARGE: [], SMALL: [], OTHERS: []}
  for name, ms in events:
    size = flops.get(name, 0.0)
    kind = OTHERS if not size else LARGE if size >= least_large else SMALL
    by_kind[kind].append((name, ms))
  rows = []
  for kind, chosen in by_kind.items():
    ms = sum(ms for _, ms in chosen)
    gflop = sum(flops.get(name, 0.0) for name, _ in chosen) / 1e9
    matmuls = [f"{gflop:.1f}", f"{gflop / ms * 1e3:.0f}"] if gflop else ["", ""]
    rows.append([kind, str(len(chosen)), matmuls[0], f"{ms:.1f}", f"{ms / total:.0%}", matmuls[1]])
  return rows


# ---- single changes --------------------------------------------------------------------


def with_all_logits(batch: batches.Batch) -> batches.Batch:
  """Returns the batch with logits computed at every token, and the same loss."""
  rows, length = batch["tokens"].shape
  index = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  targets = np.zeros((rows, length), np.int32)
  weights = np.zeros((rows, length), np.float32)
  row, column = np.nonzero(batch["target_weights"])
  place = batch["target_index"][row, column]
  targets[row, place] = batch["targets"][row, column]
  weights[row, place] = batch["target_weights"][row, column]
  return batches.Batch(
    tokens=batch["tokens"],
    positions=batch["positions"],
    segment_ids=batch["segment_ids"],
    target_index=index,
    targets=targets,
    target_weights=weights,
  )


def check(losses: Mapping[str, float]) -> None:
  """Raises ValueError if the first loss of a changed step differs from the unchanged one's."""
  for name, loss in losses.items():
    difference = abs(loss / losses[UNCHANGED] - 1.0)
    if not difference <= AGREEMENT.get(name, 1e-4):
      raise ValueError(f"{name}: the first loss differs by {difference:.1e}, relative")


# ---- the benchmark ---------------------------------------------------------------------


def load(options: argparse.Namespace) -> Setting:
  if options.model == "smollm2":
    path = find_pretrained("smollm2")
    tokenizer = load_tokenizer(path)
    records = random.Random(0).sample(e2e.read("train"), options.lines)
    examples = text.encode(
      tokenizer, records, end_of_text_id(tokenizer), options.row_length, truncate=True
    )
    loaded = load_causal_lm(path)
    model, params, target = loaded.module, loaded.params, smollm2.TARGET
  else:
    chosen = argparse.Namespace(**vars(options), dtype="float32")
    base = e2e_epoch.load_base(chosen)
    examples = e2e_epoch.load_examples(chosen, base)
    model, params, target = GPT2(base.config), base.params, e2e_epoch.TARGET
  data = batches.packed_batches(
    examples,
    batch_size=options.rows,
    row_length=options.row_length,
    loss_length=batches.suggest_loss_length(examples, options.row_length),
    seed=0,
  )
  return Setting(model, params, target, data[0])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", choices=("embedded", "small", "smollm2"), default="embedded")
  parser.add_argument("--lines", type=count, default=320, help="training examples")
  parser.add_argument("--rows", type=count, default=5, help="packed rows in a step")
  parser.add_argument("--row_length", type=count, default=256, help="tokens in a packed row")
  parser.add_argument("--turns", type=count, default=15)
  parser.add_argument(
    "--changes", choices=("all", "none"), default="all", help="none: the unchanged step only"
  )
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {vars(options)}")
  names = [UNCHANGED, *(CHANGES if options.changes == "all" else ())]
  with jax.default_matmul_precision("highest"):
    setting = load(options)
    steps = {
      name: Step(setting.change(name), CHANGES[name][0] if name in CHANGES else {})
      for name in names
    }
    check({name: float(step()) for name, step in steps.items()})
  unchanged = steps[UNCHANGED]
  times = take_turns(
    {
      name: lambda step=step: timed(lambda: (step(), step.state))[0] for name, step in steps.items()
    },
    options.turns,
  )
  events = recorded(unchanged)
  config: Any = setting.model.config  # pyright: ignore[reportAttributeAccessIssue]
  square = 2.0 * setting.batch["tokens"].size * config.embed_dim**2
  rows = parts(events, instruction_flops(unchanged.program.as_text()), 0.75 * square)
  print(f"\n{aligned([['part', 'calls', 'gflop', 'ms', 'share', 'gflop/s'], *rows])}")
  whole = 1e3 * statistics.median(times[UNCHANGED])
  print(f"\nall operations {sum(ms for _, ms in events):.1f} ms, a step {whole:.1f} ms\n")
  table = [
    [name, f"{1e3 * statistics.median(seconds):.1f}", str(ratio(seconds, times[UNCHANGED]))]
    for name, seconds in times.items()
  ]
  print(aligned([["step", "ms", "x (quartiles)"], *table]))


if __name__ == "__main__":
  keep_freed_memory()
  main()
