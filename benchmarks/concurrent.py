"""Times a train step of K runs in one program against K ordinary steps, one after another.

    python -m benchmarks.concurrent                       # the embedded model's shape, CPU or GPU
    python -m benchmarks.concurrent --model smollm2       # SmolLM2-135M's shape
    python -m benchmarks.concurrent --model medium --dtype bfloat16 --length 64 512    # a GPU
    python -m benchmarks.concurrent --turns 0             # compiles only: no times
    python -m benchmarks.concurrent --tiny                # toy sizes, seconds

Random weights and tokens, a loss at every token, AdamW, LoRA of rank 16 on all linear layers. Each
run has its own adapter, batch, learning rate and scaling. The first loss of the first run is
compared with that of its ordinary step. The ways take turns, after a first step that is not timed.
On CPUs glibc keeps freed memory, as in the experiments (`lora_jax.training.allocator`).

    length      tokens of a row
    runs        K; "alone" is the ordinary step of one run
    s           seconds of a step of all K runs, median
    tokens/s    of all runs
    x           speed over the ordinary steps one after another; median and quartiles of the turns
    temp_mb     memory that the compiled step allocates in addition to arguments and results
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import lora_jax as lj
from benchmarks.arguments import count, count_or_zero
from benchmarks.e2e_epoch import embedded_folder
from benchmarks.turns import ratio, take_turns, timed
from experiments.harness.config import ALL_LINEAR
from experiments.harness.table import aligned
from experiments.nlg.base import random_params
from lora_jax.data.batches import Batch
from lora_jax.models.gpt2.folder import load_gpt2
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.causal_lm import CausalLM
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.concurrent import make_concurrent_step
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.step import make_train_step, start

SMOLLM2: dict[str, Any] = {
  **{"vocab_size": 49152, "num_positions": 2048, "embed_dim": 576, "num_layers": 30},
  **{"num_heads": 9, "num_kv_heads": 3, "mlp_dim": 1536, "tie_head": True},
}
MEDIUM: dict[str, Any] = {"embed_dim": 1024, "num_layers": 24, "num_heads": 16}
TINY: dict[str, Any] = {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
LORA = lj.LoraConfig(rank=16, alpha=32.0, target=ALL_LINEAR)
AGREEMENT = {"float32": 1e-4, "bfloat16": 1e-2}
HEADS = ["length", "runs", "s", "tokens/s", "x (quartiles)", "temp_mb"]


class Run(NamedTuple):
  """One run before its first step."""

  state: Any
  frozen: PyTree
  batch: Any
  settings: dict[str, jax.Array]


def make_model(name: str, dtype: str, tiny: bool) -> CausalLM:
  """Returns a model of the shape of the embedded one, SmolLM2-135M or GPT-2 medium."""
  dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
  if tiny:
    return GPT2(GPT2Config(**TINY, **dtypes))
  if name == "smollm2":
    return Llama(LlamaConfig(**SMOLLM2, **dtypes))
  if name == "medium":
    return GPT2(GPT2Config(**MEDIUM, **dtypes, scan_layers=True))
  return GPT2(load_gpt2(embedded_folder(), **dtypes)[0])


def random_batch(rows: int, length: int, vocabulary: int, seed: int) -> Batch:
  """Returns rows of random tokens, with a loss at every token."""
  tokens = np.random.default_rng(seed).integers(0, vocabulary, (rows, length + 1), np.int32)
  index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  return Batch(
    tokens=tokens[:, :-1],
    positions=index,
    segment_ids=np.ones_like(index),
    target_index=index,
    targets=tokens[:, 1:],
    target_weights=np.ones(index.shape, np.float32),
  )


def make_optimizer(settings: PyTree) -> optax.GradientTransformation:
  return optax.adamw(settings["learning_rate"])


def make_loss(loss: lj.Adaptation, settings: PyTree) -> lj.Adaptation:
  return loss._replace(apply=functools.partial(loss.apply, scaling=settings["scaling"]))


def make_runs(loss: lj.Adaptation, params: PyTree, batches: Sequence[Batch]) -> list[Run]:
  """Returns a run for each batch, each with its own seed, learning rate and scaling."""
  mesh, init = make_mesh(), jax.jit(loss.init)
  runs = []
  for i, batch in enumerate(batches):
    settings = {
      "learning_rate": jnp.float32(1e-3 / (i + 1)),
      "scaling": jnp.float32(2.0 / (i + 1)),
    }
    key = jax.random.key(i)
    state, frozen, _ = start(params, init(key, params, batch), make_optimizer(settings), key, mesh)
    runs.append(Run(state, frozen, place_batch(mesh, batch), settings))  # pyright: ignore
  return runs


class Way(NamedTuple):
  """One way to make a step.

  Attributes:
    step: makes a step; returns the losses of its runs.
    num_runs: the number of runs.
    temp_bytes: memory of the compiled step.
  """

  step: Callable[[], jax.Array]
  num_runs: int
  temp_bytes: int


def one_run(loss: lj.Adaptation, run: Run) -> Way:
  """Returns the ordinary step of one run."""
  optimizer = make_optimizer({name: float(value) for name, value in run.settings.items()})
  adapted = make_loss(loss, {"scaling": float(run.settings["scaling"])})
  jitted: Any = make_train_step(adapted, optimizer, run.state)
  state = jax.tree.map(jnp.copy, run.state)
  program = jitted.lower(state, run.frozen, run.batch).compile()

  def step() -> jax.Array:
    nonlocal state
    state, metrics = program(state, run.frozen, run.batch)
    return metrics.loss[None]

  return Way(step, 1, program.memory_analysis().temp_size_in_bytes)


def all_runs(loss: lj.Adaptation, runs: Sequence[Run]) -> Way:
  """Returns the step of all runs in one program."""
  stack = jax.jit(lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))
  states, settings = (stack(*(run[i] for run in runs)) for i in (0, 3))
  held = stack(*(run.frozen["adapter"] for run in runs))
  batches, base = [run.batch for run in runs], runs[0].frozen["base"]
  make = functools.partial(make_loss, loss)
  jitted: Any = make_concurrent_step(make, make_optimizer, runs[0].state)
  program = jitted.lower(states, base, held, batches, settings).compile()

  def step() -> jax.Array:
    nonlocal states
    states, metrics = program(states, base, held, batches, settings)
    return metrics.loss

  return Way(step, len(runs), program.memory_analysis().temp_size_in_bytes)


def check(losses: jax.Array, alone: jax.Array, tolerance: float) -> None:
  """Raises ValueError if the first run's first loss differs from that of its ordinary step."""
  error = float(jnp.abs(losses[0] / alone[0] - 1))
  if not error < tolerance:
    raise ValueError(f"{len(losses)} runs: the first loss differs by {error:.1e} from that alone")


def measure(options: argparse.Namespace, length: int) -> list[list[str]]:
  """Returns the rows of the table for rows of this length.

  Raises:
    ValueError: if the first loss of a run differs from that of its ordinary step.
  """
  model = make_model(options.model, options.dtype, options.tiny)
  params = random_params(model, make_mesh(), jax.random.key(0))
  vocabulary: int = model.config.vocab_size
  most = max(options.runs)
  batches = [random_batch(options.batch, length, vocabulary, seed) for seed in range(most)]
  loss = lj.lora(language_model_loss(model), LORA)
  runs = make_runs(loss, params, batches)
  ways = {"alone": one_run(loss, runs[0])}
  ways |= {str(number): all_runs(loss, runs[:number]) for number in options.runs}

  def seconds_of_a_run(way: Way) -> float:
    return timed(way.step)[0] / way.num_runs

  times: dict[str, list[float]] = {}
  if options.turns:
    first = ways["alone"].step()
    for name in list(ways)[1:]:
      check(ways[name].step(), first, AGREEMENT[options.dtype])
    times = take_turns(
      {name: functools.partial(seconds_of_a_run, way) for name, way in ways.items()}, options.turns
    )
  table = []
  for name, way in ways.items():
    cells = [""] * 3
    if times:
      seconds = statistics.median(times[name])
      cells = [
        f"{seconds * way.num_runs:.3f}",
        f"{options.batch * length / seconds:,.0f}",
        str(ratio(times["alone"], times[name])),
      ]
    table.append([str(length), name, *cells, f"{way.temp_bytes / 1e6:,.0f}"])
  return table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", choices=("embedded", "smollm2", "medium"), default="embedded")
  parser.add_argument("--dtype", choices=tuple(AGREEMENT), default="float32")
  parser.add_argument("--runs", type=count, nargs="+", default=[1, 2, 4, 8, 16])
  parser.add_argument("--batch", type=count, default=8, help="rows of a run's batch")
  parser.add_argument("--length", type=count, nargs="+", default=[64])
  parser.add_argument("--turns", type=count_or_zero, default=5, help="0: compile only")
  parser.add_argument("--tiny", action="store_true", help="a toy model")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {options}", flush=True)
  table = [HEADS]
  for length in options.length:
    table += measure(options, length)
  print(aligned(table))


if __name__ == "__main__":
  keep_freed_memory()
  main()
