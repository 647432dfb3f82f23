"""Differences between JAX versions, in one place.

`jax.extend` may change in any release. Everything here uses `jax` and `jax.extend.core`, and
nothing of `jax._src`. Tested on the oldest and the newest supported JAX.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.extend.core as jex
from jax.extend import source_info_util


def bind(equation: jex.JaxprEqn, values: Sequence[Any]) -> list[Any]:
  """Evaluates one equation on arrays, unchanged; returns the list of its outputs."""
  params: Any = equation.primitive.get_bind_params(equation.params)
  functions: Sequence[Any] = ()
  if isinstance(params, tuple):  # before JAX 0.10
    functions, params = params
  outputs = equation.primitive.bind(*functions, *values, **params)
  return list(outputs) if equation.primitive.multiple_results else [outputs]


@contextlib.contextmanager
def equation_context(equation: jex.JaxprEqn) -> Iterator[None]:
  """Gives operations traced inside the equation's name stack, source line and settings."""
  info = equation.source_info
  name_stack = source_info_util.current_name_stack() + info.name_stack
  with (
    source_info_util.user_context(info.traceback, name_stack=name_stack),
    equation.ctx.manager,
  ):
    yield


def source_line(equation: jex.JaxprEqn) -> str:
  """Returns `file:line:column (function)` of the user's line behind an equation."""
  return source_info_util.summarize(equation.source_info)


def open_jaxpr(jaxpr: Any) -> tuple[jex.Jaxpr, Sequence[Any]]:
  """Returns the open jaxpr and the constants of a closed or open one.

  Since JAX 0.12 both are one class that holds its constants.
  """
  consts = getattr(jaxpr, "consts", ())
  return getattr(jaxpr, "jaxpr", jaxpr), consts


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
  """Returns how many inputs of a `scan` are constants and how many are carried."""
  if "num_consts" in params:
    return params["num_consts"], params["num_carry"]
  consts, carry, _ = params["ft_in"].unpack()  # since JAX 0.11
  return len(list(consts)), len(list(carry))


def traced_name(equation: jex.JaxprEqn) -> str | None:
  """Returns the name of the function that an equation calls, or None."""
  params = equation.params
  if "jaxpr" in params:  # jit, pallas_call
    return params.get("name")
  if "call_jaxpr" in params:  # custom_jvp, custom_vjp
    return open_jaxpr(params["call_jaxpr"])[0].debug_info.func_name
  return params.get("target_name")  # ffi_call


def traced_source(equation: jex.JaxprEqn) -> Any:
  """Returns the place where a called function was written; two of one name differ in it."""
  for key in ("call_jaxpr", "jaxpr"):
    if key in equation.params:
      return open_jaxpr(equation.params[key])[0].debug_info.func_src_info
  return None
