"""Control flow around an interpreted body, emitted again with JAX's public functions.

Each `emit_*(interpreter, equation, values)` returns the outputs of one equation. `values` are
its operands, arrays and `Factored` ones; `interpreter.run(jaxpr, values)` evaluates a body.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.marks import CHUNKED_SUM, FLOAT32_DOT
from lora_jax.transform import _compat
from lora_jax.transform.deferred import Deferred, evaluate, unstacked
from lora_jax.transform.errors import Unsupported
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor, factor_spec, next_slice, stacked_arrays
from lora_jax.transform.formed import is_formed
from lora_jax.transform.rules.moving import sharding_constraint

Values = list[Any]


def emit_jit(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params
  values = _constrained(values, params["in_shardings"])
  constants = _constants(values)
  key = id(params["jaxpr"]), tuple((i, str(x), x.dtype) for i, x in constants.items())
  if key not in interpreter.functions:  # jit's own cache traces it once

    def function(*args):
      args = [constants.get(i, arg) for i, arg in enumerate(args)]
      return interpreter.run(params["jaxpr"], args)

    function.__name__ = function.__qualname__ = params["name"]
    jitted = jax.jit(function, inline=params["inline"])
    interpreter.functions[key] = params["jaxpr"], jitted  # the jaxpr is kept: ids are reused
  outputs = interpreter.functions[key][1](*values)
  return _constrained(outputs, params["out_shardings"])


def _constants(values: Values) -> dict[int, np.ndarray]:
  """Returns the constant numbers among an inner jit's operands, if a weight there has a gain.

  The value that `jnp.pad` pads with is one; a gain leaves zero as it is.
  """
  if not any(isinstance(value, Factored) and value.gain is not None for value in values):
    return {}
  numbers = {i: x for i, x in enumerate(values) if not isinstance(x, Factored | jax.Array)}
  return {i: np.asarray(x) for i, x in numbers.items() if np.ndim(x) == 0}


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
  first_slice = n_consts + n_carry
  consts, xs = values[:n_consts], values[first_slice:]
  carry = _Carry(jaxpr, n_consts, values[n_consts:first_slice])
  stacks = [_unstack(x) for x in xs]
  numbers = jnp.arange(params["length"]) if any(map(_has_key, values)) else None
  visits = interpreter.visits
  returned: dict[int, Factored] = {}  # weights that the body returns unchanged, by output

  def body(state: Values, slices: Any) -> tuple[Values, Values]:
    number, arrays, marked = slices
    inner = interpreter.with_visits(visits.of_slice(marked)) if marked else interpreter
    sliced = [rebuild(array) for (_, rebuild), array in zip(stacks, arrays, strict=True)]
    inputs = [fold(value, number) for value in (*consts, *carry.join(state), *sliced)]
    outputs = inner.run(params["jaxpr"], inputs)
    stacked = []
    for i, out in enumerate(outputs[n_carry:]):
      if _unchanged(out) and out.origin >= first_slice:
        returned[i] = values[out.origin]
        stacked.append(None)
      else:
        stacked.append(as_array(out, "stacked by a scan"))
    return carry.changed(outputs[:n_carry], "a scan"), stacked

  state, ys = lax.scan(
    body,
    carry.state,
    (numbers, [arrays for arrays, _ in stacks], visits.sliced_arrays()),
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
  )
  return [*carry.join(state), *(returned.get(i, y) for i, y in enumerate(ys))]


def emit_while(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params
  n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
  cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
  jaxpr, _ = _compat.open_jaxpr(params["body_jaxpr"])
  carry = _Carry(jaxpr, n_body, values[n_cond + n_body :])
  first = jnp.zeros((), jnp.int32) if any(map(_has_key, values)) else None

  def inputs(consts: Values, state: Any) -> Values:
    number, changing = state
    return [fold(value, number) for value in (*consts, *carry.join(changing))]

  def cond(state: Any) -> Any:
    (out,) = interpreter.run(params["cond_jaxpr"], inputs(cond_consts, state))
    return out

  def body(state: Any) -> Any:
    outputs = interpreter.run(params["body_jaxpr"], inputs(body_consts, state))
    number = None if state[0] is None else state[0] + 1
    return number, carry.changed(outputs, "a while loop")

  _, state = lax.while_loop(cond, body, (first, carry.state))
  return carry.join(state)


class _Carry:
  """The carry of a loop, split into weights that its body returns unchanged and the rest.

  Such a weight (parameters in a loop's state) is a constant, and stays factored.

  Args:
    jaxpr: the body.
    n_consts: the number of the body's inputs before the carry.
    values: the initial carry.
  """

  def __init__(self, jaxpr: Any, n_consts: int, values: Values):
    inputs = jaxpr.invars[n_consts : n_consts + len(values)]
    self._constant = {
      i: value
      for i, (value, variable) in enumerate(zip(values, inputs, strict=True))
      if isinstance(value, Factored) and jaxpr.outvars[i] is variable
    }
    self.state = self.changed(values, "a loop")

  def changed(self, values: Values, loop: str) -> Values:
    """Returns the carried values that change, as arrays."""
    changing = [value for i, value in enumerate(values) if i not in self._constant]
    return [as_array(value, f"carried and changed by {loop}") for value in changing]

  def join(self, state: Values) -> Values:
    """Returns the whole carry, from the values that change."""
    changing = iter(state)
    size = len(self._constant) + len(state)
    return [self._constant[i] if i in self._constant else next(changing) for i in range(size)]


def emit_switch(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params
  if params.get("branches_platforms") is not None:
    raise Unsupported("a choice by platform cannot be emitted again")

  origins: list[dict[int, int]] = []

  def branch(jaxpr):
    def function(*args):
      outputs = interpreter.run(jaxpr, args)
      origins.append({j: o.origin for j, o in enumerate(outputs) if _unchanged(o)})
      return [None if _unchanged(out) else as_array(out, "made by a branch") for out in outputs]

    return function

  index, *operands = values
  branches = [branch(jaxpr) for jaxpr in params["branches"]]
  outputs = []
  try:
    outputs = lax.switch(index, branches, *operands)
  except TypeError:  # branches that return different weights have different trees
    if all(weights == origins[0] for weights in origins):
      raise
  if any(weights != origins[0] for weights in origins):
    raise Unsupported("its branches return different weights")
  return [values[origins[0][j]] if j in origins[0] else out for j, out in enumerate(outputs)]


def emit_shard_map(interpreter: Any, equation: Any, values: Values) -> Any:
  params = equation.params
  if any(map(_has_key, values)):
    sources = " and ".join(str(value.source) for value in values if _has_key(value))
    raise ValueError(
      f"{sources}: LoRA dropout inside shard_map would drop the same elements on every shard. "
      "Give LoraRule(pattern, dropout=0.0) for it"
    )

  def function(*args):
    outputs = interpreter.run(params["jaxpr"], args)
    return tuple(as_array(out, "returned by a shard_map") for out in outputs)

  values = list(map(_splittable, values, params["in_specs"]))

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
  """Returns an operand as an input of the body."""
  return with_origin(fold(value, number), position)


def leave(out: Any, operands: Sequence[Any]) -> Any:
  """Returns an output of a body as an output of the equation.

  A weight returned unchanged (NNX returns a module's parameters from every call) is the operand
  itself. A view has the source of the cached function's first caller; if there is a single
  weight, it gets the source of that one.
  """
  if not isinstance(out, Factored):
    return out
  if out.origin is not None:
    return operands[out.origin]
  weights = [value for value in operands if isinstance(value, Factored)]
  return dataclasses.replace(out, source=weights[0].source) if len(weights) == 1 else out


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> Values:
  """Applies an inner jit's explicit shardings as constraints."""

  def constrain(value, sharding):
    if not isinstance(sharding, jax.sharding.Sharding):
      return value
    if not isinstance(value, Factored):
      return lax.with_sharding_constraint(value, sharding)

    def call(array):
      return lax.with_sharding_constraint(array, sharding)

    return sharding_constraint(call, value, sharding=sharding)

  return [constrain(v, s) for v, s in zip(values, shardings, strict=True)]


def as_array(value: Any, use: str) -> Any:
  """Returns a lookup as an array; raises for a view of a weight."""
  if not isinstance(value, Factored):
    return value
  if value.lookup or value.is_rows:
    return value.look_up()
  if value.is_plain:
    return evaluate(value.base)
  raise Unsupported(f"a view of the weight is {use}")


def _unstack(x: Any) -> tuple[Any, Callable[[Any], Any]]:
  """Returns the arrays that `scan` slices for `x`, and a function from a slice to its value."""
  if not isinstance(x, Factored):
    return x, lambda slice_: slice_
  factors: list[Factor] = []
  x.map_factors(lambda factor: factors.append(factor) or factor)
  base, rebuild_base = unstacked(x.base)

  def rebuild(slice_: Any) -> Factored:
    base, slices = slice_
    arrays: Iterator[Any] = iter(slices)
    lookup = tuple(d - 1 for d in x.lookup if d != 0)
    layer = x.map_factors(lambda factor: next_slice(factor, arrays))
    return dataclasses.replace(layer, base=rebuild_base(base), lookup=lookup)

  return (base, stacked_arrays(factors)), rebuild


def _splittable(value: Any, spec: Any) -> Any:
  """Evaluates a base whose arrays cannot be split like the weight itself."""
  base = value.base if isinstance(value, Factored) else None
  if not isinstance(base, Deferred):
    return value
  leaf, split = base.pointwise_leaf, [dim for dim, names in enumerate(spec) if names]
  if leaf is None or (is_formed(leaf) and not set(split) <= set(leaf.dims)):
    return value.rebase(evaluate(base))
  return value


def emit_custom_vjp(interpreter: Any, equation: Any, values: Values) -> Values:
  """Emits the body of a function of `marks`; no other function's derivative may be replaced."""
  if _compat.traced_name(equation) not in (CHUNKED_SUM, FLOAT32_DOT):
    raise Unsupported("no rule for it")
  return interpreter.run(equation.params["call_jaxpr"], values)


def _factored_spec(value: Any, spec: Any) -> Any:
  """Returns a value's shard_map spec: a factor's axes are split like the weight's dimensions."""
  if not isinstance(value, Factored):
    return spec
  replicated = jax.tree.map(lambda _: PartitionSpec(), value)

  def spec_of(factor: Factor) -> Factor:
    return dataclasses.replace(factor, array=factor_spec(factor.labels, spec))

  leaf = value.base.pointwise_leaf if isinstance(value.base, Deferred) else None
  base = spec if leaf is None else value.base.with_leaf(leaf.shardings(spec))
  return dataclasses.replace(replicated.map_factors(spec_of), base=base)


CONTROL_FLOW: Mapping[str, Callable[[Any, Any, Values], Any]] = {
  "jit": emit_jit,
  "pjit": emit_jit,
  "checkpoint": emit_checkpoint,
  "remat2": emit_checkpoint,
  "scan": emit_scan,
  "while": emit_while,
  "cond": emit_switch,
  "shard_map": emit_shard_map,
  "custom_vjp_call": emit_custom_vjp,
}
