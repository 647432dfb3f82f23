"""The bytes that a device sends to others, from the text of a partitioned HLO module."""

import functools
import math
import re
from collections.abc import Mapping

from experiments.harness.hlo import numbers, total_cost

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
ARRAY = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\].*? \{(.*?)\})")


def collective_bytes(text: str) -> dict[str, float]:
  """Returns the bytes that a device sends in a module's collectives, by kind.

  Each iteration of a loop is counted. Of N devices around a ring, each sends (N - 1) / N of the
  gathered array in an all-gather, as much of the whole array in a reduce-scatter, and twice as much
  in an all-reduce, which is both. The module is to be that after partitioning: later passes split
  collectives into steps that run along with matmuls, and an asynchronous one appears twice.

  Raises:
    ValueError: if a loop with collectives has an unknown number of trips.
  """
  totals = {
    kind: total_cost(text, functools.partial(_sent_bytes, kind), "collectives") for kind in KINDS
  }
  return {kind: total for kind, total in totals.items() if total}


def _sent_bytes(kind: str, line: str, shape: list[int], shapes: Mapping[str, list[int]]) -> float:
  del shape, shapes  # those of the first array only
  collective = COLLECTIVE.search(line)
  if not collective or collective[2] != kind:
    return 0.0
  size = sum(_num_bytes(*array) for array in ARRAY.findall(collective[1]))
  if kind == "collective-permute":
    return size
  count = _group_size(line)
  share = (count - 1) / count
  return size * {"all-reduce": 2 * share, "reduce-scatter": count - 1}.get(kind, share)


def _num_bytes(dtype: str, shape: str) -> float:
  bits = 8 if dtype == "pred" else numbers(dtype)[0]
  return bits / 8 * math.prod(numbers(shape))


def _group_size(line: str) -> int:
  """Returns the number of devices in each group of a collective."""
  groups = GROUPS.search(line)
  if not groups:
    raise ValueError(f"a collective without known groups: {line.strip()[:200]}")
  if groups[1]:
    return int(groups[1])
  if groups[2]:
    return len(groups[2].split(","))
  sizes = dict(re.findall(r"('\w+')=(\d+)", groups[3]))
  axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", groups[4])
  return math.prod(int(part or sizes[axis]) for axis, part in axes)
