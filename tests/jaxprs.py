"""Counts the values that a jaxpr creates."""

import math
from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
  """Yields every equation of a jaxpr, those of inner jaxprs included."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for equation in jaxpr.eqns:
    inner = list(inner_jaxprs(equation))
    yield equation
    for body in inner:
      yield from equations(body)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
  for value in equation.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
        yield item


def count_of_sizes(jaxpr: Any, sizes: set[int]) -> int:
  """Returns how many values with one of these numbers of elements are created."""
  return sum(
    math.prod(variable.aval.shape) in sizes
    for equation in equations(jaxpr)
    if not any(inner_jaxprs(equation))  # a call creates what its body creates
    for variable in equation.outvars
    if hasattr(variable.aval, "shape")
  )
