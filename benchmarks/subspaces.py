"""Seconds of Figure 3's similarities (Hu et al. 2021) for all layers of a model, on a CPU.

    python -m benchmarks.subspaces                # SmolLM2's shape: 30 layers of 576 x 576
    python -m benchmarks.subspaces --layers=96 --dim=12288    # GPT-3's

Decomposes random factors of ranks 8 and 64, and compares their subspaces for all i and j. Set
OPENBLAS_NUM_THREADS=1 where other work shares the cores (docs/subspaces.md).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.adapters.delta import LoraWeight
from lora_jax.analysis import similarity, subspaces
from lora_jax.axes import LoraAxes

RANKS = (8, 64)
PATH = "h/attn/query/kernel"


def random_adapter(layers: int, dim: int, rank: int) -> LoraWeight:
  """Returns random factors of a stack of square weights."""
  draw = np.random.default_rng(rank)
  a, b = (
    draw.standard_normal((layers, *shape), np.float32) for shape in ((dim, rank), (rank, dim))
  )
  return LoraWeight(a, b, LoraAxes((0,), (1,), (2,)))


def compare(layers: int, dim: int) -> np.ndarray:
  """Returns phi of A at both ranks, (layers, 8, 64)."""
  params = {PATH: jax.ShapeDtypeStruct((layers, dim, dim), jnp.float32)}
  low, high = (
    subspaces(
      lj.LoraConfig(rank, 2.0 * rank, PATH), {PATH: random_adapter(layers, dim, rank)}, params, PATH
    )
    for rank in RANKS
  )
  return similarity(low.a, high.a)


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--layers", type=int, default=30)
  parser.add_argument("--dim", type=int, default=576)
  options = parser.parse_args()
  begin, cpu = time.perf_counter(), time.process_time()
  phi = compare(options.layers, options.dim)
  seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
  print(f"{options.layers} layers of {options.dim} x {options.dim}: phi of shape {phi.shape}")
  print(f"{seconds:.2f} s, {cpu:.2f} CPU seconds")


if __name__ == "__main__":
  main()
