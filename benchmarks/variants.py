"""Time, operations and memory of a train step of every method, and their ratios to LoRA's.

    python -m benchmarks.variants                       # GPT-2 small's shape, 1 x 64 tokens
    python -m benchmarks.variants --model smollm2 --batch 8 --length 128
    python -m benchmarks.variants --only dora lora_fa --unrolled --turns 20

All methods of `experiments/harness/methods.py` on all linear layers, at rank 4 (VeRA at 128), with
AdamW as they wrap it. Layers are scanned unless `--unrolled` is given. All weights are random, and
so are the adapters: the costs of a step do not depend on their values.

    trained      thousands of trained parameters
    GFLOP, x     operations in the matmuls of the compiled step, in 10^9, each iteration of a loop
                 counted; ratio to LoRA's
    ms, x        milliseconds of a step, median; median of the turns' ratios
    x CPU        the same ratio of CPU time, all threads
    MB, x        memory of the compiled step: arguments with the base model, results, temporaries

The methods take turns, so that other work on the machine slows all of them. `x` and `x CPU` are
comparable between machines; milliseconds are not.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.comparison.costs import Step, compile_step, measure_steps
from experiments.configs.variants import ARMS, CONTROL, RANK, get_config
from experiments.harness.config import read_config
from experiments.harness.fit import count_trained
from experiments.harness.launch import apply
from experiments.harness.methods import METHODS, adapt, find_method, names
from experiments.harness.table import aligned
from experiments.nlg.base import random_params
from experiments.nlg.config import E2EConfig
from experiments.nlg.restore import trainable_shapes
from lora_jax.data.batches import Batch
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import CausalLM
from lora_jax.models.zoo import plan_causal_lm
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh

LEFT_OUT = ("qa_lora", "loftq", "top_layers")  # of quantized weights, and of layers not scanned
ALL = [name for name in names("gpt2_e2e", trains=True) if name not in LEFT_OUT]
HEADS = ["method", "trained", "GFLOP", "x", "ms", "x", "x CPU", "MB", "x"]


def make_model(options: argparse.Namespace) -> CausalLM:
  """Returns the model that the options name, without weights."""
  scan_layers = not options.unrolled
  if options.model == "smollm2":
    return plan_causal_lm(find_folder("smollm2"), scan_layers=scan_layers).module
  shape: dict[str, Any] = {"num_layers": 2, "embed_dim": 64, "num_heads": 2, "vocab_size": 8192}
  shape = shape if options.model == "tiny" else {}
  return GPT2(GPT2Config(**shape, scan_layers=scan_layers))


def full_batch(batch_size: int, length: int, vocabulary: int) -> Batch:
  """Returns rows of random tokens, with a loss at every token."""
  draw = np.random.default_rng(0)
  rows = draw.integers(0, vocabulary, (batch_size, length + 1), np.int32)
  index = np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length))
  return Batch(
    tokens=rows[:, :-1],
    positions=index,
    segment_ids=np.ones_like(index),
    target_index=index,
    targets=rows[:, 1:],
    target_weights=np.ones(index.shape, np.float32),
  )


def random_tree(shapes: PyTree) -> PyTree:
  """Returns small positive random numbers in the shapes of a tree."""
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  drawn = [
    (0.02 * jax.random.uniform(key, leaf.shape)).astype(leaf.dtype)
    for key, leaf in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, drawn)


def make_step(name: str, module: CausalLM, params: PyTree, batch: Batch, mesh: Mesh) -> Step:
  """Compiles the train step of a method."""
  changes = ARMS[name].changes if name in ARMS else {}
  used = {n: value for n, value in changes.items() if METHODS[name].uses(n)}
  config = apply(get_config(), {**used, "method": name, "workdir": "unused"})
  settings = read_config(E2EConfig, config)
  loss = adapt(settings)(language_model_loss(module))
  if find_method(name).owns_base:  # its step donates the base model's arrays
    params = trainable = jax.tree.map(jnp.copy, params)
  else:
    trainable = random_tree(trainable_shapes(loss, params))
  return compile_step(settings, loss, params, trainable, batch, mesh)


def measure(options: argparse.Namespace) -> list[list[str]]:
  """Returns the cells of the table, its header first."""
  module, mesh = make_model(options), make_mesh()
  params = random_params(module, mesh, jax.random.key(0))
  batch = full_batch(options.batch, options.length, module.config.vocab_size)
  steps, trained = {}, {}
  for name in dict.fromkeys([CONTROL, *options.only]):
    print(f"compiling {name}", flush=True)
    steps[name] = make_step(name, module, params, batch, mesh)
    trained[name] = count_trained(steps[name].state.part)
  costs = measure_steps(steps, CONTROL, options.turns)
  return [HEADS, *_rows(costs, trained)]


def _rows(costs: Any, trained: Any) -> Iterable[list[str]]:
  control = costs[CONTROL]
  for name, of in costs.items():
    yield [
      METHODS[name].label,
      f"{trained[name] / 1e3:.1f}",
      f"{of['gflop']:.2f}",
      f"{of['gflop'] / control['gflop']:.3f}",
      f"{1e3 * of['step_seconds']:.0f}",
      f"{of['step_ratio']:.2f}",
      f"{of['cpu_ratio']:.2f}",
      f"{of['step_megabytes']:.0f}",
      f"{of['step_megabytes'] / control['step_megabytes']:.2f}",
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="small", choices=["small", "smollm2", "tiny"])
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--length", type=int, default=64)
  parser.add_argument("--only", nargs="+", default=ALL, choices=ALL, metavar="METHOD")
  parser.add_argument("--unrolled", action="store_true", help="layers in a Python loop")
  parser.add_argument("--turns", type=int, default=9)
  options = parser.parse_args(arguments)
  for name in ("batch", "length", "turns"):
    if getattr(options, name) < 1:
      parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
  return options


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  keep_freed_memory()
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), rank {RANK}, {options}")
  print(aligned(measure(options)))


if __name__ == "__main__":
  main()
