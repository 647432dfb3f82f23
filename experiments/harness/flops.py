"""Floating-point operations: those of a compiled program, and the speed of a matmul."""

import math
import re
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

NAME = r"%?([\w.$-]+)"
COMPUTATION = re.compile(rf"^(ENTRY )?{NAME} \(.*\{{$")
INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?{NAME} = \(?\w+\[([\d,]*)\]")
MATMUL = re.compile(r" (?:dot|custom-call)\((?:\w+\[\S* )?%?([\w.$-]+)")
CONTRACTED = re.compile(r"lhs_contracting_dim\w*\"?[=:][{\[]([\d,\"]*)[}\]]")
CALLED = re.compile(rf"(?:calls|to_apply|body|condition)={NAME}|branch_computations=\{{([^}}]*)\}}")
TRIPS = re.compile(r"known_trip_count\":\{\"n\":\"(\d+)\"")


def compiled_flops(text: str) -> float:
  """Returns the operations in the matmuls of an optimized HLO module's text.

  XLA's own `cost_analysis` counts a loop's body once, however often it runs, so that the scanned
  form would seem almost free. The optimized module is the program that runs: dead and merged
  matmuls are gone, and each loop has a `known_trip_count`, by which the matmuls in its body are
  multiplied here. A matmul is a `dot`, also inside a fusion, or on GPUs a library call, which names
  its contracted dimensions too.
  """
  direct: dict[str, float] = {}
  calls: dict[str, list[tuple[str, float]]] = {}
  entry, name = "", ""
  shapes: dict[str, list[int]] = {}
  for line in text.splitlines():
    if header := COMPUTATION.match(line):
      name, shapes = header[2], {}
      direct[name], calls[name] = 0.0, []
      entry = name if header[1] else entry
    if instruction := INSTRUCTION.match(line):
      shapes[instruction[1]] = _numbers(instruction[2])
      direct[name] += _matmul_flops(line, shapes, shapes[instruction[1]])
    calls.setdefault(name, []).extend(_called(line))

  def total(name: str) -> float:
    inner = [(total(inner), times) for inner, times in calls[name]]
    return direct[name] + sum(flops * times for flops, times in inner if flops)

  flops = total(entry)
  if math.isnan(flops):
    raise ValueError("a loop with matmuls has no known trip count")
  return flops


def _matmul_flops(line: str, shapes: Mapping[str, list[int]], shape: list[int]) -> float:
  matmul, contracted = MATMUL.search(line), CONTRACTED.search(line)
  if not matmul or not contracted:
    return 0.0
  operand = shapes[matmul[1]]
  return 2.0 * math.prod(shape) * math.prod(operand[d] for d in _numbers(contracted[1]))


def _called(line: str) -> list[tuple[str, float]]:
  """Returns the computations that an instruction calls and how often (NaN if unknown)."""
  trips = TRIPS.search(line)
  times = float(trips[1]) if trips else math.nan if " while(" in line else 1.0
  names = []
  for called in CALLED.finditer(line):
    names += [called[1]] if called[1] else re.findall(NAME, called[2])
  return [(name, times) for name in names]


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


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
