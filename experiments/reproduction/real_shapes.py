"""Decides the claims on latency, memory, speed and checkpoints, from saved results at real shapes.

    python -m benchmarks.latency --save=runs/paper/latency.json
    python -m experiments.paper_shapes --steps all --save=runs/paper/shapes.json

Latency is a ratio to the base model in the same turn: its median, with a 95 % interval by a
bootstrap over the turns. Memory, checkpoints and operations are exact; the time of a step was not
measured.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.reproduction.decisions import Outcome, Word, joined
from experiments.shapes.results import Latencies, Sizes, TimedCase, read
from experiments.shapes.steps import METHODS

BASE, MERGED, UNMERGED, ADAPTERS = "base", "merged LoRA", "LoRA", ("Adapter_L", "Adapter_H")
PAPERS = "medium"  # the model of Table 1, as `benchmarks.latency` names it
SLOWER = 1.02  # smaller ratios are no added latency: Table 1's smallest of an adapter is 1.022
RESAMPLES = 4000
LATENCY, SHAPES = "latency.json", "shapes.json"
FULL, LORA = METHODS


class Shape(NamedTuple):
  """A case: rows of tokens, and the widths of Adapter_L and Adapter_H."""

  batch_size: int
  length: int
  lin_width: int = 224
  houlsby_width: int = 112

  def __str__(self) -> str:
    return f"{self.batch_size} x {self.length}"


class Ratio(NamedTuple):
  """A median ratio of times, with its 95 % interval."""

  middle: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


def same_latency(ratio: Ratio) -> Word:
  """Decides that a pass takes as long as the base model's."""
  return "holds" if ratio.high <= SLOWER else "fails" if ratio.low > SLOWER else "cannot be told"


def more_latency(ratio: Ratio) -> Word:
  """Decides that a pass takes longer than the base model's."""
  return "holds" if ratio.low > SLOWER else "fails" if ratio.high <= SLOWER else "cannot be told"


def latency(
  root: Path, shape: Shape, ways: Sequence[str], rule: Callable[[Ratio], Word]
) -> Outcome:
  """Decides by the latency of GPT-2 M's shape, relative to the base model's.

  Args:
    root: the folder of all runs.
    shape: of the case.
    ways: that are compared with the base model, as `benchmarks.latency` names them.
    rule: of a ratio.
  """
  results = read(Latencies, root / LATENCY)
  cases = () if results is None else results.cases
  case = next((c for c in cases if shape_of(c) == shape), None)
  if results is None or case is None:
    return Outcome("not run", f"missing: {LATENCY}, the case {shape}")
  if results.model != PAPERS:
    return Outcome("not run", f"missing: GPT-2 M; {LATENCY} has {results.model}")
  ratios = {name: _ratio(case, name) for name in ways}
  words = "; ".join(f"{name} {ratio}" for name, ratio in ratios.items())
  where = f"times the base model, limit {SLOWER:g}; {results.conditions}"
  return Outcome(joined([rule(ratio) for ratio in ratios.values()]), f"{words} ({where})")


def shape_of(case: TimedCase) -> Shape:
  return Shape(*case.sizes)


def latency_rows(root: Path) -> list[list[str]]:
  """Returns a table of the ratios of all saved cases, the header first; it may have no rows."""
  results = read(Latencies, root / LATENCY)
  ways = (MERGED, UNMERGED, *ADAPTERS)
  rows = [["batch x tokens", "widths L, H", "base, ms", *(f"{way}, x" for way in ways), "status"]]
  for case in () if results is None else results.cases:
    assert results is not None
    ratios = [str(_ratio(case, way)) for way in ways]
    base = next(way.seconds for way in case.ways if way.name == BASE)
    sizes = [str(shape_of(case)), f"{case.lin_width}, {case.houlsby_width}"]
    status = f"real shape, {results.conditions}" if results.model == PAPERS else "another shape"
    rows.append([*sizes, f"{1e3 * np.median(base):.1f}", *ratios, status])
  return rows


def _ratio(case: TimedCase, name: str) -> Ratio:
  """Returns the ratio of a way's times to the base model's.

  Raises:
    ValueError: if one is missing, or they took different numbers of turns.
  """
  times = {way.name: np.array(way.seconds) for way in case.ways}
  missing = [way for way in (BASE, name) if way not in times]
  if missing or times[BASE].shape != times[name].shape or not len(times[name]):
    raise ValueError(
      f"{LATENCY}: the case {shape_of(case)} needs the same number of turns of "
      f"{BASE} and {name}, got {', '.join(f'{len(x)} of {way}' for way, x in times.items())}"
    )
  ratios = times[name] / times[BASE]
  draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
  low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
  return Ratio(float(np.median(ratios)), float(low), float(high))


def less_memory(root: Path, model: str) -> Outcome:
  """Decides that full fine-tuning needs at least three times the memory of LoRA's step."""
  ratio, batch = _size_ratio(root, model, "memory")
  if ratio is None:
    return Outcome("not run", f"missing: {SHAPES}, {model}")
  word: Word = "holds" if ratio >= 3 else "fails"
  return Outcome(word, f"{ratio:.2f} times, exactly: a compiled step, float32, AdamW, {batch}")


def fewer_operations(root: Path, model: str) -> Outcome:
  """Decides that LoRA's step is 25 % faster, if time is in proportion to operations of matmuls."""
  ratio, batch = _size_ratio(root, model, "flops")
  if ratio is None:
    return Outcome("not run", f"missing: {SHAPES}, {model}")
  word: Word = "holds" if ratio >= 1.25 else "fails"
  operations = f"{ratio:.2f} times fewer operations in matmuls, exactly: a compiled step, {batch}"
  return Outcome(word, f"{operations}, layers recomputed; no time was measured")


def smaller_checkpoint(root: Path, model: str) -> Outcome:
  """Decides that LoRA's checkpoint is 10,000 times smaller than the model's."""
  ratio, _ = _size_ratio(root, model, "checkpoint")
  if ratio is None:
    return Outcome("not run", f"missing: {SHAPES}, {model}")
  word: Word = "holds" if round(math.log10(ratio)) == 4 else "fails"
  return Outcome(word, f"{ratio:,.0f} times, exactly; read as the nearest power of ten")


def _size_ratio(root: Path, model: str, field: str) -> tuple[float | None, str]:
  """Returns full fine-tuning's size over LoRA's, None if one is missing, and the step's batch."""
  results = read(Sizes, root / SHAPES)
  if results is None:
    return None, ""
  sizes = {step.method: getattr(step, field) for step in results.steps if step.model == model}
  if not {FULL, LORA} <= sizes.keys():
    return None, results.batch
  return sizes[FULL] / sizes[LORA], results.batch
