"""Floating-point operations: those of a compiled program, and the speed of a matmul."""

import math
import re
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.hlo import instruction_costs, numbers, total_cost

OPERAND = r"(?:\w+\[\S* )?%?([\w.$#-]+)"
MATMUL = re.compile(rf" (?:dot|custom-call)\({OPERAND}")
CONTRACTED = re.compile(r"lhs_contracting_dim\w*\"?[=:][{\[]([\d,\"]*)[}\]]")
CONVOLUTION = re.compile(rf" convolution\({OPERAND}, {OPERAND}\)")
AXES = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")  # b, f, i, o, and numbers for spatial axes
WINDOW = re.compile(r"(\w+)=([\dx_-]+)(?=[ }])")


def compiled_flops(text: str) -> float:
  """Returns the operations in the matmuls and convolutions of an optimized HLO module's text.

  The optimized module is the program that runs: dead and merged matmuls are gone. Each iteration of
  a loop is counted. A matmul is a `dot`, also inside a fusion, or on GPUs a library call, which
  names its contracted dimensions too; convolutions in a GPU's library are not counted. On TPUs take
  the module after its partitioning: later passes pad, and turn matmuls into convolutions.

  Raises:
    ValueError: if a loop with matmuls has an unknown number of trips.
  """
  return total_cost(text, _flops, "matmuls")


def instruction_flops(text: str) -> dict[str, float]:
  """Returns the operations of `compiled_flops` by instruction; a loop's body is counted once."""
  return instruction_costs(text, _flops)


def _flops(line: str, shape: list[int], shapes: Mapping[str, list[int]]) -> float:
  return _matmul_flops(line, shape, shapes) + _convolution_flops(line, shape, shapes)


def _matmul_flops(line: str, shape: list[int], shapes: Mapping[str, list[int]]) -> float:
  matmul, contracted = MATMUL.search(line), CONTRACTED.search(line)
  if not matmul or not contracted:
    return 0.0
  operand = shapes[matmul[1]]
  return 2.0 * math.prod(shape) * math.prod(operand[d] for d in numbers(contracted[1]))


def _convolution_flops(line: str, shape: list[int], shapes: Mapping[str, list[int]]) -> float:
  """Returns the operations of a convolution, without multiplications by padding."""
  convolution, axes = CONVOLUTION.search(line), AXES.search(line)
  if not convolution or not axes:
    return 0.0
  inputs = dict(zip(axes[1], shapes[convolution[1]], strict=True))
  kernel = dict(zip(axes[2], shapes[convolution[2]], strict=True))
  outputs = dict(zip(axes[3], shape, strict=True))
  terms = kernel["i"] * outputs["b"] * outputs["f"]
  for i, axis in enumerate(sorted(filter(str.isdigit, outputs))):
    window = {name: sizes.split("x")[i] for name, sizes in WINDOW.findall(line)}
    terms *= _num_terms(inputs[axis], kernel[axis], outputs[axis], window)
  return 2.0 * terms


def _num_terms(inputs: int, taps: int, outputs: int, window: Mapping[str, str]) -> int:
  """Returns the number of products along one axis of a convolution.

  Args:
    inputs: size of the input.
    taps: size of the kernel.
    outputs: size of the output.
    window: HLO's `stride`, `pad`, `lhs_dilate` (of the input) and `rhs_dilate` (of the kernel).
  """
  stride, gap, hole = (int(window.get(x, "1")) for x in ("stride", "lhs_dilate", "rhs_dilate"))
  low = int(window.get("pad", "0_0").split("_")[0])
  place = np.add.outer(stride * np.arange(outputs), hole * np.arange(taps)) - low
  return int(np.sum((place >= 0) & (place < (inputs - 1) * gap + 1) & (place % gap == 0)))


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
