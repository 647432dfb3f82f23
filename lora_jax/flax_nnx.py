"""Flax NNX models as plain functions of their parameters."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax.trees import leaves_with_path


def functional(model: Any) -> tuple[Callable[..., Any], PyTree]:
  """Returns `(fn, params)` of a Flax NNX model: `fn(params, *args, **kwargs)` is its call.

  `params` is a nested dict of its `nnx.Param`s. Its other state (BatchNorm statistics, the
  counters of random streams) is held fixed: put the model in the mode that the function
  should have first, `model.eval()` or `model.train()`.

  >>> from flax import nnx
  >>> fn, params = functional(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
  >>> jax.tree.map(lambda leaf: leaf.shape, params)
  {'bias': (3,), 'kernel': (4, 3)}

  Raises:
    ValueError: if `model` is no NNX module, or a call of `fn` changes its other state, which
      would be lost without a word.
  """
  from flax import nnx

  if not isinstance(model, nnx.Module):
    raise ValueError(
      f"functional takes a Flax NNX model, got {type(model).__name__}. A Linen model is a "
      "function already: lambda params, *args: model.apply({'params': params}, *args)"
    )
  graph, template, fixed = nnx.split(model, nnx.Param, ...)

  def fn(params: PyTree, *args: Any, **kwargs: Any) -> Any:
    state = jax.tree.map(lambda leaf: leaf, template)  # new variables: calls set them in place
    other = jax.tree.map(lambda leaf: leaf, fixed)
    nnx.replace_by_pure_dict(state, params)
    called = nnx.merge(graph, state, other)
    before = dict(leaves_with_path(other))
    out = called(*args, **kwargs)
    after = dict(leaves_with_path(nnx.state(called, nnx.Not(nnx.Param))))
    changed = [path for path in after if after[path] is not before.get(path)]
    if changed:
      raise ValueError(
        f"the call changes the model's {', '.join(changed)}, which a function of params alone "
        "cannot keep. Call model.eval() before lora_jax.functional(model), or pass what it "
        "would draw in the call: rngs=nnx.Rngs(...), or initial_carry= of an RNN"
      )
    return out

  return fn, nnx.to_pure_dict(template)
