"""Checks in a jaxpr that an array is the bias of a weight: it is added to that layer's output only.

    y = x W;  z = y + b          z * gain = x (W * gain) + b * gain

Every operation is visited with the kind of each of its operands: the weight; its layer's output so
far, linear in the weight and with its output axes; the bias, moved or cast; or none of these. The
bias may only meet the output, in a sum.
"""

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import Literal

from lora_jax.transform import _compat


class _Kind(enum.Enum):
  WEIGHT = enum.auto()  # moved, cast or scaled
  OUTPUT = enum.auto()  # of the weight's layer, before the bias
  BIAS = enum.auto()


MOVES = {
  *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "copy", "copy_p"),
  *("convert_element_type", "reduce_precision", "name", "sharding_constraint", "reshard"),
  *("slice", "dynamic_slice", "split", "pvary", "pcast"),
}
CONTRACTIONS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
LINEAR = {
  *("mul", "div", "neg", "gather", "reduce_sum", "psum", "psum_invariant", "psum2", "pad"),
}
SUMS = {"add", "add_any", "sub"}


def misused_bias(jaxpr: Any, weight: int, bias: int) -> str | None:
  """Returns how an array is used other than as the bias of a weight; None if it is not.

  Args:
    jaxpr: of the function.
    weight: the index of the weight among its inputs.
    bias: the index of the array.
  """
  kinds: list[_Kind | None] = [None] * len(_compat.open_jaxpr(jaxpr)[0].invars)
  kinds[weight], kinds[bias] = _Kind.WEIGHT, _Kind.BIAS
  try:
    outputs = _visit(jaxpr, kinds)
  except _Misused as error:
    return str(error)
  return "returned by the function" if _Kind.BIAS in outputs else None


class _Misused(Exception):
  """Carries a description out of nested jaxprs."""


def _visit(jaxpr: Any, kinds: Sequence[_Kind | None]) -> list[_Kind | None]:
  """Returns the kind of each output of a jaxpr, from those of its inputs."""
  jaxpr, _ = _compat.open_jaxpr(jaxpr)
  env: dict[Any, _Kind | None] = dict(zip(jaxpr.invars, kinds, strict=True))

  def kind_of(atom: Any) -> _Kind | None:
    return None if isinstance(atom, Literal) else env.get(atom)

  for equation in jaxpr.eqns:
    operands = [kind_of(atom) for atom in equation.invars]
    if any(operands):
      env.update(zip(equation.outvars, _outputs(equation, operands), strict=True))
  return [kind_of(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, operands: list[_Kind | None]) -> list[_Kind | None]:
  name, count = equation.primitive.name, len(equation.outvars)
  bodies = list(_bodies(equation.params))
  if name == "cond":
    branches = [_visit(branch, operands[1:]) for branch in equation.params["branches"]]
    return [_any_of(kinds) for kinds in zip(*branches, strict=True)]
  if name == "scan":
    return _scan_outputs(equation.params, operands)
  if len(bodies) == 1 and len(_compat.open_jaxpr(bodies[0])[0].invars) == len(operands):
    return _visit(bodies[0], operands)
  present = {kind for kind in operands if kind is not None}
  if name == "optimization_barrier":
    return operands
  if name in MOVES and operands[0] is not None:
    return [operands[0]] * count
  if _Kind.BIAS not in present:
    return [_linear_kind(name, operands)] * count
  if name in SUMS and None not in operands and operands.count(_Kind.BIAS) == 1:
    return [None] * count
  line = _compat.source_line(equation)
  raise _Misused(f"used by {name!r} at {line}, other than in a sum with the layer's output")


def _scan_outputs(params: Mapping[str, Any], operands: list[_Kind | None]) -> list[_Kind | None]:
  """Returns the kinds of a loop's outputs; visits its body until the carried kinds repeat."""
  first, count = _compat.scan_counts(dict(params))
  length = max(params["length"], 1)
  visited, iterations = [], []
  while operands not in visited and len(visited) < length:
    visited.append(operands)
    iterations.append(_visit(params["jaxpr"], operands))
    operands = [*operands[:first], *iterations[-1][:count], *operands[first + count :]]
  last = len(iterations) - 1
  if last + 1 < length:  # the kinds repeat from an earlier iteration on
    repeated = visited.index(operands)
    last = repeated + (length - 1 - repeated) % (len(iterations) - repeated)
  stacked = [_any_of(kinds) for kinds in zip(*iterations, strict=True)][count:]
  return [*iterations[last][:count], *stacked]


def _any_of(kinds: Sequence[_Kind | None]) -> _Kind | None:
  """Returns the kind of a value that may have any of these."""
  if _Kind.BIAS in kinds:
    return _Kind.BIAS
  return kinds[0] if len(set(kinds)) == 1 else None


def _linear_kind(name: str, operands: list[_Kind | None]) -> _Kind | None:
  """Returns the kind of an operation's output, from operands of which none is the bias.

  A contraction of the layer's output would mix its elements, which a gain scales differently; and
  neither the product of two operands that depend on the weight nor its inverse is linear in it.
  """
  tracked = [kind for kind in operands if kind is not None]
  if name in CONTRACTIONS:
    return _Kind.OUTPUT if tracked == [_Kind.WEIGHT] else None
  is_linear = name in LINEAR and len(tracked) == 1 and (name == "mul" or operands[0] is not None)
  if is_linear or name == "concatenate" or (name in SUMS and None not in operands):
    return _Kind.OUTPUT if _Kind.OUTPUT in tracked else _Kind.WEIGHT
  return None


def _bodies(params: Mapping[str, Any]) -> Iterator[Any]:
  for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    if key in params:
      yield params[key]
