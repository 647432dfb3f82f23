"""The axes of a weight: inputs, outputs, and batch axes that both have."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

RANK = -1
"""The label of a factor's rank axis; labels from 0 are dimensions of the weight."""

RANK2 = -2
"""The label of a second inner axis."""

GROUPS = -3
"""The label of an axis that has one entry for each group of inputs."""

IN1, IN2, OUT1, OUT2 = -4, -5, -6, -7
"""The labels of inputs and outputs as two axes each: those of a Kronecker product's factors."""

INNER: Mapping[str, int] = {
  **{"rank": RANK, "rank2": RANK2, "groups": GROUPS},
  **{"in1": IN1, "in2": IN2, "out1": OUT1, "out2": OUT2},
}


class LoraAxes(NamedTuple):
  """The axes of an adapted weight, as indices into its shape.

  The axes of an adapter's array are written as words: lora_a is `"batch in rank"`, lora_b `"batch
  rank out"`. Each of `batch`, `in` and `out` names all of these axes, in order.

  Attributes:
    batch: the axes that both A and B have: the layers of a stack, the experts of a mixture.
    inputs: the further axes of A, contracted with the layer's input.
    outputs: the further axes of B.
  """

  batch: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def labels(self, words: str) -> tuple[int, ...]:
    """Returns the label of each axis of an array: a dimension of the weight, or an inner one.

    >>> LoraAxes((0,), (1,), (2, 3)).labels("batch rank out")
    (0, -1, 2, 3)
    """
    return _labels(self, words)

  def array_shape(
    self, words: str, shape: Sequence[int], sizes: Mapping[str, int]
  ) -> tuple[int, ...]:
    """Returns the shape of an array with these axes.

    Args:
      words: the axes of the array.
      shape: the weight's shape.
      sizes: the sizes of the inner axes, by word.
    """
    inner = {INNER[word]: size for word, size in sizes.items()}
    return tuple(inner[l] if l < 0 else shape[l] for l in self.labels(words))

  def counts(self, shape: Sequence[int]) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs; a rank above the smaller one adds nothing."""
    inputs, outputs = ([shape[d] for d in axes] for axes in (self.inputs, self.outputs))
    return math.prod(inputs), math.prod(outputs)

  def check(self, ndim: int, path: str) -> None:
    """Raises ValueError unless every axis of a weight of `ndim` axes has one role."""
    if sorted((*self.batch, *self.inputs, *self.outputs)) != list(range(ndim)):
      raise ValueError(
        f"{path}: axes must give each of the {ndim} axes of the weight one role, got {self}"
      )
    if not self.inputs or not self.outputs:
      raise ValueError(f"{path}: axes need an input and an output axis, got {self}")


@functools.lru_cache(maxsize=1024)  # asked for each array of each weight at every trace
def _labels(axes: LoraAxes, words: str) -> tuple[int, ...]:
  roles = {"batch": axes.batch, "in": axes.inputs, "out": axes.outputs}
  roles |= {word: (label,) for word, label in INNER.items()}
  return tuple(label for word in words.split() for label in roles[word])
