"""What the uses of a weight do with its axes, recorded while they are inferred.

While `init` infers the axes, a weight of n dimensions has one probing factor per axis: each rule
of `rules/` moves it along as it would A and B, and where the weight is used, the labels of the n
factors tell what became of each axis.
"""

import dataclasses
from collections.abc import Sequence

from lora_jax.transform.errors import Unsupported


@dataclasses.dataclass(frozen=True)
class Use:
  """The axes of the original weight, by their role at one use; `lookup`: an embedding."""

  contracted: tuple[int, ...]
  batch: tuple[int, ...]
  free: tuple[int, ...]
  lookup: bool = False


@dataclasses.dataclass(eq=False)
class Probe:
  """Collects what the uses of one weight do with its axes."""

  path: str
  uses: list[Use] = dataclasses.field(default_factory=list)

  def record(
    self, dims: Sequence[Sequence[int]], contracted: set[int], batch: set[int], lookup: bool
  ) -> None:
    """Records a use.

    Args:
      dims: for each original axis, the dimensions of the view that it has become.
      contracted: the view's dimensions that are summed over with the layer's input.
      batch: the view's dimensions that are shared with the input and kept.
      lookup: whether it is an embedding's lookup.
    Raises:
      Unsupported: if an original axis has two roles, or one side has none.
    """
    roles: dict[str, list[int]] = {"contracted": [], "batch": [], "free": []}
    for axis, present in enumerate(map(set, dims)):
      if not present and lookup and not contracted:
        roles["contracted"].append(axis)  # a single row
      elif not present or present <= batch:  # taken away by an index or a loop, or shared
        roles["batch"].append(axis)
      elif present <= contracted:
        roles["contracted"].append(axis)
      elif present & (contracted | batch):
        raise Unsupported(f"axis {axis} is only partly contracted")
      else:
        roles["free"].append(axis)
    if not roles["contracted"] or not roles["free"]:
      side = "left as an output" if roles["contracted"] else "contracted with an input"
      raise Unsupported(f"no axis is {side}, so that there are no two sides to factor")
    self.uses.append(Use(*(tuple(axes) for axes in roles.values()), lookup=lookup))
