"""The train step: which leaves it updates, what it donates, how often it compiles."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training.checkpoint import Checkpoints
from lora_jax.training.finite import all_finite
from lora_jax.training.loss import LossSum
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.step import (
  make_eval_step,
  make_train_step,
  start,
  trainable_tree,
)
from lora_jax.trees import leaves_with_path

from tests.toy_models import relative_difference

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
SHAPES = {"up": (6, 10), "bias": (10,), "down": (10, 4)}
PARAMS = {
  name: 0.5 * DRAW.standard_normal(shape).astype("float32") for name, shape in SHAPES.items()
}
BATCH = {"x": DRAW.standard_normal((8, 6)).astype("float32"), "y": np.ones((8, 4), "float32")}
COMPILED = []


@pytest.fixture(autouse=True, scope="module")
def compilations():
  """Records every compilation."""

  def listener(event, seconds, **_):
    if "backend_compile" in event:
      COMPILED.append(event)

  jax.monitoring.register_event_duration_secs_listener(listener)
  yield
  jax.monitoring.unregister_event_duration_listener(listener)


def squares(params, batch, *, key=None):
  """A loss whose rows weigh 1, 2, ..., so that micro-batches weigh differently."""
  hidden = jnp.tanh(batch["x"] @ params["up"] + params["bias"][None])
  weights = jnp.abs(batch["x"][:, 0])
  losses = jnp.sum((hidden @ params["down"] - batch["y"]) ** 2, axis=1)
  return LossSum(jnp.sum(losses * weights), jnp.sum(weights))


def lora(dropout=0.0):
  return lj.lora(squares, lj.LoraConfig(2, 4.0, "up|down", extra="bias", dropout=dropout))


def begin(adaptation, optimizer=None, accumulation_steps=1, **axes):
  """Returns a step, its state and its frozen part on a mesh of the given axes."""
  mesh = make_mesh(**axes)
  params = jax.tree.map(jnp.array, PARAMS)
  trainable = adaptation.init(jax.random.key(1), params, BATCH)
  optimizer = optimizer or optax.adamw(1e-2)
  state, frozen, optimizer = start(params, trainable, optimizer, KEY, mesh)
  step = make_train_step(adaptation, optimizer, state, accumulation_steps)
  return step, state, frozen, place_batch(mesh, BATCH, accumulation_steps)


def host(tree):
  """Returns copies that outlive a donation."""
  return jax.tree.map(np.array, tree)


def test_only_trainable_leaves_have_state():
  _, state, frozen, _ = begin(lora())
  sizes = [leaf.size for leaf in jax.tree.leaves(state.part)]
  assert sum(sizes) == 2 * (6 + 10) + 2 * (10 + 4) + 10
  moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert sorted(moments) == sorted(sizes * 2)
  assert set(frozen["base"]) == set(PARAMS)
  assert jax.tree.leaves(frozen["adapter"]) == []


def test_frozen_leaves_stay_and_the_state_is_donated():
  step, state, frozen, batch = begin(lora(), optax.adamw(1e-2, weight_decay=0.1))
  before, old = host(frozen), state
  for _ in range(3):
    state, _ = step(state, frozen, batch)
  jax.tree.map(np.testing.assert_array_equal, frozen, before)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.part, old.opt_state)))
  assert int(state.step) == 3


def test_a_step_is_the_update_of_the_mean_loss():
  adaptation = lora()
  step, state, frozen, batch = begin(adaptation, optax.sgd(0.1))
  trainable = host(trainable_tree(state, frozen))

  def mean_loss(trainable):
    loss = adaptation.apply(PARAMS, trainable, jax.tree.map(jnp.asarray, BATCH), lora_key=None)
    return loss.total / (loss.weight + 1e-4)

  value, grads = jax.value_and_grad(mean_loss)(jax.tree.map(jnp.asarray, trainable))
  state, metrics = step(state, frozen, batch)
  expected = jax.tree.map(lambda x, g: x - 0.1 * g, trainable, grads)
  assert relative_difference(trainable_tree(state, frozen), expected) < 1e-6
  np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
  np.testing.assert_allclose(metrics.weight, np.abs(BATCH["x"][:, 0]).sum(), rtol=1e-6)
  norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulated_micro_batches_are_the_whole_batch(method):
  adaptation = lora() if method == "lora" else lj.full_finetuning(squares)
  results = []
  for parts in (1, 4):
    step, state, frozen, batch = begin(adaptation, optax.sgd(0.1), parts)
    assert batch["x"].shape == ((8, 6) if parts == 1 else (4, 2, 6))
    for _ in range(2):
      state, metrics = step(state, frozen, batch)
    results.append((state.part, metrics))
  assert relative_difference(results[1], results[0]) < 1e-6


def test_full_finetuning_passes_each_array_once():
  step, state, frozen, batch = begin(lj.full_finetuning(squares))
  assert jax.tree.leaves(frozen) == []
  before, old = host(trainable_tree(state, frozen)), state
  state, _ = step(state, frozen, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.part))
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), trainable_tree(state, frozen), before)
  assert changed == {"up": True, "bias": True, "down": True}


def by_hand(adaptation, optimizer, steps):
  """Returns the trainable tree after some steps of optax, with nothing donated."""
  params, batch = (jax.tree.map(jnp.array, tree) for tree in (PARAMS, BATCH))
  trainable = adaptation.init(jax.random.key(1), params, batch)
  opt_state = optimizer.init(trainable)

  def mean_loss(trainable):
    loss = adaptation.apply(params, trainable, batch, lora_key=None)
    return loss.total / (loss.weight + 1e-4)

  @jax.jit
  def step(trainable, opt_state):
    updates, opt_state = optimizer.update(jax.grad(mean_loss)(trainable), opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state

  for _ in range(steps):
    trainable, opt_state = step(trainable, opt_state)
  return trainable


class Holds(NamedTuple):
  """The state of an optimizer that keeps an array twice, a number, and one of its own arrays."""

  initial: Any
  same: Any
  number: Any
  constant: Any


OWN = jnp.ones(3)


def holding():
  """Returns SGD whose state has every alias that a step's donation could meet."""

  def init(params):
    return Holds(params, params, 0.5, {"array": OWN, "key": KEY})

  def update(updates, state, params=None):
    return jax.tree.map(lambda g: -state.number * g, updates), state

  return optax.GradientTransformation(init, update)


OPTIMIZERS = {
  "prodigy": lambda: optax.contrib.prodigy(1.0),
  "dog": lambda: optax.contrib.dog(1.0),
  "dowg": lambda: optax.contrib.dowg(1.0),
  "cocob": optax.contrib.cocob,
  "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-2),
  "holding": holding,
}


@pytest.mark.parametrize(
  "name",
  [
    name if name in ("prodigy", "holding") else pytest.param(name, marks=pytest.mark.long)
    for name in OPTIMIZERS
  ],
)
def test_optimizer_state_may_share_arrays_with_the_weights(name):
  """Such as a copy of the initial weights, which is the trainable tree's own array."""
  adaptation = lora()
  step, state, frozen, batch = begin(adaptation, OPTIMIZERS[name]())
  weak = [x.weak_type for x in jax.tree.leaves(state) if hasattr(x, "weak_type")]
  for _ in range(3):
    state, _ = step(state, frozen, batch)
  expected = by_hand(adaptation, OPTIMIZERS[name](), 3)
  assert relative_difference(trainable_tree(state, frozen), expected) < 1e-5
  assert not any(weak)
  assert not OWN.is_deleted()
  assert not KEY.is_deleted()


def test_tied_weights_are_trained_as_separate_leaves():
  weight = jnp.eye(4)
  params = {"in": weight, "out": jax.device_put(weight, jax.devices()[0])}
  params["body"] = jnp.arange(16.0).reshape(4, 4) / 16

  def fn(params, batch, *, key=None):
    x = batch["x"] @ params["in"] @ params["body"] @ params["out"].T
    return LossSum(jnp.sum((x - 1) ** 2), jnp.full((), x.size, jnp.float32))

  full = lj.full_finetuning(fn)
  state, frozen, optimizer = start(params, params, optax.sgd(0.1), KEY, make_mesh())
  step = make_train_step(full, optimizer, state)
  batch = place_batch(make_mesh(), {"x": np.eye(4, dtype="float32")})
  for _ in range(2):
    state, metrics = step(state, frozen, batch)
  assert np.isfinite(metrics.loss)
  tree = trainable_tree(state, frozen)
  assert np.abs(tree["in"] - tree["out"]).max() > 0


def test_frozen_leaves_may_be_whatever_jax_computes_with():
  """Python's numbers keep their weak types, so that the function computes in bfloat16."""
  dtypes = []

  def fn(params, batch, *, key=None):
    weak = batch["x"] @ params["w"].astype(jnp.bfloat16) * params["int"] * params["float"]
    dtypes.append(weak.dtype)
    outputs = weak.astype(jnp.float32) * params["bool"] * params["wide"]
    for name in ("int4", "complex", "numpy"):
      outputs = outputs * jnp.real(params[name]).astype(jnp.float32)[None]
    return LossSum(jnp.sum(outputs**2), jnp.sum(jnp.abs(batch["x"][:, 0]) ** 0).astype(jnp.float32))

  params = {"w": np.eye(6, 4, dtype="float32"), "unused": np.zeros(2, bool)}
  params |= {"int": 2, "float": 2.0, "bool": True, "wide": np.float64(2), "empty": np.zeros((0, 2))}
  params |= {"numpy": np.full(4, 2), "int4": np.full(4, 2, "int4"), "complex": np.full(4, 2 + 1j)}
  adaptation = lj.lora(fn, lj.LoraConfig(2, 4.0, "w"))
  batch = {"x": jnp.asarray(BATCH["x"], jnp.bfloat16)}
  state, frozen, optimizer = start(
    params, adaptation.init(KEY, params, batch), optax.sgd(0.1), KEY, make_mesh()
  )
  step = make_train_step(adaptation, optimizer, state)
  _, metrics = step(state, frozen, place_batch(make_mesh(), batch))
  expected = fn(params, batch)
  np.testing.assert_allclose(metrics.loss, expected.total / expected.weight, rtol=1e-4)
  assert set(dtypes) == {jnp.dtype("bfloat16")}


def test_a_trainable_tree_that_shares_arrays_with_the_base_is_refused():
  params = jax.tree.map(jnp.array, PARAMS)
  with pytest.raises(ValueError, match=r"shares arrays with params: bias, up. .* copies; for full"):
    start(params, {"up": params["up"], "bias": params["bias"]}, optax.sgd(0.1), KEY, make_mesh())
  moved = jax.device_put(params["up"], jax.devices()[0])  # another object, of the same memory
  with pytest.raises(ValueError, match="shares arrays with params: up"):
    start(params, {"up": moved}, optax.sgd(0.1), KEY, make_mesh())


def test_dropout_differs_between_steps_and_micro_steps_and_not_between_runs():
  """With a learning rate of zero the losses differ only by their masks."""
  half = {name: np.concatenate([array[:4]] * 2) for name, array in BATCH.items()}

  def losses(parts):
    step, state, frozen, _ = begin(noisy, optax.sgd(0.0), parts)
    batch = place_batch(make_mesh(), half, parts)
    values = []
    for _ in range(3):
      state, metrics = step(state, frozen, batch)
      values.append(float(metrics.loss))
    return values

  def apply(params, trainable, batch, *, lora_key, key):
    """One mask for all rows, so that equal micro-batches differ only by their keys."""
    keep = jax.random.uniform(lora_key, (1, 6))
    return full.apply(params, trainable, batch | {"x": batch["x"] * keep}, lora_key=None)

  full = lj.full_finetuning(squares)
  noisy = full._replace(apply=apply)
  whole, parts = losses(1), losses(2)
  assert len({*whole, *parts}) == 6
  assert losses(2) == parts
  keys = [jax.random.fold_in(jax.random.fold_in(KEY, 0), i) for i in range(2)]
  rows = {name: array[:4] for name, array in BATCH.items()}
  masks = [jax.random.uniform(key, (1, 6)) for key in keys]
  once = [squares(PARAMS, rows | {"x": rows["x"] * mask}) for mask in masks]
  total, weight = (sum(float(loss[i]) for loss in once) for i in range(2))
  np.testing.assert_allclose(parts[0], total / weight, rtol=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_models_own_dropout_has_a_key_of_the_step(parts):
  """With a learning rate of zero the losses differ only by their masks."""

  def noisy(params, batch, *, key=None):
    if key is None:
      return squares(params, batch)
    keep = jax.random.uniform(key, batch["x"].shape)
    return squares(params, {**batch, "x": batch["x"] * keep})

  adaptation = lj.lora(noisy, lj.LoraConfig(2, 4.0, "up|down", extra="bias"))
  runs = []
  for _ in range(2):
    step, state, frozen, batch = begin(adaptation, optax.sgd(0.0), parts)
    losses = []
    for _ in range(3):
      state, metrics = step(state, frozen, batch)
      losses.append(float(metrics.loss))
    runs.append(losses)
  assert runs[0] == runs[1]
  assert len(set(runs[0])) == 3
  _, state, frozen, batch = begin(adaptation)
  plain = make_eval_step(adaptation)(frozen["base"], trainable_tree(state, frozen), batch)
  np.testing.assert_allclose(plain, squares(PARAMS, BATCH), rtol=1e-5)


def test_evaluation_has_no_dropout():
  adaptation = lora(dropout=0.5)
  _, state, frozen, batch = begin(adaptation)
  evaluate = make_eval_step(adaptation)
  adapter = jax.tree.map(lambda x: x + 0.3, trainable_tree(state, frozen))
  got = evaluate(frozen["base"], adapter, batch)
  np.testing.assert_allclose(got, squares(lora().merge(frozen["base"], adapter), batch), rtol=1e-5)


@pytest.mark.parametrize(("axes", "parts"), [({}, 2), ({"data": 2, "fsdp": 2}, 1)])
def test_one_compilation_serves_all_steps_and_a_resumed_run(axes, parts, tmp_path):
  step, state, frozen, batch = begin(lora(dropout=0.1), None, parts, **axes)
  state, _ = step(state, frozen, batch)
  before = len(COMPILED)
  for _ in range(2):
    state, _ = step(state, frozen, batch)
  assert len(COMPILED) == before
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, None, "base")
    restored = checkpoints.restore(3, state, "base").state
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)
  before = len(COMPILED)
  restored, _ = step(restored, frozen, batch)
  assert len(COMPILED) == before
  expected, _ = step(state, frozen, batch)
  for got, reference in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
    got, reference = (
      x if x.dtype != KEY.dtype else jax.random.key_data(x) for x in (got, reference)
    )
    np.testing.assert_array_equal(got, reference)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_bfloat16_base_is_trained_in_float32_and_resumed(method, tmp_path):
  adaptation = lora() if method == "lora" else lj.full_finetuning(squares)
  params = {name: jnp.asarray(array, jnp.bfloat16) for name, array in PARAMS.items()}
  trainable = adaptation.init(jax.random.key(1), params, BATCH)
  state, frozen, optimizer = start(params, trainable, optax.adamw(1e-3), KEY, make_mesh())
  step, batch = make_train_step(adaptation, optimizer, state), place_batch(make_mesh(), BATCH)
  before = host(state.part)
  state, _ = step(state, frozen, batch)
  assert {x.dtype for x in jax.tree.leaves(state.part)} == {jnp.dtype("float32")}
  assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.part, before)
  assert all(move for path, move in leaves_with_path(moved) if not path.endswith("lora_a"))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, None, "base")
    restored = checkpoints.restore_last(state, "base").state
    narrow = dataclasses.replace(state, part=jax.tree.map(jnp.bfloat16, state.part))
    with pytest.raises(ValueError, match=r": float32\[10\], expected bfloat16\[10\].* Resume with"):
      checkpoints.restore_last(narrow, "base")
  results = [host(step(x, frozen, batch)[0].part) for x in (restored, state)]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_all_finite():
  tree = {"a": jnp.ones(3), "b": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
  assert all_finite(tree)
  assert not all_finite(tree | {"b": jnp.asarray([1.0, jnp.nan], jnp.bfloat16)})
  assert not all_finite(tree | {"a": jnp.asarray([jnp.inf])})
