"""Cross-entropy with the logits of all tokens in memory at once, or of some: memory and time.

    python -m benchmarks.chunked_loss            # 4 x 1024 tokens, a vocabulary of 50,257
    python -m benchmarks.chunked_loss --turns 0  # compiles only: no times
    python -m benchmarks.chunked_loss --tiny     # toy sizes, seconds

The loss is `language_model_loss` of a model that has only a head of GPT-2 small's width; its hidden
states are random. Loss and gradient are computed for the hidden states alone ("frozen": LoRA), and
for the head's weight too ("trained": full fine-tuning).

    chunk       tokens of a row whose logits are in memory at once
    gflop       operations in the matmuls of the compiled gradient, in 10^9
    temp_mb, x  memory that it allocates in addition to its arguments and results; ratio to all
    s, x        seconds, median; median and quartiles of the turns' ratios to all

Before anything is timed, the losses and gradients are compared.
"""

import argparse
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, PyTree

from benchmarks.turns import ratio, take_turns, timed
from experiments.harness.flops import compiled_flops
from experiments.harness.table import aligned
from lora_jax.models.parts.causal_lm import head
from lora_jax.training.loss import language_model_loss, mean

GOALS = {"memory": 0.25, "time": 1.05}
ROWS, LENGTH, WIDTH, VOCABULARY, CHUNKS = 4, 1024, 768, 50257, (128, 64)
TINY = 2, 16, 8, 32, (4, 2)
HEADS = ["head", "chunk", "gflop", "temp_mb", "x", "s", "x (quartiles)"]


class Head(nn.Module):
  """A language model of a head; its hidden states are parameters."""

  shape: tuple[int, int, int]
  vocab_size: int

  def setup(self):
    init = nn.initializers.normal(0.02)
    self.states = self.param("states", nn.initializers.normal(1.0), self.shape)
    self.embedding = self.param("embedding", init, (self.vocab_size, self.shape[-1]))

  def hidden(self, *inputs: Array) -> Array:
    del inputs
    return self.states

  def logits(self, hidden: Array) -> Array:
    return head(hidden, None, self.embedding)


def measure(options: argparse.Namespace, is_trained: bool) -> list[list[str]]:
  """Returns the rows of the table for a frozen or a trained head.

  Raises:
    ValueError: if the losses or gradients of two forms differ.
  """
  rows, length, width, vocabulary, chunks = (
    TINY if options.tiny else (ROWS, LENGTH, WIDTH, VOCABULARY, CHUNKS)
  )
  model = Head((rows, length, width), vocabulary)
  params = jax.jit(lambda key: model.init(key, method="hidden"))(jax.random.key(0))["params"]
  targets = np.random.default_rng(0).integers(0, vocabulary, (rows, length), np.int32)
  fields = ("tokens", "positions", "segment_ids", "target_index")
  batch: dict[str, Any] = {name: np.zeros_like(targets) for name in fields}
  batch |= {"targets": targets, "target_weights": np.ones(targets.shape, np.float32)}
  names = ("states", "embedding") if is_trained else ("states",)
  trained = {name: params[name] for name in names}
  sizes: dict[str, int | None] = {"all": None, **{str(chunk): chunk for chunk in chunks}}
  programs = {
    name: gradient(model, chunk).lower(trained, params, batch).compile()
    for name, chunk in sizes.items()
  }
  runs = {
    name: functools.partial(program, trained, params, batch) for name, program in programs.items()
  }
  times: dict[str, list[float]] = {}
  if options.turns:
    check({name: run() for name, run in runs.items()})
    times = take_turns(
      {name: lambda run=run: timed(run)[0] for name, run in runs.items()}, options.turns
    )
  memory = {
    name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
  }
  table = []
  for name, program in programs.items():
    share, cells = memory[name] / memory["all"], ["", ""]
    goals = [f"mb {GOALS['memory']}: {'met' if share <= GOALS['memory'] else 'MISSED'}"]
    if times:
      speed = ratio(times[name], times["all"])
      cells = [f"{statistics.median(times[name]):.2f}", str(speed)]
      goals.append(f"s {GOALS['time']}: {'met' if speed.median <= GOALS['time'] else 'MISSED'}")
    table.append(
      [
        "trained" if is_trained else "frozen",
        name,
        f"{compiled_flops(program.as_text()) / 1e9:.4g}",
        f"{memory[name] / 1e6:.1f}",
        f"{share:.2f}",
        *cells,
        "" if name == "all" else ", ".join(goals),
      ]
    )
  return table


def gradient(model: nn.Module, chunk: int | None) -> Any:
  """Returns the jitted loss and gradient `(trained, params, batch)`."""
  loss = language_model_loss(model, chunk_size=chunk)

  def loss_of(trained: PyTree, params: PyTree, batch: PyTree) -> Array:
    return mean(loss({**params, **trained}, batch))

  return jax.jit(jax.value_and_grad(loss_of))


def check(results: Mapping[str, PyTree]) -> None:
  """Raises ValueError if a loss or gradient differs from that of all logits at once."""
  expected = jax.tree.leaves(results["all"])
  for name, result in results.items():
    for got, want in zip(jax.tree.leaves(result), expected, strict=True):
      difference = float(jnp.abs(got - want).max() / jnp.abs(want).max())
      if not difference < 1e-4:
        raise ValueError(f"chunks of {name}: a loss or gradient differs by {difference:.1e}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--turns", type=int, default=7, help="0: compile only")
  parser.add_argument("--tiny", action="store_true", help="toy sizes")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {options}")
  with jax.default_matmul_precision("highest"):
    rows = [*measure(options, is_trained=False), *measure(options, is_trained=True)]
  print(aligned([[*HEADS, "goals"], *rows]))


if __name__ == "__main__":
  main()
