"""Control flow around an interpreted body, emitted again with JAX's public functions.

Each `emit_*(interpreter, equation, values)` returns the outputs of one equation. `values` are
its operands, arrays and `Factored` ones; `interpreter.run(jaxpr, values)` evaluates a body.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.transform import _compat
from lora_jax.transform.factored import RANK, Factor, Factored, Unsupported
from lora_jax.transform.rules.moving import factor_spec, sharding_constraint

Values = list[Any]


def emit_jit(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params
  values = _constrained(values, params["in_shardings"])
  key = id(params["jaxpr"])
  if key not in interpreter.functions:  # met again, it is traced once by jit's own cache

    def function(*args):
      return interpreter.run(params["jaxpr"], args)

    function.__name__ = function.__qualname__ = params["name"]
    jitted = jax.jit(function, inline=params["inline"])
    interpreter.functions[key] = params["jaxpr"], jitted  # the jaxpr is kept: ids are reused
  outputs = interpreter.functions[key][1](*values)
  return _constrained(outputs, params["out_shardings"])


def emit_checkpoint(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params

  def function(*args):
    return interpreter.run(params["jaxpr"], args)

  options = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
  return jax.checkpoint(function, **options)(*values)


def emit_scan(interpreter: Any, equation: Any, values: Values) -> Any:
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
    outputs = interpreter.run(params["jaxpr"], [fold(args[i], number) for i in range(len(args))])
    carried = [form(outputs[i - n_consts], "changed and carried by a scan") for i in changing]
    return carried, [handed_on(j, out) for j, out in enumerate(outputs[n_carry:])]

  operands: dict[int, Factored] = {}  # weights that the body hands on, slice by slice

  def handed_on(j, out):
    if _unchanged(out) and out.origin >= n_consts + n_carry:
      operands[j] = values[out.origin]
      return None
    return form(out, "stacked by a scan")

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


def emit_while(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params
  n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
  cond_consts, rest = values[:n_cond], values[n_cond:]
  jaxpr, _ = _compat.open_jaxpr(params["body_jaxpr"])
  fixed, changing = _loop_constants(jaxpr, n_body, range(n_body, len(rest)), rest)
  counting = any(map(_has_key, values))

  def arguments(state):
    number, carry = state
    args = dict(zip(changing, carry, strict=True)) | fixed
    return [fold(args[i], number) for i in range(len(args))]

  def cond(state):
    consts = [fold(value, state[0]) for value in cond_consts]
    (out,) = interpreter.run(params["cond_jaxpr"], consts + arguments(state)[n_body:])
    return out

  def body(state):
    outputs = interpreter.run(params["body_jaxpr"], arguments(state))
    carried = [form(outputs[i - n_body], "carried by a while loop") for i in changing]
    return None if state[0] is None else state[0] + 1, carried

  start = jnp.zeros((), jnp.int32) if counting else None
  _, carried = lax.while_loop(cond, body, (start, [rest[i] for i in changing]))
  outputs = dict(zip(changing, carried, strict=True)) | fixed
  return [outputs[i] for i in range(n_body, len(rest))]


def emit_switch(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params
  if params.get("branches_platforms") is not None:
    raise Unsupported("a choice by platform cannot be emitted again")

  origins: list[dict[int, int]] = []

  def branch(jaxpr):
    def function(*args):
      outputs = interpreter.run(jaxpr, args)
      origins.append({j: o.origin for j, o in enumerate(outputs) if _unchanged(o)})
      return [None if _unchanged(out) else form(out, "made by a branch") for out in outputs]

    return function

  index, *operands = values
  branches = [branch(jaxpr) for jaxpr in params["branches"]]
  outputs = []
  try:
    outputs = lax.switch(index, branches, *operands)
  except TypeError:  # branches that hand on different weights differ in their trees
    if all(handed == origins[0] for handed in origins):
      raise
  if any(handed != origins[0] for handed in origins):
    raise Unsupported("its branches return different weights")
  return [values[origins[0][j]] if j in origins[0] else out for j, out in enumerate(outputs)]


def emit_shard_map(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params
  if any(map(_has_key, values)):
    raise ValueError(
      "LoRA dropout inside shard_map would drop the same elements on every shard; "
      "set dropout=0.0 in a LoraRule for the weights used there"
    )

  def function(*args):
    outputs = interpreter.run(params["jaxpr"], args)
    return tuple(form(out, "returned by a shard_map") for out in outputs)

  return jax.shard_map(
    function,
    mesh=params["mesh"],
    in_specs=tuple(map(_factored_spec, values, params["in_specs"])),
    out_specs=tuple(params["out_specs"]),
    axis_names=params["newly_manual_axes"],
    check_vma=params["check_vma"],
  )(*values)


def fold(value: Any, number: Any) -> Any:
  return value.fold(number) if isinstance(value, Factored) and number is not None else value


def _unchanged(value: Any) -> bool:
  return isinstance(value, Factored) and value.origin is not None


def _has_key(value: Any) -> bool:
  return isinstance(value, Factored) and any(term.key is not None for term in value.terms)


def with_origin(value: Any, origin: int | None) -> Any:
  return dataclasses.replace(value, origin=origin) if isinstance(value, Factored) else value


def enter(value: Any, number: int, position: int) -> Any:
  """Returns an operand as the body of control flow sees it."""
  return with_origin(fold(value, number), position)


def leave(out: Any, operands: Sequence[Any]) -> Any:
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

    return sharding_constraint(call, value, sharding=sharding)

  return [constrain(v, s) for v, s in zip(values, shardings, strict=True)]


def form(value: Any, what: str) -> Any:
  """Returns a lookup as an array; a weight cannot leave by this way."""
  if not isinstance(value, Factored):
    return value
  if value.lookup or value.is_rows:
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
    values[i] = form(values[i], "carried and changed by a loop")
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

  def spec_of(factor):
    return dataclasses.replace(factor, array=factor_spec(factor.labels, spec))

  labels = value.map_factors(spec_of)
  terms = tuple(
    dataclasses.replace(term, factors=labelled.factors)
    for term, labelled in zip(replicated.terms, labels.terms, strict=True)
  )
  return dataclasses.replace(replicated, base=spec, terms=terms)


CONTROL_FLOW: Mapping[str, Callable[[Any, Any, Values], Any]] = {
  "jit": emit_jit,
  "pjit": emit_jit,
  "checkpoint": emit_checkpoint,
  "remat2": emit_checkpoint,
  "scan": emit_scan,
  "while": emit_while,
  "cond": emit_switch,
  "shard_map": emit_shard_map,
}
