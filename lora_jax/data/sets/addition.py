"""Addition of numbers of four digits: `4821 + 1907 =` -> `6728`.

Nothing is read; the pairs follow from a seed. The first 1,000 are the test set, the next 1,000 are
for validation, all others for training. No pair occurs twice, in either order.
"""

import itertools
import random
from collections.abc import Iterator

from lora_jax.data.sets.e2e import Record
from lora_jax.fields import Count, CountOrZero, read_value

TITLE = "4-digit addition"
HELD_OUT = 1000
SPLITS = ("test", "valid", "train")
MAX_TRAIN = 10**6  # of 40 million pairs, so that new ones are found at once


def read(split: str, count: int, seed: int = 0) -> list[Record]:
  """Returns the first records of a split; a larger count only adds records.

  Args:
    split: `train`, `valid` or `test`.
    count: at most 1,000,000 for `train`, 1,000 for the others.
    seed: of all splits. Those of one seed have no pair in common.
  Raises:
    ValueError: if there is no such split, or a number is out of range.
  """
  if split not in SPLITS:
    raise ValueError(f"split must be one of train, valid, test, got {split!r}")
  read_value(Count, count, "count")
  read_value(CountOrZero, seed, "seed")
  limit = MAX_TRAIN if split == "train" else HELD_OUT
  if count > limit:
    raise ValueError(f"count of {split} must be at most {limit:,}, got {count:,}")
  start = HELD_OUT * SPLITS.index(split)
  return [
    Record(f"{a} + {b} =", str(a + b))
    for a, b in itertools.islice(_pairs(seed), start, start + count)
  ]


def _pairs(seed: int) -> Iterator[tuple[int, int]]:
  """Yields different pairs of numbers from 1000 to 9999."""
  draw = random.Random(seed).random  # whose values no version of Python changes
  seen: set[tuple[int, int]] = set()
  while True:
    a, b = 1000 + int(9000 * draw()), 1000 + int(9000 * draw())
    if (min(a, b), max(a, b)) not in seen:
      seen.add((min(a, b), max(a, b)))
      yield a, b
