"""Slots: placeholder tokens in whose places prefix methods put trained vectors.

    prompt, completion       p1 p2 p3             w1 w2
    2 prefix, 1 infix slot   s0 s1 p1 p2 p3 s2    w1 w2

A slot is a token like any other to batches, packing, masks, position ids, caches and beam search:
nothing but the method, which replaces its embedding, has to know of it. The ids of slots are above
every vocabulary, so that a model that is not adapted by a prefix method returns NaN for them.
"""

import dataclasses
from collections.abc import Iterable

from lora_jax.fields import CountOrZero, check_fields

FIRST_SLOT = 2**30
"""The id of slot 0; slot i has the id FIRST_SLOT + i."""


@dataclasses.dataclass(frozen=True)
class Slots:
  """The numbers of slots before a prompt and between it and its completion."""

  num_prefix: CountOrZero = 0
  num_infix: CountOrZero = 0

  def __post_init__(self):
    check_fields(self)

  @property
  def count(self) -> int:
    """The number of slots; each takes a position of the model."""
    return self.num_prefix + self.num_infix

  def around(self, prompt: Iterable[int]) -> list[int]:
    """Returns a prompt between its slots.

    >>> [token - FIRST_SLOT if token >= FIRST_SLOT else "word" for token in Slots(2, 1).around([7])]
    [0, 1, 'word', 2]
    """
    ids = range(FIRST_SLOT, FIRST_SLOT + self.count)
    return [*ids[: self.num_prefix], *prompt, *ids[self.num_prefix :]]
