"""Decodes a batch whose rows all use different adapters, against the same batch with one adapter.

    python -m benchmarks.mixed                     # the embedded model's shape, CPU or GPU
    python -m benchmarks.mixed --model smollm2     # SmolLM2-135M's shape
    python -m benchmarks.mixed --tiny              # toy sizes, seconds

Random weights, adapters and prompts; greedy decoding by `lora_jax.decoding.generate` to the same
number of tokens, without merging. The text of the first row is compared with that of its adapter
alone. The ways take turns, after a first pass that is not timed.

The second table is the gradient of one layer's low-rank term, of rank 16 on a 576 x 576 weight, for
64 rows of 64 tokens that belong to 8 adapters: as `lora_jax.by_row` computes it, and with tokens
sorted by adapter and `jax.lax.ragged_dot`. The base model's matmul is left out.

    rows        of the batch; 8 with rank 16 on all linear layers, 64 with rank 4 on query and value
    adapters    0 is the base model, 1 one adapter for all rows, otherwise one for each row
    resident    adapters in the bank
    s           seconds of the batch, median; prompts included
    tokens/s    generated
    x           speed over one adapter; median and quartiles of the turns; the goal is 0.9
    gflop       operations of the compiled step
    temp_mb     memory that it allocates in addition to arguments and results
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import lora_jax as lj
from benchmarks.arguments import count
from benchmarks.concurrent import make_model
from benchmarks.turns import ratio, take_turns, timed
from experiments.harness.config import ALL_LINEAR
from experiments.harness.table import aligned
from experiments.nlg.base import random_params
from lora_jax.arithmetic import Bank
from lora_jax.decoding import (
  CachedModel,
  SamplingConfig,
  adapted,
  adapted_by_row,
  from_linen,
  generate,
)
from lora_jax.models.parts.causal_lm import init_cache
from lora_jax.training.mesh import make_mesh

HEADS = ["rows", "adapters", "resident", "s", "tokens/s", "x (quartiles)"]


LAYER_HEADS = ["term", "gflop", "temp_mb", "ms", "x (quartiles)"]


class Case(NamedTuple):
  """Adapters of one batch.

  Attributes:
    rows: of the batch, each with its own adapter.
    resident: adapters in the bank.
    config: of the adapters.
  """

  rows: int
  resident: int
  config: lj.LoraConfig


CASES = (
  Case(8, 8, lj.LoraConfig(rank=16, alpha=16.0, target=ALL_LINEAR)),
  Case(64, 1000, lj.LoraConfig(rank=4, alpha=4.0, target=r".*/(query|value)/kernel")),
)
TINY_CASES = (Case(3, 4, lj.LoraConfig(rank=2, alpha=2.0, target=ALL_LINEAR)),)


def random_bank(model: CachedModel, params: PyTree, config: lj.LoraConfig, slots: int) -> Bank:
  """Returns a bank of adapters with random factors."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  call = tokens, tokens, model.make_cache(1, 1), 0, jnp.ones((1, 1, 1), bool)
  init = lj.lora(model.extend, config).init
  shapes = jax.eval_shape(init, jax.random.key(0), params, *call)
  draw = np.random.default_rng(0)

  def drawn(leaf: Any) -> jax.Array:
    return jnp.asarray(0.02 * draw.standard_normal((slots, *leaf.shape), np.float32))

  return Bank(config, jax.tree.map(drawn, shapes))


def measure(options: argparse.Namespace, case: Case) -> list[list[str]]:
  """Returns the rows of the table for one case.

  Raises:
    ValueError: if the first row's text is not that of its adapter alone.
  """
  module = make_model(options.model, "float32", options.tiny)
  shape = module.config
  params = random_params(module, make_mesh(), jax.random.key(0))
  model = from_linen(module, functools.partial(init_cache, shape), shape.num_positions)
  bank = random_bank(model, params, case.config, case.resident)
  method = functools.partial(lj.lora, config=bank.config)
  draw = np.random.default_rng(1)
  prompts = draw.integers(0, shape.vocab_size, (case.rows, options.prompt)).tolist()
  settings = SamplingConfig((), temperature=0.0, max_new_tokens=options.new_tokens)
  slots = [row * (case.resident // case.rows) for row in range(case.rows)]

  def search(
    model: CachedModel, params: PyTree, bank_slots: Sequence[int] | None = None
  ) -> Callable[[], list[list[int]]]:
    options: dict[str, Any] = {"batch_size": case.rows, "bank_slots": bank_slots}
    return lambda: generate(model, params, prompts, settings, **options)

  _, adapter = bank.adapter(slots[0])
  ways = {
    "0": search(model, params),
    "1": search(adapted(model, method), {"base": params, "adapter": adapter}),
    str(case.rows): search(
      adapted_by_row(model, method), {"base": params, "bank": bank}, bank_slots=slots
    ),
  }
  texts = {name: way() for name, way in ways.items()}
  check(texts[str(case.rows)][0], texts["1"][0])
  times = take_turns(
    {name: functools.partial(_seconds, way) for name, way in ways.items()}, options.turns
  )
  table = []
  for name in ways:
    seconds = statistics.median(times[name])
    resident = str(case.resident) if name == str(case.rows) else name
    tokens = f"{case.rows * options.new_tokens / seconds:,.0f}"
    speed = str(ratio(times["1"], times[name]))
    table.append([str(case.rows), name, resident, f"{seconds:.3f}", tokens, speed])
  return table


class Layer(NamedTuple):
  """The shapes of one layer's low-rank term."""

  rows: int = 64
  length: int = 64
  width: int = 576
  rank: int = 16
  adapters: int = 8


def layer_terms(layer: Layer) -> tuple[dict[str, Callable[..., jax.Array]], tuple[jax.Array, ...]]:
  """Returns the terms by name, functions of A, B and x, and these arrays, sorted by adapter."""
  rows, length, width, rank, adapters = layer
  draw = np.random.default_rng(0)
  slots = jnp.asarray(np.sort(draw.integers(0, adapters, rows)))
  sizes = jnp.bincount(slots, length=adapters) * length
  shapes = (adapters, width, rank), (adapters, rank, width), (rows, length, width)
  a, b, x = (jnp.asarray(draw.standard_normal(shape, np.float32)) for shape in shapes)

  def of_one(a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    return (x @ a[0]) @ b[0]

  def by_row(a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    return (x @ a[slots]) @ b[slots]

  def ragged(a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    flat = jax.lax.ragged_dot(x.reshape(-1, width), a, sizes)
    return jax.lax.ragged_dot(flat, b, sizes).reshape(x.shape)

  return {"one adapter": of_one, "by_row": by_row, "ragged_dot": ragged}, (a, b, x)


def measure_layer(layer: Layer, turns: int) -> list[list[str]]:
  """Returns the rows of the second table.

  Raises:
    ValueError: if the gradients by `ragged_dot` differ from those by row.
  """
  terms, arrays = layer_terms(layer)
  steps, gradients, costs = {}, {}, {}
  for name, term in terms.items():
    gradient = jax.grad(lambda a, b, x, term=term: (term(a, b, x) ** 2).sum(), (0, 1, 2))
    program: Any = jax.jit(gradient).lower(*arrays).compile()
    steps[name] = functools.partial(_seconds, functools.partial(program, *arrays))
    gradients[name] = program(*arrays)
    temp = program.memory_analysis().temp_size_in_bytes
    costs[name] = [f"{program.cost_analysis()['flops'] / 1e9:.2f}", f"{temp / 1e6:.0f}"]
  for x, y in zip(gradients["ragged_dot"], gradients["by_row"], strict=True):
    error = float(jnp.abs(x - y).max() / jnp.abs(y).max())
    if not error < 1e-4:
      raise ValueError(f"gradients by ragged_dot differ from those by row, relative: {error:.1e}")
  times = take_turns(steps, turns)
  table = []
  for name in terms:
    milliseconds = f"{1e3 * statistics.median(times[name]):.1f}"
    speed = str(ratio(times["one adapter"], times[name]))
    table.append([name, *costs[name], milliseconds, speed])
  return table


def _seconds(way: Callable[[], Any]) -> float:
  return timed(way)[0]


def check(mixed: Sequence[int], alone: Sequence[int]) -> None:
  """Raises ValueError if a row's tokens are not those of its adapter alone."""
  if mixed != alone:
    raise ValueError(f"the first row has the tokens {mixed}, and its adapter alone {alone}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", choices=("embedded", "smollm2"), default="embedded")
  parser.add_argument("--prompt", type=count, default=32, help="tokens of a prompt")
  parser.add_argument("--new_tokens", type=count, default=32)
  parser.add_argument("--turns", type=count, default=7)
  parser.add_argument("--tiny", action="store_true", help="a toy model")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {options}", flush=True)
  table = [HEADS]
  for case in TINY_CASES if options.tiny else CASES:
    table += measure(options, case)
  print(aligned(table), flush=True)
  layer = Layer(3, 2, 8, 2, 2) if options.tiny else Layer()
  print("\n" + aligned([LAYER_HEADS, *measure_layer(layer, options.turns)]))


if __name__ == "__main__":
  main()
