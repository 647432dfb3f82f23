"""A step of LoRA against one of full fine-tuning, and our full fine-tuning against PyTorch's.

    python -m benchmarks.full_finetuning             # GPT-2 medium's shape, 4 x 512 tokens
    python -m benchmarks.full_finetuning --remat dots_with_no_batch_dims_saveable
    python -m benchmarks.full_finetuning --turns 0   # compiles only: no times
    python -m benchmarks.full_finetuning --peak      # memory of the processes
    python -m benchmarks.full_finetuning --tiny      # toy sizes, seconds

Random weights and tokens, float32, a loss at every token, AdamW. LoRA has rank 4 on query and value
(the paper's), layers are scanned. Without recomputation ("none") everything is kept for the
backward pass; `nothing_saveable` keeps each layer's input and computes the rest again. PyTorch's is
the GPT-2 of `transformers` with its fused AdamW, without recomputation.

    trained_m   millions of trained parameters
    gflop       operations in the matmuls of the compiled step, in 10^9
    mb, x       memory of the compiled step: weights, optimizer state, temporaries; LoRA / full
    s, x        seconds of a step, median; median and quartiles of the turns' ratios, LoRA / full.
                In the last row: our full fine-tuning without recomputation / PyTorch's

All ways have the same loss before their first update, which is compared. They take turns, after a
first step each that is not timed. `--peak` runs a step of each way in a process of its own:

    held_mb     weights that are there before the step (and PyTorch's optimizer state)
    growth_mb   peak of the process's anonymous memory, less that before the step
    peak_mb     their sum

If torch or transformers is missing, PyTorch's row is left out with a message.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

import lora_jax as lj
from benchmarks.e2e_epoch import missing_peers, peft_inputs
from benchmarks.memory import finish, measure, wait_for_start
from benchmarks.turns import ratio, take_turns, timed
from benchmarks.variants import full_batch
from experiments.harness.flops import compiled_flops
from experiments.harness.table import aligned
from experiments.nlg.base import random_params
from lora_jax.data.batches import Batch
from lora_jax.models.gpt2.folder import save_gpt2
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.parts.fields import REMAT_POLICIES
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.step import make_train_step, start

MEDIUM: dict[str, Any] = {"embed_dim": 1024, "num_layers": 24, "num_heads": 16}
TINY: dict[str, Any] = {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
LORA = lj.LoraConfig(rank=4, alpha=32.0, target=r".*/attn/(query|value)/kernel")
LEARNING_RATE, AGREEMENT = 1e-4, 1e-4
METHODS, TORCH = ("LoRA", "full"), "PyTorch full"
TIME_GOALS, MEMORY_GOAL = {"none": 0.73, "nothing_saveable": 0.80}, 0.45
HEADS = ["recomputation", "method", "trained_m", "gflop", "mb", "x", "s", "x (quartiles)", "goals"]


class Way(NamedTuple):
  """A compiled step, and what it costs.

  Attributes:
    run: `run(params)` makes a fresh state, runs one step, and returns its seconds and loss.
    trained: number of trained parameters.
    gflop: in the matmuls of the compiled step.
    memory: bytes of the compiled step: arguments, results and temporaries.
  """

  run: Callable[[PyTree], tuple[float, float]]
  trained: int
  gflop: float
  memory: int


def model_config(options: argparse.Namespace, remat: str) -> GPT2Config:
  shape = TINY if options.tiny else MEDIUM
  return GPT2Config(**shape, scan_layers=True, remat=None if remat == "none" else remat)


def make_batch(options: argparse.Namespace) -> Batch:
  rows, length = (2, 16) if options.tiny else (4, 512)
  return full_batch(rows, length, model_config(options, "none").vocab_size)


def make_params(options: argparse.Namespace) -> PyTree:
  return random_params(GPT2(model_config(options, "none")), make_mesh(), jax.random.key(0))


def make_way(options: argparse.Namespace, method: str, remat: str) -> Way:
  """Compiles the train step of a method; nothing but the batch is allocated."""
  mesh, batch, model = make_mesh(), make_batch(options), GPT2(model_config(options, remat))
  loss = language_model_loss(model)
  adapted = lj.lora(loss, LORA) if method == "LoRA" else lj.full_finetuning(loss)
  key, optimizer = jax.random.key(1), optax.adamw(LEARNING_RATE)
  base = trainable = shapes_of(model)
  if method == "LoRA":
    trainable = jax.eval_shape(adapted.init, key, base, batch)
  state, frozen, masked = start(base, trainable, optimizer, key, mesh)
  placed: Any = place_batch(mesh, batch)  # pyright: ignore[reportArgumentType]
  step: Any = make_train_step(adapted, masked, state)
  compiled = step.lower(state, frozen, placed).compile()
  trained = sum(leaf.size for leaf in jax.tree.leaves(state.part))
  init: Any = jax.jit(adapted.init)

  def run(params: PyTree) -> tuple[float, float]:
    if method == "LoRA":
      base, trainable = params, init(key, params, batch)
    else:  # the step donates the weights
      base = trainable = jax.tree.map(jnp.copy, params)
    state, frozen, _ = jax.block_until_ready(start(base, trainable, optimizer, key, mesh))
    seconds, (_, metrics) = timed(compiled, state, frozen, placed)
    return seconds, float(metrics.loss)

  plan = compiled.memory_analysis()
  memory = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
  gflop = compiled_flops(compiled.as_text()) / 1e9
  return Way(run, trained, gflop, memory - plan.alias_size_in_bytes)


def make_torch(options: argparse.Namespace, params: PyTree) -> Callable[[], tuple[float, float]]:
  """Returns a function that runs one step of PyTorch; returns its seconds and loss."""
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  with tempfile.TemporaryDirectory() as folder:
    config = model_config(options, "none")
    save_gpt2(Path(folder) / "gpt2", config, params, end_of_text_id=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
      Path(folder) / "gpt2", dtype=torch.float32, attn_implementation="sdpa"
    )
    model = model.train()
  model.config.use_cache = False
  for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0
  optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-4, fused=True)
  arrays = peft_inputs(make_batch(options), packed=False)
  inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}

  def step() -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())

  return lambda: timed(step)


def check_losses(losses: dict[str, float]) -> None:
  """Raises ValueError if the losses before the first update differ."""
  spread = (max(losses.values()) - min(losses.values())) / min(losses.values())
  print(f"the losses before the first update agree to {spread:.1e}", flush=True)
  if not spread <= AGREEMENT:
    raise ValueError(f"the losses before the first update differ by {spread:.1e}: {losses}")


def compare(options: argparse.Namespace) -> Iterable[list[str]]:
  """Yields the rows of the table, its header first."""
  ways = {}
  for remat in options.remat:
    for method in METHODS:
      print(f"compiling {method}, recomputation: {remat}", flush=True)
      ways[f"{method} {remat}"] = make_way(options, method, remat)
  times = time_ways(options, ways) if options.turns else {}

  def cells(name: str, reference: str) -> list[str]:
    if name not in times or reference not in times:
      return ["", ""]
    speed = ratio(times[name], times[reference])
    return [f"{statistics.median(times[name]):.2f}", str(speed)]

  yield HEADS
  for remat in options.remat:
    for method in METHODS:
      full, name = f"full {remat}", f"{method} {remat}"
      memory = ways[name].memory / ways[full].memory
      speed = ratio(times[name], times[full]).median if times else None
      yield [
        remat,
        method,
        f"{ways[name].trained / 1e6:.2f}",
        f"{ways[name].gflop:.4g}",
        f"{ways[name].memory / 1e6:.0f}",
        f"{memory:.2f}",
        *cells(name, full),
        goals(remat, memory, speed) if method == "LoRA" else "",
      ]
  if TORCH in times:
    seconds = f"{statistics.median(times[TORCH]):.2f}"
    speed = str(ratio(times["full none"], times[TORCH])) if "full none" in times else ""
    yield ["none", TORCH, "", "", "", "", seconds, speed, ""]


def time_ways(options: argparse.Namespace, ways: Mapping[str, Way]) -> dict[str, list[float]]:
  """Returns the seconds of the steps in each turn, after a comparison of their losses."""
  params = make_params(options)
  runs: dict[str, Callable[[], tuple[float, float]]] = {
    name: functools.partial(way.run, params) for name, way in ways.items()
  }
  if not missing_peers():
    runs[TORCH] = make_torch(options, params)
  check_losses({name: run()[1] for name, run in runs.items()})
  return take_turns({name: lambda run=run: run()[0] for name, run in runs.items()}, options.turns)


def goals(remat: str, memory: float, speed: float | None) -> str:
  """Returns whether a row of LoRA reaches its goals for memory and time, if it was timed."""
  time_goal = TIME_GOALS.get(remat)
  met = [f"mb {MEMORY_GOAL}: {'met' if memory <= MEMORY_GOAL else 'MISSED'}"]
  if time_goal and speed is not None:
    met.append(f"s {time_goal}: {'met' if speed <= time_goal else 'MISSED'}")
  return ", ".join(met)


def child(options: argparse.Namespace) -> None:
  """Runs a step in a process that `measure` has started; sends the bytes that it held before."""
  method, remat = options.child
  params = make_params(options)
  size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  if method == TORCH:
    run, held = make_torch(options, params), 3 * size
    del params
    run()  # the optimizer makes its state
  else:
    held = size if method == "LoRA" else 0  # full fine-tuning's step gets a copy
    run = functools.partial(make_way(options, method, remat).run, params)
  wait_for_start()
  run()
  finish(held)


def measure_peaks(options: argparse.Namespace) -> Iterable[list[str]]:
  """Yields the rows of the table of the processes' memory, its header first."""
  yield ["recomputation", "method", "held_mb", "growth_mb", "peak_mb"]
  cases = [(method, remat) for remat in options.remat for method in METHODS]
  cases += [] if missing_peers() else [(TORCH, "none")]
  for method, remat in cases:
    command = [sys.executable, "-m", "benchmarks.full_finetuning", "--child", method, remat]
    measured = measure([*command, *["--tiny"] * options.tiny])
    sizes = measured.result, measured.growth, measured.result + measured.growth
    row = [remat, method, *(f"{size / 1e6:.0f}" for size in sizes)]
    print(", ".join(row), flush=True)
    yield row


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  policies = ["none", *REMAT_POLICIES]
  parser.add_argument(
    "--remat", nargs="+", default=["none", "nothing_saveable"], choices=policies, metavar="POLICY"
  )
  parser.add_argument("--turns", type=int, default=2, help="0: compile only")
  parser.add_argument("--peak", action="store_true", help="memory of the processes, not time")
  parser.add_argument("--tiny", action="store_true", help="toy sizes")
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  with jax.default_matmul_precision("highest"):  # as torch's default
    if options.child:
      child(options)
      return
    device = jax.devices()[0]
    print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {options}")
    if missing := missing_peers():
      print(f"PyTorch's row is left out; missing: {', '.join(missing)}")
    print(aligned(list(measure_peaks(options) if options.peak else compare(options))))


if __name__ == "__main__":
  main()
