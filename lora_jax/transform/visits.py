"""Marked values as the interpreter has them: where they are in a jaxpr, and what replaces them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True, order=True)  # JAX sorts the keys of a tree
class Mark:
  """A value that a function marks by `checkpoint_name(x, name)`.

  Attributes:
    name: as the function gives it, such as `lora_jax/mlp_output`.
    number: among the marks of its name in one call, from 0, in the order of evaluation: the number
      of the layer, if each layer has one.
    layers: the lengths of the stacks that it is in, usually one: the arrays that belong to it have
      these axes first. () in layers that are not stacked.
    shape: of the value, within one layer: usually (B, T, D), where T depends on the call.
    dtype: of the value.
    scope: its name stack, such as `GPT2/h_0`; for messages.
  """

  name: str
  number: int
  layers: tuple[int, ...]
  shape: tuple[int, ...]
  dtype: Any
  scope: str

  def __str__(self) -> str:
    return f"{self.name} {self.number}" + (f" ({self.scope})" if self.scope else "")


@dataclasses.dataclass(frozen=True)
class Body:
  """An equation with marks inside.

  Attributes:
    plans: of its inner jaxprs, by their `id`; the equation keeps them alive.
    stacked: the marks whose arrays the equation, a scan, slices.
  """

  plans: Mapping[int, "Plan"]
  stacked: tuple[Mark, ...]


Plan: TypeAlias = Mapping[int, Mark | Body]
"""Where the marks of a jaxpr are, by the number of the equation."""

Visit: TypeAlias = Callable[[Mark, Any, PyTree], Any]


@dataclasses.dataclass(frozen=True)
class Visits:
  """The marks of some jaxprs, and what replaces their values.

  Attributes:
    visit: `visit(mark, x, arrays) -> x`.
    arrays: by mark.
    plans: of the jaxprs, by their `id`.
    stacked: the marks whose arrays the scan that is emitted slices.
  """

  visit: Visit
  arrays: Mapping[Mark, PyTree]
  plans: Mapping[int, Plan]
  stacked: tuple[Mark, ...] = ()

  def at(self, mark: Mark, x: Any) -> Any:
    """Returns what replaces a marked value."""
    if mark not in self.arrays:
      return x
    out = self.visit(mark, x, self.arrays[mark])
    if (out.shape, out.dtype) != (x.shape, x.dtype):
      raise ValueError(
        f"{mark}: expected {x.dtype} of shape {x.shape} in the place of the marked value, got "
        f"{out.dtype} of shape {out.shape}"
      )
    return out

  def inside(self, body: Body) -> "Visits":
    """Returns the visits of an equation's inner jaxprs."""
    return dataclasses.replace(self, plans=body.plans, stacked=body.stacked)

  def sliced_arrays(self) -> dict[Mark, PyTree]:
    """Returns the arrays that a scan slices."""
    return {mark: self.arrays[mark] for mark in self.stacked if mark in self.arrays}

  def of_slice(self, arrays: Mapping[Mark, PyTree]) -> "Visits":
    """Returns the visits of one step of a scan, with slices of its arrays."""
    return dataclasses.replace(self, arrays={**self.arrays, **arrays}, stacked=())


NO_VISITS = Visits(lambda mark, x, arrays: x, {}, {})
