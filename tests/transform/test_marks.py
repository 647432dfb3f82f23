"""Replacing marked values: through every control flow, in stacks of layers, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lj
from lora_jax.transform.errors import UnsupportedOperation
from lora_jax.transform.marks import require_marks, trace_marks

NAME = "lora_jax/mlp_output"
X = jnp.arange(6.0).reshape(2, 3) / 7
PARAMS = {"w": jnp.stack([jnp.eye(3) + i for i in range(4)])}


def layer(w, x):
  return checkpoint_name(jnp.tanh(x @ w), NAME)


def visit(mark, x, arrays):
  del mark
  return x + jnp.sin(x) * arrays[None]


def unrolled(params, x):
  for w in params["w"]:
    x = layer(w, x)
  return x


def scanned(params, x):
  return lax.scan(lambda x, w: (layer(w, x), None), x, params["w"])[0]


def scanned_views(params, x):
  weights = jnp.concatenate([params["w"].astype(jnp.bfloat16).astype(jnp.float32)])
  return lax.scan(lambda x, w: (layer(w, x), None), x, weights)[0]


def checkpointed(params, x):
  step = jax.checkpoint(lambda x, w: (layer(w, x), None))
  return lax.scan(step, x, params["w"])[0]


def grouped(params, x):
  """Scans over two groups of two layers."""

  def group(x, ws):
    return lax.scan(lambda x, w: (layer(w, x), None), x, ws)

  return lax.scan(group, x, params["w"].reshape(2, 2, 3, 3))[0]


def jitted(params, x):
  step = jax.jit(layer)  # traced once, so that its layers share one jaxpr
  for w in params["w"]:
    x = step(w, x)
  return x


def branched(params, x):
  return lax.cond(x.sum() > 0, scanned, lambda params, x: x, params, x)


def looped(params, x):
  """The weights are the same in each step; so are the arrays."""
  return lax.fori_loop(0, 4, lambda i, x: layer(params["w"][0], x), x)


def over_batches(params, x):
  """A scan that slices no weights."""
  return lax.scan(lambda _, row: (None, unrolled(params, row)), None, x[:, None])[1][:, 0]


def by_hand(params, x, arrays, same=False):
  for i in range(4):
    x = jnp.tanh(x @ params["w"][0 if same else i])
    x = visit(None, x, arrays[0 if same else i])
  return x


ARRAYS = jnp.linspace(0.1, 0.7, 12).reshape(4, 3)


def evaluate(fn, arrays, params=PARAMS, x=X):
  """Returns the output with `arrays` (4, 3) in the marks, whatever their stacks."""
  call = trace_marks(fn, [NAME], params, (x,), {})
  return call.evaluate(visit, split(call.marks, arrays))


def split(marks, arrays):
  if marks[0].layers:
    return {marks[0]: arrays.reshape(*marks[0].layers, 3)}
  return {mark: arrays[mark.number] for mark in marks}


STACKS = {
  unrolled: [()] * 4,
  scanned: [(4,)],
  scanned_views: [(4,)],
  checkpointed: [(4,)],
  grouped: [(2, 2)],
  jitted: [()] * 4,
  branched: [(4,)],
  looped: [()],
  over_batches: [()] * 4,
}


@pytest.mark.parametrize("fn", STACKS, ids=lambda fn: fn.__name__)
def test_values_and_gradients_are_those_of_a_function_by_hand(fn):
  marks = trace_marks(fn, [NAME], PARAMS, (X,), {}).marks
  assert [mark.layers for mark in marks] == STACKS[fn]
  assert [mark.number for mark in marks] == list(range(len(marks)))

  direction = jnp.cos(jnp.arange(6.0)).reshape(2, 3)

  def value(fn, arrays, params, x):
    return jnp.vdot(direction, fn(arrays, params, x))

  def replaced(arrays, params, x):
    return evaluate(fn, arrays, params, x)

  def hand(arrays, params, x):
    return by_hand(params, x, arrays, same=fn is looped)

  results = [
    jax.jit(jax.value_and_grad(functools.partial(value, f), (0, 1, 2)))(ARRAYS, PARAMS, X)
    for f in (replaced, hand)
  ]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), *results)
