"""What a LoRA step consists of on a CPU, and what changes of it gain.

    python -m benchmarks.step_parts                           # the embedded base model
    python -m benchmarks.step_parts --model small --turns 5   # GPT-2 small's shape, random weights
    python -m benchmarks.step_parts --changes                 # the step as it is only

The step is that of `lora_jax packed` in `benchmarks.e2e_epoch`: packed rows of E2E's examples, LoRA
of rank 16 on all linear layers, AdamW, logits only for supervised tokens.

The first table has the operations of one step, as JAX's profiler records them:

    calls      operations of the compiled program that ran
    gflop      in their matmuls, 10^9
    ms, share  their time, and its part of all operations' time
    gflop/s    of their matmuls

Large are the matmuls with weights (at least three quarters of the operations of an attention
projection), small those of LoRA and attention. The line below the table compares the operations'
time with that of a step.

The second table has the same step with one change each, in turns; `x` is the median of the turns'
ratios to the step as it is, with quartiles. The losses of the first step must agree.

    all logits  of every token, also where the loss needs none
    recomputed  for the backward pass only the layers' inputs are kept
    vector 512  XLA may use vectors of 512 bits (`xla_cpu_prefer_vector_width`)
    fast math   XLA may change operations' results (`xla_cpu_enable_fast_math`)
    bfloat16    computed in bfloat16, on the same float32 weights
"""

import argparse
import dataclasses
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lora_jax as lj
from benchmarks import e2e_epoch
from benchmarks.arguments import count
from benchmarks.turns import ratio, take_turns, timed
from experiments.harness.flops import instruction_flops
from experiments.harness.table import aligned
from lora_jax.data import batches
from lora_jax.models.gpt2.model import GPT2
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.step import make_train_step, start

KINDS = ("large matmuls", "small matmuls", "others")
CALLERS = re.compile(r"(while|call|conditional)[.\d]*$")  # they last as long as what they call
ALL_LOGITS = "all logits"
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # XLA's options, the model's fields
  ALL_LOGITS: ({}, {}),
  "recomputed": ({}, {"remat": "nothing_saveable"}),
  "vector 512": ({"xla_cpu_prefer_vector_width": "512"}, {}),
  "fast math": ({"xla_cpu_enable_fast_math": True}, {}),
  "bfloat16": ({}, {"dtype": "bfloat16"}),
}
AGREEMENT = {"bfloat16": 1e-2}  # of the first losses, relative; 1e-4 for the others


class Step:
  """A compiled step; each call makes an update."""

  def __init__(
    self, base: e2e_epoch.Base, batch: batches.Batch, options: Mapping[str, Any], **fields: Any
  ):
    """Compiles a step.

    Args:
      options: of XLA.
      fields: of the model's config, that replace those of `base`.
    """
    loss = lj.lora(
      language_model_loss(GPT2(dataclasses.replace(base.config, **fields))),
      lj.LoraConfig(rank=e2e_epoch.RANK, alpha=e2e_epoch.ALPHA, target=e2e_epoch.TARGET),
    )
    key, mesh = jax.random.key(0), make_mesh()
    trainable = jax.jit(loss.init)(key, base.params, batch)
    optimizer = optax.adamw(e2e_epoch.LEARNING_RATE)
    self.state, self.frozen, optimizer = start(base.params, trainable, optimizer, key, mesh)
    self.batch = place_batch(mesh, batch)  # pyright: ignore[reportArgumentType]
    step = make_train_step(loss, optimizer, self.state)
    lowered = step.lower(self.state, self.frozen, self.batch)  # pyright: ignore
    self.program = lowered.compile(compiler_options=dict(options))

  def __call__(self) -> jax.Array:
    self.state, metrics = self.program(self.state, self.frozen, self.batch)
    return metrics.loss


# ---- what a step consists of -----------------------------------------------------------


def recorded(step: Step) -> list[tuple[str, float]]:
  """Returns the operations of one step, as the profiler records them: name, milliseconds."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready((step(), step.state))
    (file,) = Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
  return [
    (event.name, event.duration_ns / 1e6)
    for plane in profile.planes
    for line in plane.lines
    for event in line.events
    if any(name == "hlo_op" for name, _ in event.stats) and not CALLERS.match(event.name)
  ]


def parts(
  events: Sequence[tuple[str, float]], flops: Mapping[str, float], large: float
) -> list[list[str]]:
  """Returns the rows of the first table.

  Args:
    events: name and milliseconds of each operation.
    flops: operations in the matmuls of an operation, by its name.
    large: from how many on a matmul is large.
  """
  total = sum(ms for _, ms in events)
  by_kind: dict[str, list[tuple[str, float]]] = {kind: [] for kind in KINDS}
  for name, ms in events:
    work = flops.get(name, 0.0)
    by_kind[KINDS[0 if work >= large else 1 if work else 2]].append((name, ms))
  rows = []
  for kind, chosen in by_kind.items():
    ms = sum(ms for _, ms in chosen)
    work = sum(flops.get(name, 0.0) for name, _ in chosen)
    rate = f"{work / ms / 1e6:.0f}" if work else ""
    gflop = f"{work / 1e9:.1f}" if work else ""
    rows.append([kind, str(len(chosen)), gflop, f"{ms:.1f}", f"{ms / total:.0%}", rate])
  return rows


# ---- what changes gain -----------------------------------------------------------------


def with_all_logits(batch: batches.Batch) -> batches.Batch:
  """Returns a batch with the same loss whose logits are those of all tokens."""
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


def changed_steps(
  base: e2e_epoch.Base, batch: batches.Batch, names: Sequence[str]
) -> dict[str, Step]:
  """Returns the step as it is, and with one change each."""
  steps = {"as it is": Step(base, batch, {})}
  for name in names:
    options, fields = CHANGES[name]
    changed = with_all_logits(batch) if name == ALL_LOGITS else batch
    steps[name] = Step(base, changed, options, **fields)
  return steps


def check(losses: Mapping[str, float]) -> None:
  """Raises ValueError if the first loss of a changed step differs from the unchanged one's."""
  for name, loss in losses.items():
    difference = abs(loss / losses["as it is"] - 1.0)
    if not difference <= AGREEMENT.get(name, 1e-4):
      raise ValueError(f"{name}: the first loss differs by {difference:.1e}, relative")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", choices=("embedded", "small"), default="embedded")
  parser.add_argument("--lines", type=count, default=320, help="training examples")
  parser.add_argument("--rows", type=count, default=5, help="packed rows in a step")
  parser.add_argument("--row_length", type=count, default=256, help="tokens in a packed row")
  parser.add_argument("--turns", type=count, default=15)
  parser.add_argument("--changes", nargs="*", choices=tuple(CHANGES), default=tuple(CHANGES))
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  options.dtype = "float32"
  print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {vars(options)}")
  with jax.default_matmul_precision("highest"):
    base = e2e_epoch.load_base(options)
    examples = e2e_epoch.load_examples(options, base)
    batch = e2e_epoch.make_data(options, examples, base.config.num_positions)["packed"](examples)[0]
    steps = changed_steps(base, batch, options.changes)
    check({name: float(step()) for name, step in steps.items()})
  step = steps["as it is"]
  times = take_turns(
    {
      name: lambda step=step: timed(lambda: (step(), step.state))[0] for name, step in steps.items()
    },
    options.turns,
  )
  events = recorded(step)
  large = 1.5 * batch["tokens"].size * base.config.embed_dim**2
  rows = parts(events, instruction_flops(step.program.as_text()), large)
  print(f"\n{aligned([['part', 'calls', 'gflop', 'ms', 'share', 'gflop/s'], *rows])}")
  whole = 1e3 * statistics.median(times["as it is"])
  print(f"\nall operations {sum(ms for _, ms in events):.1f} ms, a step {whole:.1f} ms\n")
  table = [
    [name, f"{1e3 * statistics.median(seconds):.1f}", str(ratio(seconds, times["as it is"]))]
    for name, seconds in times.items()
  ]
  print(aligned([["step", "ms", "x (quartiles)"], *table]))


if __name__ == "__main__":
  keep_freed_memory()
  main()
