"""A pretraining step: tokens/s, share of the machine's matmul throughput, and memory.

    python -m benchmarks.pretrain
    python -m benchmarks.pretrain --rows 4 --steps 1 --repeats 1   # quick

The model, batch and optimizer are those of `experiments.gpt2_pretrain`, on random tokens. Each way
turns off one CPU optimization; the ways take turns, each turn in a separate process:

    as configured        all optimizations
    memory given back    glibc returns freed memory to the system (training/allocator.py)
    batch in one piece   no gradient accumulation, so larger temporaries
    attention by XLA     `jax.nn.dot_product_attention` instead of the compact attention
    all three            no optimization

    tokens/s   median of the turns
    x          ratio of tokens/s to `as configured`, median of the turns' ratios
    gflop/s    matmul operations of these tokens: three times those of the forward pass
    share      of the throughput of a 2048 x 2048 matmul, measured in the same process
    growth_mb  growth of memory during the steps, beyond weights and optimizer state
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from benchmarks.memory import finish, measure, wait_for_start
from experiments.configs.gpt2_pretrain import get_config
from experiments.harness.config import read_config
from experiments.harness.flops import matmul_flops
from experiments.harness.launch import apply
from experiments.harness.optimizer import make_optimizer
from experiments.nlg.base import random_params
from experiments.nlg.config import PretrainConfig
from experiments.nlg.pretraining import END_OF_TEXT_ID, flops_per_token, pretrained_config
from lora_jax.data import corpus
from lora_jax.models.gpt2.model import GPT2
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.step import make_train_step, start

SLOWER: dict[str, dict[str, Any]] = {
  "memory given back": {"keep_freed_memory": False},
  "batch in one piece": {"fit.accumulation_steps": 1},
  "attention by XLA": {"model.attention": "xla"},
}
WAYS: dict[str, dict[str, Any]] = {
  "as configured": {},
  **SLOWER,
  "all three": {name: value for changes in SLOWER.values() for name, value in changes.items()},
}


def run(way: str, rows: int, steps: int) -> None:
  """Times some steps; runs in a separate process."""
  config = read_config(PretrainConfig, apply(get_config(), {**WAYS[way], "data.batch_size": rows}))
  if config.keep_freed_memory:
    keep_freed_memory()
  parts, model, mesh = config.fit.accumulation_steps, pretrained_config(config), make_mesh()
  length, draw = config.data.row_length, np.random.default_rng(0)
  stream = draw.integers(1, model.vocab_size, 2 * rows * length, np.uint16)
  examples = corpus.Rows(stream, END_OF_TEXT_ID, batch_size=rows, row_length=length, seed=None)
  batch = examples[0]
  params = random_params(GPT2(model), mesh, jax.random.key(0))
  loss = lj.full_finetuning(language_model_loss(GPT2(model)))
  optimizer, _ = make_optimizer(config.optimizer, 1000)
  state, frozen, optimizer = start(params, params, optimizer, jax.random.key(1), mesh)
  placed = place_batch(mesh, batch, parts)
  step: Any = make_train_step(loss, optimizer, state, parts)
  step = step.lower(state, frozen, placed).compile()
  matmul = matmul_flops() / 1e9
  wait_for_start()
  seconds = []
  for _ in range(steps + 1):
    step_start = time.perf_counter()
    state, metrics = step(state, frozen, placed)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - step_start)
  tokens = rows * config.data.row_length / statistics.median(seconds[1:])
  gflops = tokens * flops_per_token(model, config.data.row_length) / 1e9
  finish({"tokens": tokens, "gflops": gflops, "matmul": matmul})


def compare(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
  """Returns the measurements of each turn, by way."""
  turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
  for turn in range(options.repeats):
    for way in list(WAYS)[:: 1 if turn % 2 == 0 else -1]:
      command = [sys.executable, "-m", "benchmarks.pretrain", "--run", way]
      command += ["--rows", str(options.rows), "--steps", str(options.steps)]
      measured = measure(command)
      turns[way].append({**measured.result, "growth": measured.growth / 1e6})
  return turns


def print_table(turns: dict[str, list[dict[str, float]]]) -> None:
  print(f"{'way':20}{'tokens/s':>9}{'x':>6}{'gflop/s':>9}{'share':>7}{'growth_mb':>11}")
  for way, measured in turns.items():
    pairs = zip(measured, turns["as configured"], strict=True)
    ratio = statistics.median(turn["tokens"] / reference["tokens"] for turn, reference in pairs)
    share = statistics.median(turn["gflops"] / turn["matmul"] for turn in measured)
    tokens, gflops, growth = (
      statistics.median(turn[name] for turn in measured) for name in ("tokens", "gflops", "growth")
    )
    print(f"{way:20}{tokens:9.0f}{ratio:6.2f}{gflops:9.0f}{share:7.2f}{growth:11.0f}")


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
  parser = argparse.ArgumentParser(
    description="A pretraining step, with and without its optimizations."
  )
  parser.add_argument("--rows", type=int, default=32, help="rows in a batch, a multiple of 4")
  parser.add_argument("--steps", type=int, default=8, help="steps in a turn")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
  options = parser.parse_args(arguments)
  if options.run:
    run(options.run, options.rows, options.steps)
    return {}
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform})")
  print(json.dumps({name: getattr(options, name) for name in ("rows", "steps", "repeats")}))
  turns = compare(options)
  print_table(turns)
  return turns


if __name__ == "__main__":
  main()
