"""Times several ways to do the same work in turns, so that other work on the machine slows all."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Ratio(NamedTuple):
  """The median and the quartiles over the turns of a ratio of times."""

  median: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def timed(fn: Callable[..., Any], *args: Any) -> tuple[float, Any]:
  """Returns the seconds of a call and its result, whose arrays are waited for."""
  begin = time.perf_counter()
  result = jax.block_until_ready(fn(*args))
  return time.perf_counter() - begin, result


def take_turns(ways: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
  """Returns the seconds of each way in each turn; every second turn has the reverse order.

  Args:
    ways: by name, functions that do the work once and return its seconds.
    turns: the number of calls of each.
  """
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for turn in range(turns):
    for name in list(ways)[:: -1 if turn % 2 else 1]:
      seconds[name].append(ways[name]())
  return seconds


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
  """Returns the ratio of a way's times to those of the reference in the same turns."""
  ratios = [a / b for a, b in zip(times, reference, strict=True)]
  if len(ratios) == 1:
    return Ratio(*ratios * 3)
  low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
  return Ratio(middle, low, high)
