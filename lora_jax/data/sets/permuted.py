"""A dial for the distance of a task: text in which p % of the vocabulary is permuted.

At 0 the text is the pretraining's own; at 100 every token stands for another one, and only the
order of tokens is left of what the base model knows. A permutation is an array of ids:

    permuted = permutation(50257, percent=10, seed=0, kept=[50256])[tokens]

More percent only adds ids that move. p is a share of the vocabulary; the share of a text's tokens
that move is `np.mean(permuted != tokens)`, which depends on the text.
"""

import random
from collections.abc import Collection
from typing import Annotated

import numpy as np
from jaxtyping import Int32

from lora_jax.fields import Count, CountOrZero, Within, read_value


def permutation(
  vocab_size: int, percent: float, seed: int, kept: Collection[int] = ()
) -> Int32[np.ndarray, " {vocab_size}"]:
  """Returns the id that replaces each id.

  A seed puts the ids in an order. The first `percent` of them move, each to the place of the next
  and the last to that of the first: all of them change, and a larger `percent` moves the same ids
  and more.

  Args:
    vocab_size: the number of ids.
    percent: of the ids that are not kept, from 0 to 100, rounded down to whole ids. One id cannot
      move.
    seed: of the order.
    kept: ids that never move, such as the end of text.
  Raises:
    ValueError: if a number is out of range.
  """
  read_value(Count, vocab_size, "vocab_size")
  read_value(Annotated[float, Within("[0, 100]")], percent, "percent")
  read_value(CountOrZero, seed, "seed")
  for token in kept:
    if token not in range(vocab_size):
      raise ValueError(f"kept must be ids below vocab_size = {vocab_size}, got {token!r}")
  draw = random.Random(seed).random  # whose values no version of Python changes
  order = sorted(set(range(vocab_size)) - set(kept), key=lambda _: draw())
  moved = np.array(order[: int(percent * len(order) / 100)], np.int32)
  ids = np.arange(vocab_size, dtype=np.int32)
  ids[moved] = np.roll(moved, -1)
  return ids
