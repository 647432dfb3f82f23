"""Walks a jaxpr with factored weights among its values.

An equation that touches no factored weight goes through unchanged, custom derivatives
included. One that does is handed to its rule. Control flow is emitted again with JAX's
public functions (`jit`, `scan`, `while_loop`, `switch`, `checkpoint`, `shard_map`) around
an interpreted body. All of this happens while JAX traces: nothing of it is left at run time.
"""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from lora_jax import _compat, rules
from lora_jax.factored import RANK, Factor, Factored, Unsupported

OpaqueRule = Callable[..., Any]
Values = list[Any]


class UnsupportedOperation(NotImplementedError):
  """An operation that cannot be pushed through a factored weight."""


class Interpreter:
  """Evaluates jaxprs for one call of `apply` or one probe of `init`.

  Args:
    opaque: traced name of a function to its rule, `rule(call, *args)`: `call` is the function
      itself, to be applied to plain arrays; an adapted weight among `args` is a `Factored`.
    materialize: the paths whose weights may be formed where an operation has no rule.
  """

  def __init__(self, opaque: Mapping[str, OpaqueRule], materialize: Collection[str]):
    self.opaque = opaque
    self.materialize = materialize
    self._opaque_sources: dict[str, Any] = {}
    self._enclosing: list[Any] = []  # the equations whose bodies are being interpreted
    self._warned: set[str] = set()
    self._functions: dict[int, tuple[Any, Callable[..., Any]]] = {}
    self._control_flow: dict[str, Callable[[Any, Values], Any]] = {
      "jit": self._jit,
      "pjit": self._jit,
      "checkpoint": self._checkpoint,
      "remat2": self._checkpoint,
      "scan": self._scan,
      "while": self._while,
      "cond": self._switch,
      "shard_map": self._shard_map,
    }

  def evaluate(self, jaxpr: Any, args: Sequence[Any]) -> Values:
    """Returns the outputs of a whole function's jaxpr, arrays all.

    Raises:
      UnsupportedOperation: if a weight meets an operation it cannot be pushed through.
    """
    outputs = []
    for out in self.run(jaxpr, args):
      try:
        outputs.append(_formed(out, "returned by the function"))
      except Unsupported as error:
        raise UnsupportedOperation(
          f"cannot adapt {' and '.join(out.paths)} by LoRA: {error}. Return it from outside "
          "the adapted function, or leave it out of `target`"
        ) from error
    return outputs

  def run(self, jaxpr: Any, args: Sequence[Any]) -> Values:
    """Returns the outputs of a jaxpr; those that depend on a weight may be `Factored`."""
    jaxpr, consts = _compat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    last_use = _last_uses(jaxpr)

    def read(atom: Any) -> Any:
      return atom.val if isinstance(atom, Literal) else env[atom]

    for number, equation in enumerate(jaxpr.eqns):
      values = [read(atom) for atom in equation.invars]
      with _compat.equation_context(equation):
        if any(isinstance(value, Factored) for value in values):
          outputs = self._adapted(number, equation, values)
          for atom, value in zip(equation.invars, values, strict=True):
            if not isinstance(atom, Literal) and _is_lookup(env[atom]):
              env[atom] = value  # once formed, it is not formed again
        else:
          outputs = _compat.bind(equation, values)
      env.update(zip(equation.outvars, outputs, strict=True))
      for variable in last_use[number]:
        env.pop(variable, None)
    return [read(atom) for atom in jaxpr.outvars]

  def _adapted(self, number: int, equation: Any, values: Values) -> Values:
    """Evaluates an equation with a factored operand. `values` is updated in place."""
    name = equation.primitive.name
    try:
      rule = self._opaque_rule(equation)
      if rule is not None:
        return self._apply_rule(rule, number, equation, values, {})
      if name in self._control_flow:
        inner = [_entered(value, number, i) for i, value in enumerate(values)]
        self._enclosing.append(equation)
        try:
          outputs = self._control_flow[name](equation, inner)
        finally:
          self._enclosing.pop()
        return [_left(out, values) for out in outputs]
      if name in rules.CONSUMERS:
        return self._apply_rule(rules.CONSUMERS[name], number, equation, values, equation.params)
      if name in rules.STRUCTURAL:
        return self._apply_rule(rules.STRUCTURAL[name], None, equation, values, equation.params)
      raise Unsupported("no rule for it")
    except Unsupported as error:
      return self._without_rule(equation, values, str(error))

  def _apply_rule(self, rule, number, equation, values: Values, params) -> Values:
    def call(*arrays):
      outputs = _compat.bind(equation, arrays)
      return outputs[0] if len(outputs) == 1 else outputs

    operands = values if number is None else [_fold(value, number) for value in values]
    outputs = rule(call, *operands, **params)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    return [_with_origin(out, None) for out in outputs]

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
    """Forms lookups, and weights where the user allows it; raises for any other."""
    name = equation.primitive.name
    for i, value in enumerate(values):
      if not isinstance(value, Factored):
        continue
      if value.lookup:
        values[i] = value.look_up()
      elif set(value.paths) <= set(self.materialize):
        values[i] = self._materialize(value, name)
      else:
        traced = _compat.traced_name(equation)
        hint = f", or opaque={{{traced!r}: rule}} if you know its rule" if traced else ""
        raise UnsupportedOperation(
          f"cannot adapt {' and '.join(value.paths)} by LoRA: {name!r} is applied to it at "
          f"{self._source_line(equation)}, and {reason}. Leave it out of `target`, or give "
          f"LoraRule(pattern, on_unhandled='materialize') for it{hint}"
        )
    if any(isinstance(value, Factored) for value in values):
      raise AssertionError("every factored value was formed above")
    return _compat.bind(equation, values)

  def _source_line(self, equation: Any) -> str:
    """Returns the user's line behind an equation; for a library's inner function, the call's."""
    lines = map(_compat.source_line, (equation, *reversed(self._enclosing)))
    return next(filter(None, lines), "an unknown line")

  def _materialize(self, value: Factored, name: str) -> jax.Array:
    if any(term.key is not None for term in value.terms):
      raise ValueError(
        f"{' and '.join(value.paths)}: LoRA dropout acts on the input of a product, and "
        f"{name!r} has none. Set dropout=0.0 for it in a LoraRule"
      )
    paths = " and ".join(value.paths)
    if value.probing and paths not in self._warned:
      self._warned.add(paths)
      warnings.warn(
        f"{paths}: W + scaling * AB is formed for {name!r} (on_unhandled='materialize')",
        stacklevel=2,
      )
    return value.materialize()

  # ---- control flow, emitted again -----------------------------------------------------

  def _jit(self, equation: Any, values: Values) -> Any:
    params = equation.params
    values = _constrained(values, params["in_shardings"])
    key = id(params["jaxpr"])
    if key not in self._functions:  # met again, it is traced once by jit's own cache

      def function(*args):
        return self.run(params["jaxpr"], args)

      function.__name__ = function.__qualname__ = params["name"]
      jitted = jax.jit(function, inline=params["inline"])
      self._functions[key] = params["jaxpr"], jitted  # the jaxpr is kept: ids are reused
    outputs = self._functions[key][1](*values)
    return _constrained(outputs, params["out_shardings"])

  def _checkpoint(self, equation: Any, values: Values) -> Any:
    params = equation.params

    def function(*args):
      return self.run(params["jaxpr"], args)

    options = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
    return jax.checkpoint(function, **options)(*values)

  def _scan(self, equation: Any, values: Values) -> Any:
    params = equation.params
    jaxpr, _ = _compat.open_jaxpr(params["jaxpr"])
    n_consts, n_carry = _compat.scan_counts(params)
    fixed, changing = _loop_constants(jaxpr, n_consts, range(n_consts, n_consts + n_carry), values)
    xs = values[n_consts + n_carry :]
    number = jnp.arange(params["length"]) if any(map(_has_key, values)) else None
    stacks = [_unstack(x) for x in xs]

    def body(carry, slices):
      number, arrays = slices
      args = dict(zip(changing, carry, strict=True)) | fixed
      args |= {
        n_consts + n_carry + i: rebuild(array)
        for i, ((_, rebuild), array) in enumerate(zip(stacks, arrays, strict=True))
      }
      outputs = self.run(params["jaxpr"], [_fold(args[i], number) for i in range(len(args))])
      carried = [_formed(outputs[i - n_consts], "changed and carried by a scan") for i in changing]
      return carried, [handed_on(j, out) for j, out in enumerate(outputs[n_carry:])]

    operands: dict[int, Factored] = {}  # weights that the body hands on, slice by slice

    def handed_on(j, out):
      if _unchanged(out) and out.origin >= n_consts + n_carry:
        operands[j] = values[out.origin]
        return None
      return _formed(out, "stacked by a scan")

    carried, ys = lax.scan(
      body,
      [values[i] for i in changing],
      (number, [arrays for arrays, _ in stacks]),
      length=params["length"],
      reverse=params["reverse"],
      unroll=params["unroll"],
    )
    outputs = dict(zip(changing, carried, strict=True)) | fixed
    stacked = [operands.get(j, y) for j, y in enumerate(ys)]
    return [outputs[i] for i in range(n_consts, n_consts + n_carry)] + stacked

  def _while(self, equation: Any, values: Values) -> Any:
    params = equation.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, rest = values[:n_cond], values[n_cond:]
    jaxpr, _ = _compat.open_jaxpr(params["body_jaxpr"])
    fixed, changing = _loop_constants(jaxpr, n_body, range(n_body, len(rest)), rest)
    counting = any(map(_has_key, values))

    def arguments(state):
      number, carry = state
      args = dict(zip(changing, carry, strict=True)) | fixed
      return [_fold(args[i], number) for i in range(len(args))]

    def cond(state):
      consts = [_fold(value, state[0]) for value in cond_consts]
      (out,) = self.run(params["cond_jaxpr"], consts + arguments(state)[n_body:])
      return out

    def body(state):
      outputs = self.run(params["body_jaxpr"], arguments(state))
      carried = [_formed(outputs[i - n_body], "carried by a while loop") for i in changing]
      return None if state[0] is None else state[0] + 1, carried

    start = jnp.zeros((), jnp.int32) if counting else None
    _, carried = lax.while_loop(cond, body, (start, [rest[i] for i in changing]))
    outputs = dict(zip(changing, carried, strict=True)) | fixed
    return [outputs[i] for i in range(n_body, len(rest))]

  def _switch(self, equation: Any, values: Values) -> Any:
    params = equation.params
    if params.get("branches_platforms") is not None:
      raise Unsupported("a choice by platform cannot be emitted again")

    origins: list[dict[int, int]] = []

    def branch(jaxpr):
      def function(*args):
        outputs = self.run(jaxpr, args)
        origins.append({j: o.origin for j, o in enumerate(outputs) if _unchanged(o)})
        return [None if _unchanged(out) else _formed(out, "made by a branch") for out in outputs]

      return function

    index, *operands = values
    branches = [branch(jaxpr) for jaxpr in params["branches"]]
    try:
      outputs = lax.switch(index, branches, *operands)
    except TypeError as error:
      if any(handed != origins[0] for handed in origins):
        raise Unsupported("its branches return different weights") from error
      raise
    if any(handed != origins[0] for handed in origins):
      raise Unsupported("its branches return different weights")
    return [values[origins[0][j]] if j in origins[0] else out for j, out in enumerate(outputs)]

  def _shard_map(self, equation: Any, values: Values) -> Any:
    params = equation.params
    if any(map(_has_key, values)):
      raise ValueError(
        "LoRA dropout inside shard_map would drop the same elements on every shard; "
        "set dropout=0.0 in a LoraRule for the weights used there"
      )

    def function(*args):
      outputs = self.run(params["jaxpr"], args)
      return tuple(_formed(out, "returned by a shard_map") for out in outputs)

    return jax.shard_map(
      function,
      mesh=params["mesh"],
      in_specs=tuple(map(_factored_spec, values, params["in_specs"])),
      out_specs=tuple(params["out_specs"]),
      axis_names=params["newly_manual_axes"],
      check_vma=params["check_vma"],
    )(*values)


def _last_uses(jaxpr: Any) -> list[list[Any]]:
  """Returns, for each equation, the variables that no later one reads."""
  seen = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
  last: list[list[Any]] = []
  for equation in reversed(jaxpr.eqns):
    atoms = [atom for atom in equation.invars if not isinstance(atom, Literal)]
    mine = [atom for atom in dict.fromkeys((*atoms, *equation.outvars)) if atom not in seen]
    seen.update(mine)
    last.append(mine)
  return last[::-1]


def _fold(value: Any, number: Any) -> Any:
  return value.fold(number) if isinstance(value, Factored) and number is not None else value


def _is_lookup(value: Any) -> bool:
  return isinstance(value, Factored) and bool(value.lookup)


def _unchanged(value: Any) -> bool:
  return isinstance(value, Factored) and value.origin is not None


def _has_key(value: Any) -> bool:
  return isinstance(value, Factored) and any(term.key is not None for term in value.terms)


def _with_origin(value: Any, origin: int | None) -> Any:
  return dataclasses.replace(value, origin=origin) if isinstance(value, Factored) else value


def _entered(value: Any, number: int, position: int) -> Any:
  """Returns an operand as the body of control flow sees it."""
  return _with_origin(_fold(value, number), position)


def _left(out: Any, operands: Sequence[Any]) -> Any:
  """Returns an output of control flow as the caller sees it.

  A weight handed on unchanged (NNX returns a module's parameters from every call) is the
  operand itself. A view has the labels of the function's first caller, whom the cached
  function was traced for; where there is one weight it gets its own.
  """
  if not isinstance(out, Factored):
    return out
  if out.origin is not None:
    return operands[out.origin]
  weights = [value for value in operands if isinstance(value, Factored)]
  if len(weights) != 1 or len(weights[0].terms) != 1:
    return out
  label = weights[0].terms[0].label
  terms = tuple(dataclasses.replace(term, label=label) for term in out.terms)
  return dataclasses.replace(out, terms=terms)


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> Values:
  """Applies an inner jit's explicit shardings, which are given per array, as constraints."""

  def constrain(value, sharding):
    if not isinstance(sharding, jax.sharding.Sharding):
      return value
    if not isinstance(value, Factored):
      return lax.with_sharding_constraint(value, sharding)

    def call(array):
      return lax.with_sharding_constraint(array, sharding)

    return rules.sharding_constraint(call, value, sharding=sharding)

  return [constrain(v, s) for v, s in zip(values, shardings, strict=True)]


def _formed(value: Any, what: str) -> Any:
  """Returns a lookup as an array; a weight cannot leave by this way."""
  if not isinstance(value, Factored):
    return value
  if value.lookup:
    return value.look_up()
  raise Unsupported(f"a view of the weight is {what}")


def _loop_constants(jaxpr, n_consts: int, carry: range, values: Values):
  """Splits a loop's inputs: those that never change, and the indices of the carried others.

  A carry that the body hands on as it came (parameters in a loop's state) is a constant; only
  as such can it be a factored weight.
  """

  def unchanged(i):
    return isinstance(values[i], Factored) and jaxpr.outvars[i - n_consts] is jaxpr.invars[i]

  changing = [i for i in carry if not unchanged(i)]
  for i in changing:
    values[i] = _formed(values[i], "carried and changed by a loop")
  fixed = {i: values[i] for i in range(carry.stop) if i not in changing}
  return fixed, changing


def _unstack(x: Any) -> tuple[Any, Callable[[Any], Any]]:
  """Returns the arrays that `scan` is to slice for `x`, and what makes a value of a slice."""
  if not isinstance(x, Factored):
    return x, lambda slice_: slice_
  factors = [factor for term in x.terms for factor in term.factors]
  stacked = {i: jnp.moveaxis(f.array, f.axis(0), 0) for i, f in enumerate(factors) if 0 in f.dims}

  def rebuild(slice_):
    base, slices = slice_
    position = iter(range(len(factors)))

    def sliced(factor):
      i = next(position)
      array = slices.get(i, factor.array)
      labels = tuple(RANK if d == RANK else d - 1 for d in factor.labels if d != 0)
      return Factor(array, labels)

    lookup = tuple(d - 1 for d in x.lookup if d != 0)
    return dataclasses.replace(x.map_factors(sliced), base=base, lookup=lookup)

  return (x.base, stacked), rebuild


def _factored_spec(value: Any, spec: Any) -> Any:
  """Returns a value's shard_map spec: a factor's axes are split as the weight's dimensions."""
  if not isinstance(value, Factored):
    return spec
  replicated = jax.tree.map(lambda _: PartitionSpec(), value)

  def factor_spec(factor):
    return dataclasses.replace(factor, array=rules.factor_spec(factor.labels, spec))

  labels = value.map_factors(factor_spec)
  terms = tuple(
    dataclasses.replace(term, factors=labelled.factors)
    for term, labelled in zip(replicated.terms, labels.terms, strict=True)
  )
  return dataclasses.replace(replicated, base=spec, terms=terms)
