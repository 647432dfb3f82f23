"""What the uses of one weight do with its axes, recorded while they are inferred."""

import dataclasses


@dataclasses.dataclass(eq=False)
class Probe:
  """Collects what the uses of one weight do with its axes."""

  path: str
  uses: list["Use"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Use:
  """The axes of the original weight, by their role at one use; `lookup`: an embedding."""

  contracted: tuple[int, ...]
  batch: tuple[int, ...]
  free: tuple[int, ...]
  lookup: bool = False
