"""Reserved keys of trainable trees: the parts of several methods, and arrays that methods add.

{"part_0": {...}, "part_1": {...}}    `compose`: a tree of each method
{"lora_added": {...}}                 arrays that are in no leaf's place: they add to the model
"""

import re
from collections.abc import Mapping, Sequence

from jaxtyping import PyTree

ADDED = "lora_added"
"""The key of a trainable tree under which arrays are that stand for no leaf of params."""


def is_added(path: str) -> bool:
  return path.startswith(f"{ADDED}/")


def join_parts(parts: Sequence[PyTree]) -> dict[str, PyTree]:
  """Returns the trainable tree of several methods from those of each."""
  return {f"part_{i}": part for i, part in enumerate(parts)}


def path_in_part(path: str) -> str:
  """Returns the path of a leaf within its method's part of the trainable tree.

  >>> path_in_part("part_1/head/kernel"), path_in_part("part_0/part_1/head/kernel")
  ('head/kernel', 'head/kernel')
  """
  return re.sub(r"^(part_\d+/)+", "", path)


def has_parts(trainable: PyTree) -> bool:
  """Returns whether a trainable tree is of several methods."""
  if not isinstance(trainable, Mapping) or not trainable:
    return False
  return set(trainable) == {f"part_{i}" for i in range(len(trainable))}


def split_parts(trainable: PyTree, count: int) -> list[PyTree]:
  """Returns the trainable trees of several methods.

  Raises:
    ValueError: if the tree is not of `count` methods.
  """
  if not has_parts(trainable) or len(trainable) != count:
    names = sorted(trainable) if isinstance(trainable, Mapping) else type(trainable).__name__
    raise ValueError(
      f"expected the trainable tree of {count} methods, part_0 to part_{count - 1}, got {names}. "
      "Give what compose(fn, ...).init returned"
    )
  return [trainable[f"part_{i}"] for i in range(count)]
