"""Weights and fully trained leaves of every dtype: adapted, merged, stored, or refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training.loss import LossSum
from lora_jax.training.mesh import make_mesh
from lora_jax.training.step import make_train_step, start, trainable_tree

from tests.toy_models import relative_difference

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), jnp.float32)
SHORT = ["float4_e2m1fn", "float8_e4m3fn", "bfloat16"]
OTHERS = [
  "float32",
  "float16",
  "float8_e5m2",
  "float8_e3m4",
  "float8_e4m3",
  "float8_e4m3b11fnuz",
  "float8_e4m3fnuz",
  "float8_e5m2fnuz",
]


def computes_in(dtype):
  return jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else dtype


def fn(params, x):
  dtype = computes_in(params["w"].dtype)
  y = x.astype(dtype) @ params["w"].astype(dtype)
  return y * params["scale"].astype(dtype)[None]


def make_params(dtype):
  draw = np.random.default_rng(0)
  w = jnp.asarray(draw.standard_normal((8, 6)), jnp.float32).astype(dtype)
  return {"w": w, "scale": jnp.ones(6, dtype)}


def loss_of(method, params, trainable):
  return jnp.mean((method.apply(params, trainable, X).astype(jnp.float32) - 2.0) ** 2)


def trained(method, params, steps=20):
  """Returns the trainable tree after steps of Adam that are too small for bfloat16."""
  trainable = method.init(KEY, params, X)
  optimizer = optax.adam(1e-4)

  @jax.jit
  def step(trainable, state):
    grads = jax.grad(functools.partial(loss_of, method, params))(trainable)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  state = optimizer.init(trainable)
  for _ in range(steps):
    trainable, state = step(trainable, state)
  return trainable


METHODS = {
  "extra": lambda fn: lj.lora(fn, lj.LoraConfig(2, 4.0, "w", extra="scale")),
  "partial": lambda fn: lj.partial_finetuning(fn, "scale"),
  "full": lj.full_finetuning,
}
FEW = {
  ("extra", "bfloat16"),
  ("partial", "float16"),
  ("full", "bfloat16"),
  ("full", "float8_e4m3fn"),
}


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    pytest.param(name, dtype, marks=[] if (name, dtype) in FEW else [pytest.mark.long])
    for name in METHODS
    for dtype in ("bfloat16", "float16", "float8_e4m3fn")
  ],
)
def test_a_leaf_of_a_narrow_dtype_is_trained_in_float32(name, dtype):
  params = make_params(dtype)
  method = METHODS[name](fn)
  trainable = trained(method, params)
  assert {x.dtype.name for x in jax.tree.leaves(trainable)} == {"float32"}
  assert 1e-3 < float(jnp.abs(trainable["scale"] - 1).max()) < 3e-3  # 20 steps of 1e-4
  merged = method.merge(params, trainable)
  assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, params)
  assert method.apply(params, trainable, X).dtype == computes_in(dtype)
  assert params["scale"].dtype == dtype
  assert not params["scale"].is_deleted()


def test_the_copy_is_trained_as_by_hand():
  params = make_params("bfloat16")
  by_hand: Any = jnp.ones(6)
  state = optax.adam(1e-4).init(jnp.ones(6))

  @jax.jit
  @jax.grad
  def gradient(scale):
    out = fn(params | {"scale": scale.astype(jnp.bfloat16)}, X)
    return jnp.mean((out.astype(jnp.float32) - 2.0) ** 2)

  for _ in range(20):
    grads = gradient(by_hand)
    updates, state = optax.adam(1e-4).update(grads, state, by_hand)
    by_hand = optax.apply_updates(by_hand, updates)
  got = trained(lj.partial_finetuning(fn, "scale"), params)["scale"]
  np.testing.assert_allclose(got, by_hand, rtol=1e-6)


def test_full_finetuning_of_a_wide_base_is_the_base_itself():
  params = make_params("float32")
  method = lj.full_finetuning(fn)
  assert method.init(KEY, params, X) is params
  none = jax.tree.map(lambda _: None, params)
  np.testing.assert_array_equal(method.apply(none, params, X), fn(params, X))
  bare = lj.full_finetuning(lambda w, x: x @ w)
  np.testing.assert_array_equal(bare.apply(X.T, bare.init(KEY, X.T, X), X), X @ X.T)
  mixed = params | {"scale": params["scale"].astype(jnp.bfloat16)}
  trainable = method.init(KEY, mixed, X)
  assert trainable["w"] is not mixed["w"]  # a step donates it, and reads the base
  shapes = method.init(KEY, jax.eval_shape(lambda: mixed), X)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
    lambda x: (x.shape, x.dtype), trainable
  )


def test_full_finetuning_does_not_train_integers_and_constants():
  params = make_params("float32") | {"order": jnp.arange(6), "mode": "plain", "bits": 8}
  method = lj.full_finetuning(lambda p, x: fn(p, x)[:, p["order"]])
  trainable = method.init(KEY, params, X)
  assert sorted(trainable) == ["scale", "w"]
  jax.grad(functools.partial(loss_of, method, params))(trainable)
  merged = method.merge(params, trainable)
  assert (merged["mode"], merged["bits"]) == ("plain", 8)
  assert merged["order"] is params["order"]


@pytest.mark.parametrize("dtype", SHORT)
def test_a_weight_of_every_size(dtype):
  check_dtype(make_params(dtype), lj.LORA)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [*SHORT, *OTHERS])
@pytest.mark.parametrize("variant", [lj.LORA, lj.DORA], ids=["LoRA", "DoRA"])
def test_a_weight_of_every_dtype(dtype, variant):
  check_dtype(make_params(dtype), variant)


def test_a_weight_of_float64():
  with jax.enable_x64(True):
    trainable = check_dtype(make_params("float64"), lj.LORA)
    assert trainable["scale"].dtype == jnp.float64
    assert trainable["w"].lora_a.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn"])
def test_params_of_numpy_arrays(dtype):
  arrays = jax.tree.map(lambda x: np.asarray(x).astype(dtype), make_params("float32"))
  check_dtype(arrays, lj.LORA, lambda p, x: fn(jax.tree.map(jnp.asarray, p), x))


def check_dtype(params, variant, function=fn):
  """Checks init, apply, merge, merge_error, convert and storage; returns the trainable tree."""
  config = lj.LoraConfig(2, 4.0, "w", extra="scale", variant=variant)
  lora = lj.lora(function, config)
  trainable = lora.init(KEY, params, X)
  trainable = jax.tree.map(lambda x: x + 0.1 * jnp.ones_like(x), trainable)
  dtype = jax.dtypes.canonicalize_dtype(params["w"].dtype)
  merged = lora.merge(params, trainable)
  assert {merged["w"].dtype, merged["scale"].dtype} == {dtype}
  epsilon = float(jnp.finfo(dtype).eps)
  error = lj.merge_error(lora, params, trainable)["w"]
  assert float(error) <= epsilon
  out = lora.apply(params, trainable, X)
  assert out.dtype == computes_in(dtype)
  assert relative_difference(function(merged, X), out) < 2 * max(epsilon, 1e-5)
  _, _, errors = lj.convert(config, trainable, params, rank=6)
  assert float(errors["w"]) < 1e-5
  arrays, axes = lj.pack(trainable)
  stored = lj.unpack({name: np.asarray(array) for name, array in arrays.items()}, axes, trainable)
  jax.tree.map(np.testing.assert_array_equal, stored, trainable)
  return trainable


def test_a_complex_leaf_is_trained_as_it_is():
  def loss(params, batch, *, key=None):
    out = (batch["x"] @ params["w"]) * params["phase"][None]
    return LossSum(jnp.sum(jnp.abs(out - batch["y"]) ** 2), jnp.float32(out.size))

  params = {"w": jnp.eye(8, 6), "phase": jnp.ones(6, jnp.complex64)}
  batch = {"x": X, "y": (1 + 0.5j) * X[:, :6]}
  method = lj.partial_finetuning(loss, "phase")
  trainable = method.init(KEY, params, batch)
  mesh = make_mesh(data=1, fsdp=1, tensor=1)
  state, frozen, optimizer = start(params, trainable, optax.sgd(2.5), KEY, mesh)
  step = make_train_step(method, optimizer, state)
  for _ in range(40):
    state, _ = step(state, frozen, batch)
  phase = trainable_tree(state, frozen)["phase"]
  np.testing.assert_allclose(phase, np.full(6, 1 + 0.5j), rtol=0.01)
  assert method.merge(params, {"phase": phase})["phase"].dtype == jnp.complex64
  with pytest.raises(ValueError, match="other dtype: phase is float32, expected complex64"):
    method.merge(params, {"phase": jnp.ones(6)})


def test_a_copy_from_an_earlier_version_is_still_applied():
  params = make_params("bfloat16")
  lora = METHODS["extra"](fn)
  trainable = lora.init(KEY, params, X)
  earlier = trainable | {"scale": trainable["scale"].astype(jnp.bfloat16)}
  np.testing.assert_array_equal(lora.apply(params, earlier, X), lora.apply(params, trainable, X))
  assert lora.merge(params, earlier)["scale"].dtype == jnp.bfloat16


def test_an_aligned_adapter_has_the_copies_dtype():
  params = make_params("bfloat16")
  lora, plain = lj.LoraConfig(2, 4.0, "w", extra="scale"), lj.LoraConfig(2, 4.0, "w")
  adapters = [(config, lj.lora(fn, config).init(KEY, params, X)) for config in (lora, plain)]
  _, trees = lj.align(adapters, params)
  assert [tree["scale"].dtype.name for tree in trees] == ["float32", "float32"]


def test_the_merge_error_of_a_weight_of_zeros_is_zero():
  params = {"w": jnp.zeros((8, 6), jnp.bfloat16)}
  lora = lj.lora(lambda p, x: x @ p["w"].astype(x.dtype), lj.LoraConfig(2, 4.0, "w"))
  assert float(lj.merge_error(lora, params, lora.init(KEY, params, X))["w"]) == 0
