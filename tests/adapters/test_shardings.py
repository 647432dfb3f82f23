"""Eight emulated devices equal one, under Auto and Explicit meshes; shardings are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj

from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
SPECS = {
  "embed": P("tensor", "fsdp"),
  "up": P("fsdp", "tensor"),
  "stack": P(None, "tensor", "fsdp"),
  "heads": P("fsdp", "tensor", None),
}
FACTORS = {
  "embed": (P("tensor", None), P(None, "fsdp")),
  "up": (P("fsdp", None), P(None, "tensor")),
  "stack": (P(None, "tensor", None), P(None, None, "fsdp")),
  "heads": (P("fsdp", None), P(None, "tensor", None)),
}
CONFIG = lj.LoraConfig(rank=2, alpha=4.0, target=".*")


def make_params():
  draw = np.random.default_rng(0)
  shapes = {"embed": (24, 16), "up": (16, 32), "stack": (3, 32, 32), "heads": (32, 4, 6)}
  return {
    name: jnp.asarray(draw.standard_normal(shape) / 4, jnp.float32)
    for name, shape in shapes.items()
  }


def model(out_sharding):
  """An embedding, a matmul, a scan over layers and heads. Explicit meshes want out_shardings."""

  def dot(x, w, spec):
    return jnp.einsum("bi,i...->b...", x, w, out_sharding=out_sharding(spec))

  def fn(params, ids):
    x = params["embed"].at[ids].get(out_sharding=out_sharding(P("data", None)))
    x = jnp.tanh(dot(x, params["up"], P("data", "tensor")))

    def body(x, w):
      return jnp.tanh(dot(x, w, P("data", "tensor"))), None

    x, _ = lax.scan(body, x, params["stack"])
    return dot(x, params["heads"], P("data", "tensor", None))

  return fn


def single_device():
  params, ids = make_params(), jnp.arange(8) * 3
  lora = lj.lora(model(lambda spec: None), CONFIG)
  trainable = randomized(lora.init(KEY, params, ids))
  value, grads = jax.jit(jax.value_and_grad(lambda t: jnp.mean(lora.apply(params, t, ids) ** 2)))(
    trainable
  )
  return params, ids, trainable, value, grads


def on_mesh(kind):
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
  return mesh, (lambda spec: spec if kind == AxisType.Explicit else None)


def specs_of(tree):
  def spec(x):
    return P(*(*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))))

  return {name: (spec(w.lora_a), spec(w.lora_b)) for name, w in tree.items()}


@pytest.mark.parametrize(
  "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.long)]
)
def test_eight_devices_equal_one_and_keep_their_shardings(kind):
  params, ids, trainable, value, grads = single_device()
  mesh, out_sharding = on_mesh(kind)
  lora = lj.lora(model(out_sharding), CONFIG)
  with jax.set_mesh(mesh):
    places = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params = jax.device_put(params, places)
    ids = jax.device_put(ids, NamedSharding(mesh, P("data")))
    fresh = lora.init(KEY, params, ids)
    assert specs_of(fresh) == FACTORS
    trainable = jax.tree.map(lambda leaf, x: jax.device_put(x, leaf.sharding), fresh, trainable)
    where = lj.shardings(trainable, params)
    tree = {"base": params, "adapter": trainable}
    mask = lj.trainable_mask(tree)
    optimizer = lj.freeze(optax.adamw(1e-2), mask, {"base": places, "adapter": where})
    part, frozen = lj.partition(tree, mask)

    @jax.jit
    def step(part, frozen, state, ids):
      def loss(part):
        tree = lj.combine(part, frozen)
        return jnp.mean(lora.apply(tree["base"], tree["adapter"], ids) ** 2)

      value, grads = jax.value_and_grad(loss)(part)
      updates, state = optimizer.update(grads, state, part)
      return value, grads, optax.apply_updates(part, updates), state

    state = jax.jit(optimizer.init)(part)
    assert specs_of(state[0].mu["adapter"]) == FACTORS
    got, got_grads, part, state = step(part, frozen, state, ids)
  assert specs_of(state[0].mu["adapter"]) == FACTORS
  assert specs_of(state[0].nu["adapter"]) == FACTORS
  assert specs_of(part["adapter"]) == FACTORS
  assert relative_difference(got, value) < 1e-5
  assert relative_difference(got_grads["adapter"], grads) < 1e-5
  merged = lora.merge(params, fresh)
  assert {name: w.sharding.spec for name, w in merged.items()} == SPECS


def test_shardings_from_specs_and_from_named_shardings():
  params, ids = make_params(), jnp.arange(8)
  lora = lj.lora(model(lambda spec: None), CONFIG)
  shapes = jax.eval_shape(lora.init, KEY, params, ids)
  got = lj.shardings(shapes, SPECS)
  assert {name: (w.lora_a, w.lora_b) for name, w in got.items()} == FACTORS
  mesh, _ = on_mesh(AxisType.Auto)
  named = lj.shardings(shapes, {n: NamedSharding(mesh, s) for n, s in SPECS.items()})
  assert named["up"].lora_a == NamedSharding(mesh, P("fsdp", None))
  trainable = jax.jit(lora.init, out_shardings=named)(KEY, params, ids)
  assert specs_of(trainable) == FACTORS
  with pytest.raises(ValueError, match="params have no leaf 'up'"):
    lj.shardings(shapes, {name: spec for name, spec in SPECS.items() if name != "up"})


def test_some_layers_of_a_stack_are_not_split_over_layers():
  def fn(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

  mesh, _ = on_mesh(AxisType.Auto)
  w = jax.device_put(jnp.ones((4, 8, 8)), NamedSharding(mesh, P("fsdp", None, "tensor")))
  config = lj.LoraConfig(rank=2, alpha=4.0, target="w", stacked_layers=[1, 2, 3])
  trainable = lj.lora(fn, config).init(KEY, {"w": w}, jnp.ones((2, 8)))
  assert specs_of(trainable) == {"w": (P(None, None, None), P(None, None, "tensor"))}


def test_some_layers_of_a_sharded_stack_on_an_explicit_mesh():
  mesh, _ = on_mesh(AxisType.Explicit)
  params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8)), jnp.float32)}
  x = jnp.ones((4, 8))
  config = lj.LoraConfig(rank=2, alpha=4.0, target="w", stacked_layers=[3, 1])

  def fn(params, x, spec=None):
    def body(x, w):
      return jnp.tanh(jnp.dot(x, w, out_sharding=spec)), None

    return lax.scan(body, x, params["w"])[0]

  lora = lj.lora(fn, config)
  trainable = randomized(lora.init(KEY, params, x))
  expected = fn(lora.merge(params, trainable), x)
  with jax.set_mesh(mesh):
    params = {"w": jax.device_put(params["w"], NamedSharding(mesh, P(None, None, "tensor")))}
    x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    places = lj.shardings(trainable, params)
    got = lora.apply(params, jax.device_put(trainable, places), x, P("data", None))
  assert relative_difference(got, expected) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_gain_and_its_norm_are_sharded_as_their_weight(kind):
  params, ids = make_params(), jnp.arange(8) * 3
  plain = lj.dora(model(lambda spec: None), CONFIG)
  trainable = randomized(plain.init(KEY, params, ids))

  def losses(dora, trainable, params, ids):
    return jax.value_and_grad(lambda t: jnp.mean(dora.apply(params, t, ids) ** 2))(trainable)

  value, grads = jax.jit(lambda *args: losses(plain, *args))(trainable, params, ids)
  mesh, out_sharding = on_mesh(kind)
  dora = lj.dora(model(out_sharding), CONFIG)
  with jax.set_mesh(mesh):
    placed = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params = jax.device_put(params, placed)
    ids = jax.device_put(ids, NamedSharding(mesh, P("data")))
    start = dora.init(KEY, params, ids)
    magnitude = start["heads"].magnitude
    assert magnitude.sharding == start["heads"].norm_squared.sharding
    assert (*magnitude.sharding.spec, None)[:2] == ("tensor", None)
    trainable = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), trainable, start)
    got, got_grads = jax.jit(lambda *args: losses(dora, *args))(trainable, params, ids)
  assert relative_difference(got, value) < 1e-5
  for name, node in got_grads.items():
    for array in ("lora_a", "lora_b", "magnitude"):
      assert relative_difference(node.arrays[array], grads[name].arrays[array]) < 1e-5


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_float32_copy_of_an_extra_is_sharded_as_its_leaf(kind):
  mesh, _ = on_mesh(kind)
  sharding = NamedSharding(mesh, P("fsdp", "tensor"))
  params = {"w": jax.device_put(jnp.ones((8, 8), jnp.bfloat16), sharding)}
  trainable = lj.partial_finetuning(lambda p, x: x, "w").init(KEY, params)
  assert (trainable["w"].dtype, trainable["w"].sharding) == (jnp.float32, sharding)
