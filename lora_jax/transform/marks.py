"""Replaces the values that a function marks: `checkpoint_name(x, name)` of `jax.ad_checkpoint`.

    call = trace_marks(fn, [MLP_OUTPUT], params, args, kwargs)
    call.marks                                        # one for each layer, or one for a stack
    call.evaluate(visit, {mark: arrays, ...})         # fn's output, each x replaced

    x = checkpoint_name(x, name)       ->       x = checkpoint_name(visit(mark, x, arrays), name)

The interpreter emits the function again, as for adapted weights, and stops at the marks. In a scan
over stacked layers, the arrays of a mark are scanned with them: there is one mark for the stack,
and `visit` gets the arrays of one layer. Such a scan is one that slices weights; others, as over
microbatches, use the same arrays in each step. Marks stay in place, so that methods nest.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend.core import Jaxpr, Literal
from jaxtyping import PyTree

from lora_jax.marks import PLACES
from lora_jax.transform import _compat
from lora_jax.transform.errors import UnsupportedOperation
from lora_jax.transform.factored import as_values
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.tracing import TracedCall, trace_call
from lora_jax.transform.visits import Body, Mark, Plan, Visit, Visits

__all__ = ["Mark", "MarkedCall", "count_layers", "require_marks", "trace_marks"]

Bodies: TypeAlias = list[tuple[Any, list[bool]]]
"""Inner jaxprs, each with a flag for each input: whether it is a weight."""

PLAIN_CALLS = ("jit", "pjit", "checkpoint", "remat2")


@dataclasses.dataclass(frozen=True)
class MarkedCall:
  """One call `fn(params, *args, **kwargs)` and its marks, in the order of evaluation."""

  marks: tuple[Mark, ...]
  traced: TracedCall
  plan: Plan

  def evaluate(self, visit: Visit, arrays: Mapping[Mark, PyTree]) -> Any:
    """Returns the output of `fn`, with some marked values replaced.

    Args:
      visit: `visit(mark, x, arrays) -> x`, of the same shape and dtype. It may close over arrays.
      arrays: by mark, the arrays that `visit` gets, a tree. A mark without an entry is left as it
        is. The arrays of a mark in stacked layers have the axes `mark.layers` first.
    Raises:
      ValueError: if a stack of arrays or what `visit` returns has another shape or dtype.
      UnsupportedOperation: if a mark is in a call that cannot be emitted again.
    """
    for mark in arrays:
      for leaf in jax.tree.leaves(arrays[mark]):
        if leaf.shape[: len(mark.layers)] != mark.layers:
          raise ValueError(
            f"{mark}: expected arrays with the layers {mark.layers} as first axes, got {leaf.shape}"
          )
    values = as_values(self.traced.leaves, self.traced.position)
    visits = Visits(visit, arrays, {id(self.traced.jaxpr): self.plan})
    outputs = Interpreter({}, visits).evaluate(self.traced.jaxpr, values)
    return jax.tree.unflatten(self.traced.out_tree, outputs)


def trace_marks(
  fn: Callable[..., Any],
  names: Sequence[str],
  params: PyTree,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  *,
  strict: bool = True,
) -> MarkedCall:
  """Traces `fn(params, *args, **kwargs)` and finds its marks.

  A name without any mark is no error here: a model's head has none. `require_marks` is the check.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    names: of the marks to find, as in `lora_jax.marks`.
    params: arrays, quantized weights or `ShapeDtypeStruct`s.
    args: positional arguments, as in `trace_call`.
    kwargs: keyword arguments.
    strict: whether to raise these errors. Otherwise marks that cannot be replaced are left out, and
      each evaluation of a layer has marks of its own: for values without trained arrays.
  Raises:
    UnsupportedOperation: if a mark is inside a function with custom derivatives, a `shard_map` or a
      choice by platform.
    ValueError: if two marks of one name have one name stack: a layer that is evaluated twice.
  """
  traced = trace_call(fn, params, args, kwargs)
  weights = set(traced.position.values())
  flags = [i in weights for i in range(len(traced.leaves))]
  search = _Search(names, strict)
  plan, _ = search.plan(traced.jaxpr, flags, (), "")
  return MarkedCall(tuple(search.marks), traced, plan)


def require_marks(call: MarkedCall, names: Sequence[str], method: str) -> None:
  """Raises ValueError if a call lacks the marks that a method replaces, naming what to mark."""
  missing = [name for name in names if name not in {mark.name for mark in call.marks}]
  if missing:
    places = "; ".join(f"{PLACES.get(name, 'a value')}, by {name!r}" for name in missing)
    raise ValueError(
      f"{method} needs marked values, and the function marks none of: {places}. Mark them in the "
      f"model: x = jax.ad_checkpoint.checkpoint_name(x, {missing[0]!r})"
    )


def count_layers(marks: Sequence[Mark]) -> int:
  """Returns the number of layers with marks of one name, one for each or one for their stack.

  Raises:
    ValueError: if only some layers are stacked, or they are in several stacks.
  """
  if not any(mark.layers for mark in marks):
    return len(marks)
  layers = marks[0].layers
  if len(marks) > 1 or len(layers) != 1:
    described = ", ".join(f"{mark} in stacks of {mark.layers}" for mark in marks)
    raise ValueError(f"expected layers in one stack, or none of them stacked; got {described}")
  return layers[0]


class _Search:
  """Finds the marks of some names in a jaxpr; arguments as in `trace_marks`."""

  def __init__(self, names: Sequence[str], strict: bool):
    self.names, self.strict = names, strict
    self.marks: list[Mark] = []
    self.counts: Counter[str] = Counter()
    self.places: set[tuple[str, str]] = set()

  def plan(
    self, jaxpr: Any, flags: Sequence[bool], layers: tuple[int, ...], scope: str
  ) -> tuple[Plan, list[bool]]:
    """Returns where the marks of a jaxpr are, and whether each of its outputs is a weight.

    What is computed from weights and numbers only is a weight, too: layers may be scanned after a
    cast, a mask or a quantization by the function itself.

    Args:
      jaxpr: closed or open.
      flags: whether each of its inputs is a weight.
      layers: the lengths of the stacks of layers around it.
      scope: the name stack around it.
    """
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    weights = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    constants: set[Any] = set()  # not what the function closes over, which may be data
    plan: dict[int, Mark | Body] = {}
    for number, equation in enumerate(jaxpr.eqns):
      inside = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
      is_weight = [not isinstance(v, Literal) and v in weights for v in equation.invars]
      moved = [False] * len(equation.outvars)
      name = equation.primitive.name
      if name == "name" and equation.params["name"] in self.names:
        plan[number] = self._mark(equation, layers, inside)
      elif bodies := self._bodies(equation, is_weight):
        first = len(self.marks)
        length = _stack_length(equation, is_weight)
        around = layers if length is None else (*layers, length)
        plans = {
          id(body): self.plan(body, body_flags, around, inside) for body, body_flags in bodies
        }
        if marks := self.marks[first:]:
          _check_emitted(equation, marks)
          inner = {key: body_plan for key, (body_plan, _) in plans.items()}
          plan[number] = Body(inner, () if length is None else tuple(marks))
        if name in PLAIN_CALLS:
          ((_, moved),) = plans.values()
      variables = {v for v in equation.invars if not isinstance(v, Literal)}
      if variables <= constants:
        constants.update(equation.outvars)
      elif variables <= weights | constants:
        moved = [True] * len(moved)
      weights.update(v for v, flag in zip(equation.outvars, moved, strict=True) if flag)
    outputs = [not isinstance(v, Literal) and v in weights for v in jaxpr.outvars]
    return plan, outputs

  def _bodies(self, equation: Any, is_weight: list[bool]) -> Bodies:
    """Returns the inner jaxprs of an equation in which marks are searched."""
    return _bodies(equation, is_weight) if self.strict or _is_emitted(equation) else []

  def _mark(self, equation: Any, layers: tuple[int, ...], scope: str) -> Mark:
    name, aval = equation.params["name"], equation.outvars[0].aval
    if self.strict and scope and (name, scope) in self.places:
      raise ValueError(
        f"the function marks {name!r} twice in {scope}, at {_compat.source_line(equation)}: does "
        "it call the model twice? Call it once, on a longer batch; or give each layer a name by "
        "jax.named_scope"
      )
    self.places.add((name, scope))
    mark = Mark(name, self.counts[name], layers, aval.shape, aval.dtype, scope)
    self.counts[name] += 1
    self.marks.append(mark)
    return mark


def _bodies(equation: Any, is_weight: list[bool]) -> Bodies:
  """Returns the inner jaxprs of an equation; one that appears twice is one."""
  params, name = equation.params, equation.primitive.name
  if name in (*PLAIN_CALLS, "scan"):
    return [(params["jaxpr"], is_weight)]
  if name == "while":
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    carry = is_weight[n_cond + n_body :]
    cond = (params["cond_jaxpr"], is_weight[:n_cond] + carry)
    return [cond, (params["body_jaxpr"], is_weight[n_cond:])]
  if name == "cond":
    return list({id(body): (body, is_weight[1:]) for body in params["branches"]}.values())
  others = list(_jaxprs(params))
  return [(body, [False] * len(_compat.open_jaxpr(body)[0].invars)) for body in others]


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(getattr(item, "jaxpr", item), Jaxpr):
        yield item


def _stack_length(equation: Any, is_weight: list[bool]) -> int | None:
  """Returns the number of layers of a scan that slices weights; None for another equation."""
  if equation.primitive.name != "scan":
    return None
  first_slice = sum(_compat.scan_counts(equation.params))
  return equation.params["length"] if any(is_weight[first_slice:]) else None


def _is_emitted(equation: Any) -> bool:
  """Tells whether an equation keeps its meaning when it is emitted again."""
  by_platform = equation.params.get("branches_platforms") is not None
  return equation.primitive.name in (*PLAIN_CALLS, "scan", "while", "cond") and not by_platform


def _check_emitted(equation: Any, marks: Sequence[Mark]) -> None:
  """Raises UnsupportedOperation if marks are in an equation that would change its meaning."""
  if not _is_emitted(equation):
    name = equation.primitive.name
    raise UnsupportedOperation(
      f"{marks[0]} is inside {name!r} at {_compat.source_line(equation)}, which cannot be emitted "
      "again without losing its derivatives, sharding or platforms. Mark the value outside of it"
    )
