"""Flax NNX models as plain functions of their parameters."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.extend.core import Literal
from jaxtyping import PyTree

from lora_jax.transform import _compat
from lora_jax.transform.tracing import trace_call
from lora_jax.trees import leaves_with_path


def functional(model: Any) -> tuple[Callable[..., Any], PyTree]:
  """Returns `(fn, params)` of a Flax NNX model: `fn(params, *args, **kwargs)` is its call.

  `params` is a nested dict of its `nnx.Param`s. Its other state (BatchNorm statistics, the
  counters of random streams) is held fixed: put the model in the mode that the function
  should have first, `model.eval()` or `model.train()`. Values that the call sows as
  `nnx.Intermediate`, or perturbs, are dropped.

  >>> from flax import nnx
  >>> fn, params = functional(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
  >>> jax.tree.map(lambda leaf: leaf.shape, params)
  {'bias': (3,), 'kernel': (4, 3)}

  Raises:
    ValueError: if `model` is not an NNX module, or a call of `fn` changes its other state, which
      would be lost.
  """
  from flax import nnx

  if not isinstance(model, nnx.Module):
    raise ValueError(
      f"functional takes a Flax NNX model, got {type(model).__name__}. A Linen model is a "
      "function already: lambda params, *args: model.apply({'params': params}, *args)"
    )
  graph, template, fixed = nnx.split(model, nnx.Param, ...)
  kept = nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate))

  def call(params: PyTree, other: PyTree, args: Any, kwargs: Any) -> tuple[Any, Mapping[str, Any]]:
    """Returns the model's output and, by path, the variables that it should not have changed."""
    state = jax.tree.map(lambda leaf: leaf, template)  # new variables: calls set them in place
    nnx.replace_by_pure_dict(state, params)
    called = nnx.merge(graph, state, jax.tree.map(lambda leaf: leaf, other))
    out = called(*args, **kwargs)
    after = nnx.to_flat_state(nnx.state(called, kept))
    return out, {"/".join(map(str, keys)): variable for keys, variable in after}

  def fn(params: PyTree, *args: Any, **kwargs: Any) -> Any:
    out, after = call(params, fixed, args, kwargs)
    before = dict(leaves_with_path(fixed))
    suspects = [
      path
      for path, variable in after.items()
      if any(leaf is not before.get(name) for name, leaf in _leaves(path, variable))
    ]
    if suspects:  # or they are the same after a jit or a loop

      def state_after(other: PyTree) -> list[list[Any]]:
        _, after = call(params, other, args, kwargs)
        return [[leaf for _, leaf in _leaves(path, after[path])] for path in suspects]

      traced = trace_call(state_after, fixed, (), {})
      names = [name for path in suspects for name, _ in _leaves(path, after[path])]
      origins = dict(zip(names, _origins(traced.jaxpr), strict=True))
      unchanged = {name for name, i in traced.position.items() if origins.get(name) == i}
      changed = {
        path: after[path]
        for path in suspects
        if any(name not in unchanged for name, _ in _leaves(path, after[path]))
      }
      if changed:
        raise ValueError(_message(changed))
    return out

  return fn, nnx.to_pure_dict(template)


def _leaves(path: str, variable: Any) -> list[tuple[str, Any]]:
  return [(f"{path}/{rest}", leaf) for rest, leaf in leaves_with_path(variable)]


def _message(changed: Mapping[str, Any]) -> str:
  """Returns what to do about variables that a call changes, for each kind of them."""
  from flax import nnx

  remedies = [
    (nnx.BatchStat, "call model.eval() before lora_jax.functional(model)"),
    (
      nnx.RngState,
      "call model.eval() before lora_jax.functional(model), or pass what the call would draw: "
      "rngs=nnx.Rngs(...), or initial_carry= of an RNN",
    ),
    (nnx.Cache, "call model.set_attributes(decode=False) before lora_jax.functional(model)"),
    (
      nnx.Variable,
      "return the value from the call, or make it an nnx.Intermediate to have it dropped",
    ),
  ]
  by_remedy: dict[str, list[str]] = {}
  for path, variable in changed.items():
    remedy = next(remedy for kind, remedy in remedies if isinstance(variable, kind))
    by_remedy.setdefault(remedy, []).append(f"{path} ({type(variable).__name__})")
  advice = "; ".join(f"for {', '.join(paths)}: {remedy}" for remedy, paths in by_remedy.items())
  return (
    "the call changes variables of the model, which a function of params alone cannot keep; "
    + advice
  )


def _origins(jaxpr: Any) -> list[int | None]:
  """Returns for each output of a jaxpr the number of the input that it is; None for others."""
  jaxpr, _ = _compat.open_jaxpr(jaxpr)
  origin = {variable: i for i, variable in enumerate(jaxpr.invars)}
  for equation in jaxpr.eqns:
    for variable, i in zip(equation.outvars, _inner_origins(equation), strict=False):
      atom = None if i is None else equation.invars[i]
      if atom is not None and not isinstance(atom, Literal) and atom in origin:
        origin[variable] = origin[atom]
  return [None if isinstance(v, Literal) else origin.get(v) for v in jaxpr.outvars]


def _inner_origins(equation: Any) -> Collection[int | None]:
  """Returns for each output of an equation the number of its operand that it is."""
  name, params = equation.primitive.name, equation.params
  if name in ("jit", "pjit", "checkpoint", "remat2"):
    return _origins(params["jaxpr"])
  if name == "cond":
    branches = [_origins(branch) for branch in params["branches"]]
    agreed = [i[0] if len(set(i)) == 1 else None for i in zip(*branches, strict=True)]
    return [None if i is None else i + 1 for i in agreed]  # after the index
  if name == "scan":
    consts, carry = _compat.scan_counts(params)
    body = _origins(params["jaxpr"])
    first = consts + carry
    same = [i if i == consts + k else None for k, i in enumerate(body[:carry])]
    return [*same, *(i if i is not None and i >= first else None for i in body[carry:])]
  if name == "while":
    first = params["cond_nconsts"] + params["body_nconsts"]
    body = _origins(params["body_jaxpr"])
    return [first + k if i == params["body_nconsts"] + k else None for k, i in enumerate(body)]
  return ()
