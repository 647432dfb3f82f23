"""Replacing marked values: through every control flow, in stacks of layers, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import lora_jax as lj
from lora_jax.transform.errors import UnsupportedOperation
from lora_jax.transform.marks import count_layers, require_marks, trace_marks

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


def scanned_views_of_a_call(params, x):
  weights = jax.jit(lambda w: 1.0 * w)(params["w"])
  return lax.scan(lambda x, w: (layer(w, x), None), x, weights)[0]


def scanned_masked_weights(params, x):
  """The weights pass through an operation that no rule has, with a constant."""
  weights = jnp.where(jnp.arange(4)[:, None, None] < 4, params["w"], 0.0)
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


def in_while(params, x):
  def step(state):
    return state[0] + 1, layer(params["w"][0], state[1])

  return lax.while_loop(lambda state: state[0] < 4, step, (0, x))[1]


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
  scanned_views_of_a_call: [(4,)],
  scanned_masked_weights: [(4,)],
  checkpointed: [(4,)],
  grouped: [(2, 2)],
  jitted: [()] * 4,
  branched: [(4,)],
  looped: [()],
  over_batches: [()] * 4,
}


@functools.cache
def value_and_gradients(fn):
  """Returns a value of `fn(arrays, params, x)` and its gradients."""
  direction = jnp.cos(jnp.arange(6.0)).reshape(2, 3)

  def value(arrays, params, x):
    return jnp.vdot(direction, fn(arrays, params, x))

  return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(ARRAYS, PARAMS, X)


def each_layer(arrays, params, x):
  return by_hand(params, x, arrays)


def first_layer(arrays, params, x):
  return by_hand(params, x, arrays, same=True)


def assert_close(got, expected):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("fn", STACKS, ids=lambda fn: fn.__name__)
def test_values_and_gradients_are_those_of_a_function_by_hand(fn):
  marks = trace_marks(fn, [NAME], PARAMS, (X,), {}).marks
  assert [mark.layers for mark in marks] == STACKS[fn]
  assert [mark.number for mark in marks] == list(range(len(marks)))
  got = value_and_gradients(lambda arrays, params, x: evaluate(fn, arrays, params, x))
  assert_close(got, value_and_gradients(first_layer if fn is looped else each_layer))


def test_a_while_loop_has_no_stack():
  assert_close(
    jax.jit(functools.partial(evaluate, in_while))(ARRAYS), first_layer(ARRAYS, PARAMS, X)
  )


@pytest.mark.parametrize("fn", [scanned, unrolled], ids=lambda fn: fn.__name__)
def test_a_mark_without_arrays_changes_nothing(fn):
  call = trace_marks(fn, [NAME], PARAMS, (X,), {})
  np.testing.assert_array_equal(call.evaluate(visit, {}), fn(PARAMS, X))
  assert trace_marks(fn, ["another"], PARAMS, (X,), {}).marks == ()


def test_marks_and_name_stacks_stay():
  def fn(params, x):
    with jax.named_scope("model"):
      return scanned(params, x)

  def replaced(params, x):
    call = trace_marks(fn, [NAME], params, (x,), {})
    with jax.named_scope("outer"):
      return call.evaluate(visit, split(call.marks, ARRAYS))

  (mark,) = trace_marks(replaced, [NAME], PARAMS, (X,), {}).marks
  assert (mark.layers, mark.scope, mark.shape) == ((4,), "outer/model", (2, 3))
  twice = trace_marks(replaced, [NAME], PARAMS, (X,), {}).evaluate(visit, {mark: ARRAYS})
  x = X
  for i in range(4):
    x = visit(None, visit(None, jnp.tanh(x @ PARAMS["w"][i]), ARRAYS[i]), ARRAYS[i])
  np.testing.assert_allclose(twice, x, rtol=1e-5)


def test_a_quantized_stack_with_loops_over_rows_in_its_layers():
  def fn(params, x):
    def layer(x, w):
      rows = lax.scan(lambda _, row: (None, row @ w), None, x)[1]
      return checkpoint_name(jnp.tanh(rows), NAME), None

    return lax.scan(layer, x, params["w"])[0]

  wide = jax.random.normal(jax.random.key(0), (4, 64, 64)) / 8
  x = jax.random.normal(jax.random.key(1), (2, 64))
  params = lj.quantize({"w": wide}, "int8", "w")
  arrays = jnp.linspace(0.1, 0.7, 256).reshape(4, 64)
  call = trace_marks(fn, [NAME], params, (x,), {})
  got = call.evaluate(visit, {call.marks[0]: arrays})
  np.testing.assert_allclose(got, by_hand(lj.dequantize(params), x, arrays), rtol=1e-4, atol=1e-5)


@pytest.mark.long  # in CI prefix tuning does so
def test_a_visit_may_close_over_arrays():
  """As prefix tuning does over the places of its slots; differentiated through scan."""

  def replaced(arrays, params, x):
    call = trace_marks(scanned, [NAME], params, (x,), {})
    factor = jnp.sin(x)

    def visit(mark, x, arrays):
      return x + factor * arrays[None]

    return call.evaluate(visit, {call.marks[0]: arrays})

  def hand(arrays, params, x):
    factor = jnp.sin(x)
    for i in range(4):
      x = jnp.tanh(x @ params["w"][i]) + factor * arrays[i][None]
    return x

  assert_close(value_and_gradients(replaced), value_and_gradients(hand))


# ---- refusals --------------------------------------------------------------------------------


def custom(params, x):
  function = jax.custom_vjp(layer)
  function.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda saved, g: saved)
  return function(params["w"][0], x)


def sharded(params, x):
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec()}
  return jax.shard_map(lambda x: layer(params["w"][0], x), mesh=mesh, **specs)(x)


def by_platform(params, x):
  later = jax.jit(functools.partial(layer, params["w"][0]))
  return lax.platform_dependent(x, cpu=later, default=lambda x: x)


@pytest.mark.parametrize(
  ("fn", "name"),
  [(custom, "custom_vjp_call"), (sharded, "shard_map"), (by_platform, "cond")],
)
def test_a_mark_inside_a_call_that_cannot_be_emitted_is_refused(fn, name):
  message = f"lora_jax/mlp_output 0 is inside '{name}' at .*test_marks.py.*Mark the value outside"
  with pytest.raises(UnsupportedOperation, match=message):
    trace_marks(fn, [NAME], PARAMS, (X,), {})
  assert trace_marks(fn, ["another"], PARAMS, (X,), {}).marks == ()
  lenient = trace_marks(fn, [NAME], PARAMS, (X,), {}, strict=False)
  np.testing.assert_array_equal(lenient.evaluate(visit, {}), fn(PARAMS, X))
  assert lenient.marks == ()


def test_a_layer_that_is_evaluated_twice_is_refused():
  def model(params, x):
    with jax.named_scope("h_0"):
      return layer(params["w"][0], x)

  with pytest.raises(ValueError, match=r"'lora_jax/mlp_output' twice in h_0, at .*Call it once"):
    trace_marks(lambda params, x: model(params, model(params, x)), [NAME], PARAMS, (X,), {})


def test_bad_arrays_and_values_are_refused():
  call = trace_marks(scanned, [NAME], PARAMS, (X,), {})
  (mark,) = call.marks
  with pytest.raises(ValueError, match=r"mlp_output 0: expected arrays with the layers \(4,\) as"):
    call.evaluate(visit, {mark: ARRAYS[:3]})
  with pytest.raises(ValueError, match=r"expected float32 of shape \(2, 3\) .* got float32 of sh"):
    call.evaluate(lambda mark, x, arrays: x[0], {mark: ARRAYS})
  with pytest.raises(ValueError, match=r"method needs marked values, .*'lora_jax/layer_output'"):
    require_marks(call, [NAME, "lora_jax/layer_output"], "method")
  marks = trace_marks(grouped, [NAME], PARAMS, (X,), {}).marks
  with pytest.raises(ValueError, match=r"layers in one stack, .*in stacks of \(2, 2\)"):
    count_layers(marks)
