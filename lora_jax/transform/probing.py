"""The uses of a weight, recorded while its axes are inferred.

While `init` infers the axes, a weight of n dimensions has one probing factor per axis. Each rule
of `rules/` moves it as it would A and B; where the weight is used, the labels of the n factors
show where each axis is.
"""

import dataclasses
from collections.abc import Sequence

from lora_jax.axes import LoraAxes
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
  """Collects the uses of one weight.

  Attributes:
    path: the weight's path.
    axes: the axes that the user gave; its uses need not agree then.
    uses: in the order of the function's operations.
    materialized: the uses where it was materialized, which fit any axes.
  """

  path: str
  axes: LoraAxes | None = None
  uses: list[Use] = dataclasses.field(default_factory=list)
  materialized: list[Use] = dataclasses.field(default_factory=list)

  def record(
    self, dims: Sequence[Sequence[int]], contracted: set[int], batch: set[int], lookup: bool
  ) -> None:
    """Records a use.

    Args:
      dims: for each original axis, its dimensions in the view.
      contracted: the view's dimensions that are summed over with the layer's input.
      batch: the view's dimensions that are shared with the input and kept.
      lookup: whether it is an embedding's lookup.
    Raises:
      Unsupported: if an original axis has two roles, or there is no input or no output axis.
    """
    roles: dict[str, list[int]] = {"contracted": [], "batch": [], "free": []}
    for axis, present in enumerate(map(set, dims)):
      if not present and lookup and not contracted:
        roles["contracted"].append(axis)  # a single row
      elif not present or present <= batch:  # indexed, sliced by a loop, or shared
        roles["batch"].append(axis)
      elif present <= contracted:
        roles["contracted"].append(axis)
      elif present & (contracted | batch) and self.axes is None:
        raise Unsupported(f"axis {axis} is only partly contracted")
      else:
        roles["free"].append(axis)
    if self.axes is None and not (roles["contracted"] and roles["free"]):
      missing = "left as an output" if roles["contracted"] else "contracted with an input"
      raise Unsupported(f"none of its axes is {missing}, so that A and B cannot be told apart")
    self.uses.append(Use(*(tuple(axes) for axes in roles.values()), lookup=lookup))

  def record_materialized(self, dims: Sequence[Sequence[int]]) -> None:
    """Records that a view was materialized; of its axes in order, the last is the output."""
    batch = tuple(axis for axis, present in enumerate(dims) if not present)
    rest = [axis for axis, present in enumerate(dims) if present]
    rest.sort(key=lambda axis: min(dims[axis]))
    self.materialized.append(Use(tuple(rest[:-1]), batch, tuple(rest[-1:])))
