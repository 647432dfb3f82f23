"""The axes of a weight: which are inputs, which outputs, and which both sides share."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class LoraAxes(NamedTuple):
  """The axes of an adapted weight, as indices into its shape.

  Attributes:
    batch: the axes that both A and B have: the layers of a stack, the experts of a mixture.
    inputs: the axes of A besides the batch and rank.
    outputs: the axes of B besides the batch and rank.
  """

  batch: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def a_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns the shape of `lora_a`: (batch..., in..., rank)."""
    return (*(shape[d] for d in (*self.batch, *self.inputs)), rank)

  def b_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns the shape of `lora_b`: (batch..., rank, out...)."""
    return (*(shape[d] for d in self.batch), rank, *(shape[d] for d in self.outputs))

  def sides(self, shape: Sequence[int]) -> tuple[int, int]:
    """Returns the sizes of the two sides; a rank above the smaller one adds nothing."""
    inputs, outputs = ([shape[d] for d in side] for side in (self.inputs, self.outputs))
    return math.prod(inputs), math.prod(outputs)

  def check(self, ndim: int, path: str) -> None:
    """Raises ValueError unless every axis of a weight of `ndim` axes has one role."""
    if sorted((*self.batch, *self.inputs, *self.outputs)) != list(range(ndim)):
      raise ValueError(
        f"{path}: axes must give each of the {ndim} axes of the weight one role, got {self}"
      )
    if not self.inputs or not self.outputs:
      raise ValueError(f"{path}: axes need an input and an output axis, got {self}")
