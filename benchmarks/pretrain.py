"""The step of pretraining: tokens/s, its share of the machine's matrix rate, and memory.

    python -m benchmarks.pretrain
    python -m benchmarks.pretrain --rows 4 --steps 1 --repeats 1   # quick

The model, batch and optimizer of `experiments.gpt2_pretrain`, on random tokens. The ways leave out
one at a time of what makes it fast on CPUs, and take turns, each turn a process of its own:

    as configured        all of it
    memory given back    glibc returns what a step frees to the system (training/allocator.py)
    batch in one piece   no accumulation: larger temporaries, touched anew
    attention by XLA     `jax.nn.dot_product_attention` in place of the compact one
    all three            none of them

    tokens/s   of the median turn
    x          tokens/s by those of `as configured` in the same turn, the median
    gflop/s    that these are: three times the products of a forward pass
    share      of the rate of a product of two 2048 x 2048 matrices, taken in the same process
    growth_mb  of memory during the steps, over what the weights and the optimizer hold
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
from experiments.harness.launch import apply
from experiments.harness.optimizer import make_optimizer
from experiments.nlg.config import PretrainConfig
from experiments.nlg.gpt2 import pretrained_config, random_params
from experiments.nlg.pretraining import END_OF_TEXT_ID, flops_per_token, matmul_gflops
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
  """Times some steps, in a process of its own."""
  config = read_config(PretrainConfig, apply(get_config(), {**WAYS[way], "data.batch_size": rows}))
  if config.keep_freed_memory:
    keep_freed_memory()
  parts, model, mesh = config.fit.accumulation_steps, pretrained_config(config), make_mesh()
  shape = {"batch_size": rows, "row_length": config.data.row_length}
  draw = np.random.default_rng(0)
  stream = draw.integers(1, model.vocab_size, 2 * rows * config.data.row_length, np.uint16)
  batch = corpus.Rows(stream, END_OF_TEXT_ID, seed=None, **shape)[0]
  params = random_params(model, mesh, jax.random.key(0))
  loss = lj.full_finetuning(language_model_loss(GPT2(model)))
  optimizer, _ = make_optimizer(config.optimizer, 1000)
  state, frozen, optimizer = start(params, params, optimizer, jax.random.key(1), mesh)
  placed = place_batch(mesh, batch, parts)
  step: Any = make_train_step(loss, optimizer, state, parts)
  step = step.lower(state, frozen, placed).compile()
  matmul = matmul_gflops()
  wait_for_start()
  seconds = []
  for _ in range(steps + 1):
    begun = time.perf_counter()
    state, metrics = step(state, frozen, placed)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - begun)
  tokens = rows * config.data.row_length / statistics.median(seconds[1:])
  gflops = tokens * flops_per_token(model, config.data.row_length) / 1e9
  finish({"tokens": tokens, "gflops": gflops, "matmul": matmul})


def compare(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
  """Returns what each turn of each way has measured."""
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
  for way, of_way in turns.items():
    pairs = zip(of_way, turns["as configured"], strict=True)
    ratio = statistics.median(own["tokens"] / usual["tokens"] for own, usual in pairs)
    share = statistics.median(turn["gflops"] / turn["matmul"] for turn in of_way)
    tokens, gflops, growth = (
      statistics.median(turn[name] for turn in of_way) for name in ("tokens", "gflops", "growth")
    )
    print(f"{way:20}{tokens:9.0f}{ratio:6.2f}{gflops:9.0f}{share:7.2f}{growth:11.0f}")


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
  parser = argparse.ArgumentParser(description="The step of pretraining, and what makes it fast.")
  parser.add_argument("--rows", type=int, default=32, help="of a batch, a multiple of 4")
  parser.add_argument("--steps", type=int, default=8, help="of a turn")
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
