"""Walks a jaxpr with factored weights among its values.

An equation without a factored weight is evaluated unchanged, custom derivatives included.
Others go to the rule of their primitive. Control flow is emitted again with JAX's public
functions (`jit`, `scan`, `while_loop`, `switch`, `checkpoint`, `shard_map`) around an
interpreted body. All of this happens while JAX traces: nothing of it is left at run time.
"""

import copy
import functools
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from lora_jax.transform import _compat, rules
from lora_jax.transform.control_flow import (
  CONTROL_FLOW,
  Values,
  as_array,
  enter,
  fold,
  leave,
  with_origin,
)
from lora_jax.transform.deferred import Deferred, consume, evaluate, record
from lora_jax.transform.errors import Unsupported, UnsupportedOperation
from lora_jax.transform.factored import Factored
from lora_jax.transform.visits import NO_VISITS, Body, Mark, Visits

OpaqueRule = Callable[..., Any]


class Interpreter:
  """Evaluates jaxprs for one call of `apply` or one probe of `init`.

  Args:
    opaque: traced name of a function to its rule, `rule(call, *args)`: `call` is the function
      itself, to be applied to plain arrays; an adapted weight among `args` is a `Factored`.
    visits: marked values to replace, in the jaxpr that is evaluated.
  """

  def __init__(self, opaque: Mapping[str, OpaqueRule], visits: Visits = NO_VISITS):
    self.opaque = opaque
    self.visits = visits
    self._opaque_sources: dict[str, Any] = {}
    self._enclosing: list[Any] = []  # the equations whose bodies are being interpreted
    self._warned: set[str] = set()
    self.functions: dict[Any, tuple[Any, Callable[..., Any]]] = {}

  def evaluate(self, jaxpr: Any, args: Sequence[Any]) -> Values:
    """Returns the outputs of a whole function's jaxpr, all of them arrays.

    Raises:
      UnsupportedOperation: if a weight meets an operation that has no rule.
    """
    outputs = []
    for out in self.run(jaxpr, args):
      try:
        outputs.append(as_array(out, "returned by the function"))
      except Unsupported as error:
        if out.source.materialize:
          outputs.append(self._materialize(out, "return"))
          continue
        raise UnsupportedOperation(
          f"cannot adapt {out.source}: {error}. Leave it out of `target`, or give "
          "LoraRule(pattern, on_unhandled='materialize') for it"
        ) from error
    return outputs

  def run(self, jaxpr: Any, args: Sequence[Any]) -> Values:
    """Returns the outputs of a jaxpr; those that depend on a weight may be `Factored`."""
    plan = self.visits.plans.get(id(jaxpr), {})
    jaxpr, consts = _compat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    last_use = _last_uses(jaxpr)

    def read(atom: Any) -> Any:
      return atom.val if isinstance(atom, Literal) else env[atom]

    for number, equation in enumerate(jaxpr.eqns):
      values = [read(atom) for atom in equation.invars]
      with _compat.equation_context(equation):
        step = plan.get(number)
        if isinstance(step, Mark):
          outputs = _compat.bind(equation, [self.visits.at(step, as_array(values[0], "marked"))])
        elif step is not None:
          outputs = self._marked(step, number, equation, values)
        elif any(isinstance(value, Factored) for value in values):
          outputs = self._adapted(number, equation, values)
        elif equation.primitive.name == "convert_element_type" and _is_number(values[0]):
          outputs = [np.asarray(values[0], equation.params["new_dtype"])]  # a constant stays known
        else:
          outputs = _compat.bind(equation, values)
      env.update(zip(equation.outvars, outputs, strict=True))
      for variable in last_use[number]:
        env.pop(variable, None)
    return [read(atom) for atom in jaxpr.outvars]

  def _adapted(self, number: int, equation: Any, values: Values) -> Values:
    """Evaluates an equation with a factored operand."""
    name = equation.primitive.name
    try:
      rule = self._opaque_rule(equation)
      if rule is not None:
        outputs = self._apply_rule(rule, number, equation, values, {})
        _check_outputs(equation, outputs)
        return outputs
      if name in CONTROL_FLOW:
        return self._control_flow(number, equation, values)
      if name in (*rules.CONSUMERS, "mul", "div"):
        values = _evaluate_all_but_one(values)
      if name in rules.CONSUMERS:
        return self._apply_rule(rules.CONSUMERS[name], number, equation, values, equation.params)
      if name in rules.STRUCTURAL:
        return self._apply_rule(rules.STRUCTURAL[name], None, equation, values, equation.params)
      raise Unsupported("no rule for it")
    except Unsupported as error:
      try:
        return self._without_rule(equation, values, str(error))
      except Unsupported as other:  # a row that cannot be looked up either
        raise self._refusal(equation, values, str(other)) from other

  def _control_flow(self, number: int, equation: Any, values: Values) -> Values:
    """Emits an equation with inner jaxprs again."""
    inner = [enter(value, number, i) for i, value in enumerate(values)]
    self._enclosing.append(equation)
    try:
      outputs = CONTROL_FLOW[equation.primitive.name](self, equation, inner)
    finally:
      self._enclosing.pop()
    return [leave(out, values) for out in outputs]

  def _marked(self, body: Body, number: int, equation: Any, values: Values) -> Values:
    """Evaluates an equation with marks inside."""
    inner = self.with_visits(self.visits.inside(body))
    try:
      return inner._control_flow(number, equation, values)
    except Unsupported as error:
      marks = ", ".join(str(mark) for mark in self.visits.arrays)
      raise UnsupportedOperation(
        f"cannot replace {marks} inside {equation.primitive.name!r} at "
        f"{self._source_line(equation)}: {error}"
      ) from error

  def with_visits(self, visits: Visits) -> "Interpreter":
    """Returns an interpreter of jaxprs with other marks; its jitted functions are its own."""
    inner = copy.copy(self)
    inner.visits, inner.functions = visits, {}
    return inner

  def _apply_rule(self, rule, number, equation, values: Values, params) -> Values:
    def call(*arrays):
      if not any(isinstance(array, Deferred) for array in arrays):
        outputs = _compat.bind(equation, arrays)
      elif number is None:
        outputs = record(equation, arrays)
      else:
        outputs = consume(equation, arrays)
      return outputs[0] if len(outputs) == 1 else outputs

    operands = values if number is None else [fold(value, number) for value in values]
    outputs = rule(call, *operands, **params)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    return [_settled(out) for out in outputs]

  def _opaque_rule(self, equation: Any) -> OpaqueRule | None:
    name = _compat.traced_name(equation)
    if name is None or name not in self.opaque:
      return None
    source = _compat.traced_source(equation)
    if self._opaque_sources.setdefault(name, source) != source:
      raise ValueError(
        f"two functions are traced under the name {name!r} ({self._opaque_sources[name]} and "
        f"{source}), so that opaque={{{name!r}: ...}} is ambiguous; rename one of them"
      )
    return self.opaque[name]

  def _without_rule(self, equation: Any, values: Values, reason: str) -> Values:
    """Materializes activations, and weights where the user allows it; raises for any other."""
    name = equation.primitive.name
    values = list(values)
    for i, value in enumerate(values):
      if not isinstance(value, Factored):
        continue
      if value.lookup or value.is_rows:
        values[i] = value.look_up()
      elif value.is_plain:
        values[i] = value.base
      elif value.source.materialize:
        values[i] = self._materialize(value, name)
      else:
        raise self._refusal(equation, [value], reason)
    if any(isinstance(value, Deferred) for value in values):
      return consume(equation, values)
    return _compat.bind(equation, values)

  def _refusal(self, equation: Any, values: Values, reason: str) -> UnsupportedOperation:
    sources = [value.source for value in values if isinstance(value, Factored)]
    traced = _compat.traced_name(equation)
    hint = f", or opaque={{{traced!r}: rule}} if you know its rule" if traced else ""
    return UnsupportedOperation(
      f"cannot adapt {functools.reduce(operator.or_, sources)}: {equation.primitive.name!r} is "
      f"applied to it at {self._source_line(equation)}, and {reason}. Leave it out of `target`, "
      f"or give LoraRule(pattern, on_unhandled='materialize') for it{hint}"
    )

  def _source_line(self, equation: Any) -> str:
    """Returns the user's line behind an equation, or the line that called a library function."""
    lines = map(_compat.source_line, (equation, *reversed(self._enclosing)))
    return next(filter(None, lines), "an unknown line")

  def _materialize(self, value: Factored, name: str) -> jax.Array:
    if any(term.key is not None for term in value.terms):
      raise ValueError(
        f"{value.source}: LoRA dropout acts on the input of a layer, and {name!r}, for which it "
        "is materialized, has none. Give LoraRule(pattern, dropout=0.0) for it"
      )
    paths = str(value.source)
    if value.probing and paths not in self._warned:
      self._warned.add(paths)
      warnings.warn(
        f"{paths}: W + scaling * AB is materialized for {name!r} (on_unhandled='materialize')",
        stacklevel=2,
      )
    return value.materialize_by_permission()


def _evaluate_all_but_one(values: Values) -> Values:
  """Evaluates quantized weights that are not adapted, where a rule is for one weight only."""
  weights = [i for i, value in enumerate(values) if isinstance(value, Factored)]
  plain = [i for i in weights if values[i].is_plain]
  if len(plain) == len(weights):
    plain = plain[1:]
  return [
    evaluate(value.base) if i in plain and len(weights) > 1 else value
    for i, value in enumerate(values)
  ]


def _check_outputs(equation: Any, outputs: Values) -> None:
  """Raises ValueError if an opaque rule returned other arrays than its function."""
  expected = [(v.aval.shape, v.aval.dtype) for v in equation.outvars]
  actual = [(getattr(x, "shape", None), getattr(x, "dtype", type(x).__name__)) for x in outputs]
  if actual != expected:
    raise ValueError(
      f"opaque[{_compat.traced_name(equation)!r}] must return what its function returns, "
      f"{_described(expected)}; got {_described(actual)}"
    )


def _described(arrays: Sequence[tuple[Any, Any]]) -> str:
  return ", ".join(f"{dtype} of shape {shape}" for shape, dtype in arrays)


def _last_uses(jaxpr: Any) -> list[list[Any]]:
  """Returns for each equation the variables that no later equation reads."""
  seen = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
  last: list[list[Any]] = []
  for equation in reversed(jaxpr.eqns):
    atoms = [atom for atom in equation.invars if not isinstance(atom, Literal)]
    last_here = [atom for atom in dict.fromkeys((*atoms, *equation.outvars)) if atom not in seen]
    seen.update(last_here)
    last.append(last_here)
  return last[::-1]


def _is_number(value: Any) -> bool:
  """Tells a constant number, such as an operand of an inner jit."""
  return isinstance(value, np.ndarray) and value.ndim == 0


def _settled(out: Any) -> Any:
  """Returns the output of a rule as the next equations see it: rows are an array.

  Rows of float8 wait for the cast that follows, since A B would be lost in their rounding.
  """
  if isinstance(out, Factored) and out.is_rows and out.dtype.itemsize > 1:
    return out.look_up()
  return with_origin(out, None)
