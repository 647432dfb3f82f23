"""Floating-point operations: those of a compiled program, and the speed of a matmul."""

import math
import re
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from experiments.harness.hlo import numbers, total_cost

MATMUL = re.compile(r" (?:dot|custom-call)\((?:\w+\[\S* )?%?([\w.$#-]+)")
CONTRACTED = re.compile(r"lhs_contracting_dim\w*\"?[=:][{\[]([\d,\"]*)[}\]]")


def compiled_flops(text: str) -> float:
  """Returns the operations in the matmuls of an optimized HLO module's text.

  The optimized module is the program that runs: dead and merged matmuls are gone. Each iteration of
  a loop is counted. A matmul is a `dot`, also inside a fusion, or on GPUs a library call, which
  names its contracted dimensions too. On TPUs, where matmuls become convolutions, take the module
  after its partitioning.

  Raises:
    ValueError: if a loop with matmuls has an unknown number of trips.
  """
  return total_cost(text, _matmul_flops, "matmuls")


def _matmul_flops(line: str, shape: list[int], shapes: Mapping[str, list[int]]) -> float:
  matmul, contracted = MATMUL.search(line), CONTRACTED.search(line)
  if not matmul or not contracted:
    return 0.0
  operand = shapes[matmul[1]]
  return 2.0 * math.prod(shape) * math.prod(operand[d] for d in numbers(contracted[1]))


def matmul_flops(size: int = 2048, repeats: int = 10) -> float:
  """Returns the operations per second of a square float32 matmul, the best of several."""
  x = jnp.ones((size, size))
  matmul = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(matmul(x, x))
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
