"""Updates without low-rank factors: computed a layer at a time, where it is used, and not kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights

from tests.jaxprs import count_of_sizes
from tests.toy_models import make_params, relative_difference, scanned, tokens, unrolled
from tests.transform.test_quantized import quantized_params
from tests.variants.test_variants import randomized

KEY = jax.random.key(0)
LOKR = lj.lokr_variant(2, decompose="none")
OTHERS = [pytest.param(v, marks=pytest.mark.long, id=v.name) for v in (LOKR, lj.MISS_BAT)]
WEIGHTS = r"(f32|bf16)\[(3,)?(24,24|24,96|96,24|50,24|24,50)\]"


def normal(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def adapted(fn, params, *args, variant=lj.HIRA, target=r".*/(query|up|down)/kernel", **settings):
  """Returns an adaptation, and an adapter that changes the function."""
  adaptation = lj.lora(fn, lj.LoraConfig(2, 2.0, target, variant=variant, **settings))
  return adaptation, randomized(adaptation.init(KEY, params, *args))


def loss_of(adaptation):
  return lambda params, trainable, ids: jnp.mean(jnp.sin(adaptation.apply(params, trainable, ids)))


@pytest.mark.parametrize("variant", [lj.HIRA, OTHERS[0]])
def test_a_scan_computes_the_update_of_one_layer_at_a_time(variant):
  params = make_params(stacked=True)
  adaptation, trainable = adapted(scanned, params, tokens(), variant=variant)
  step = jax.make_jaxpr(jax.grad(loss_of(adaptation), argnums=1))(params, trainable, tokens())
  stacks = {3 * 24 * 24, 3 * 24 * 96}
  assert count_of_sizes(step, stacks) == 0
  assert count_of_sizes(step, {24 * 24, 24 * 96}) > 0
  whole = jax.make_jaxpr(adaptation.merge)(params, trainable)
  assert count_of_sizes(whole, stacks) > 0  # the count can tell


@pytest.mark.parametrize(
  ("fn", "dtype"),
  [
    (unrolled, jnp.bfloat16),
    (scanned, jnp.float32),
    pytest.param(unrolled, jnp.float32, marks=pytest.mark.long),
    pytest.param(scanned, jnp.bfloat16, marks=pytest.mark.long),
  ],
)
def test_no_array_of_a_weights_size_is_kept_between_the_passes(fn, dtype, capsys):
  params = jax.tree.map(lambda w: w.astype(dtype), make_params(stacked=fn is scanned))
  adaptation, trainable = adapted(fn, params, tokens(), target=r".*/(query|up)/kernel|.*embedding")

  def kept(loss):
    print_saved_residuals(lambda trainable: loss(params, trainable, tokens()), trainable)
    lines = capsys.readouterr().out.splitlines()
    base = ("from the argument", "from a constant")
    return [line for line in lines if re.match(WEIGHTS, line) and not any(b in line for b in base)]

  def merged_loss(params, trainable, ids):
    return jnp.mean(jnp.sin(fn(adaptation.merge(params, trainable), ids)))

  assert kept(loss_of(adaptation)) == []
  assert kept(merged_loss)  # the count can tell


def test_no_update_is_kept_by_the_compiled_step():
  """More layers of a scan need no more temporary memory, except for activations."""
  size = 128

  def fn(params, x):
    return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0])

  adaptation = lj.lora(fn, lj.LoraConfig(2, 2.0, "w", variant=lj.HIRA))

  def apply_loss(trainable, params, x):
    return adaptation.apply(params, trainable, x)

  def merged_loss(trainable, params, x):
    return fn(adaptation.merge(params, trainable), x)

  def growth(loss):
    def temporaries(num_layers):
      params = {"w": jax.ShapeDtypeStruct((num_layers, size, size), "float32")}
      x = jax.ShapeDtypeStruct((1, size), "float32")
      trainable = jax.eval_shape(adaptation.init, KEY, params, x)
      compiled = jax.jit(jax.grad(loss)).lower(trainable, params, x).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    return (temporaries(6) - temporaries(2)) / (4 * size * size * 4)  # in weights a layer

  assert growth(apply_loss) < 0.1
  assert growth(merged_loss) > 0.9


@pytest.mark.parametrize("variant", [lj.HIRA, *OTHERS])
@pytest.mark.parametrize("axis", [-1, pytest.param(-2, marks=pytest.mark.long)])
def test_a_quantized_base(variant, axis):
  params = {"embed": normal(50, 24), "w": normal(3, 24, 24) / 5}
  target = ["w", "embed"] if variant is lj.HIRA else "w"

  def fn(params, ids):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), params["embed"][ids], params["w"])[0]

  adaptation, trainable = adapted(fn, params, jnp.arange(5), variant=variant, target=target)
  codes = quantized_params(params, adapter_weights(trainable), axis)
  step = jax.jit(jax.value_and_grad(loss_of(adaptation), argnums=1))
  got, expected = (step(p, trainable, jnp.arange(5)) for p in (codes, lj.dequantize(codes)))
  for leaf, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert relative_difference(leaf, reference) < 1e-5
  jaxpr = jax.make_jaxpr(jax.grad(loss_of(adaptation), argnums=1))(codes, trainable, jnp.arange(5))
  assert count_of_sizes(jaxpr, {3 * 24 * 24}) == 0


def effect(variant, dtype, relative, activations=None):
  """Returns the change of the output by an update of this size relative to W, and its gradient."""
  activations = activations or dtype
  w, x = normal(64, 48, seed=1, dtype=jnp.bfloat16), normal(5, 64, seed=2, dtype=jnp.bfloat16)
  params, cotangent = {"w": w.astype(dtype)}, normal(5, 48, seed=3)

  def fn(params, x):
    w = params["w"].astype(activations)
    return jnp.dot(x.astype(activations), w, preferred_element_type=jnp.float32)

  adaptation, trainable = adapted(fn, params, x, variant=variant, target="w")
  exact = {"w": w.astype(jnp.float32)}
  change = adaptation.merge(exact, trainable)["w"] - exact["w"]
  scaling = relative * jnp.linalg.norm(exact["w"]) / jnp.linalg.norm(change)

  @jax.jit
  def loss(trainable):
    out = adaptation.apply(params, trainable, x, scaling=scaling)
    return jnp.sum(cotangent * out), out - fn(params, x)

  gradient, difference = jax.grad(loss, has_aux=True)(trainable)
  return [difference, *jax.tree.leaves(gradient)]


@pytest.mark.parametrize("variant", [lj.HIRA, OTHERS[0]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_small_update_is_not_lost_in_bfloat16(variant, dtype):
  """Rounded with the base weight, an update of a thousandth would lose 93 % of its effect."""
  exact = effect(variant, jnp.float32, 1e-3)
  for got, expected in zip(effect(variant, dtype, 1e-3, jnp.bfloat16), exact, strict=True):
    assert relative_difference(got, expected) < 1e-2


def test_a_float8_base():
  w, x = normal(16, 12).astype(jnp.float8_e4m3fn), normal(4, 16)

  def fn(params, x):
    return x @ params["w"].astype(jnp.float32)

  adaptation, trainable = adapted(fn, {"w": w}, x, target="w")
  out = jax.jit(adaptation.apply)({"w": w}, trainable, x, scaling=1e-2)
  exact = {"w": w.astype(jnp.float32)}
  expected = fn(adaptation.merge(exact, trainable, scaling=1e-2), x)
  assert relative_difference(out - fn(exact, x), expected - fn(exact, x)) < 1e-2


@pytest.mark.parametrize("variant", [lj.HIRA, *OTHERS])
def test_some_layers_of_a_stack(variant):
  params, target = make_params(stacked=True), r"blocks/(attn/query|mlp/up)/kernel"
  settings = {"variant": variant, "target": target, "stacked_layers": [0, 2]}
  adaptation, trainable = adapted(scanned, params, tokens(), **settings)
  merged = adaptation.merge(params, trainable)
  before, after = (p["blocks"]["mlp"]["up"]["kernel"] for p in (params, merged))
  np.testing.assert_array_equal(after[1], before[1])
  assert all(relative_difference(after[i], before[i]) > 1e-2 for i in (0, 2))
  out = jax.jit(adaptation.apply)(params, trainable, tokens())
  assert relative_difference(out, scanned(merged, tokens())) < 1e-5


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_weight(axis_type):
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2)
  spec, x = PartitionSpec("tensor", "data"), normal(8, 16)
  params = {"w": jax.device_put(normal(16, 12), NamedSharding(mesh, spec))}

  def fn(p, x):
    spec = PartitionSpec() if axis_type == AxisType.Explicit else None
    return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=spec)

  with jax.set_mesh(mesh):
    adaptation, trainable = adapted(fn, params, x, target="w")
    assert trainable["w"].lora_a.sharding.spec == PartitionSpec("tensor", None)
    got = jax.jit(adaptation.apply)(params, trainable, x)
    gradient = jax.jit(jax.grad(lambda t: adaptation.apply(params, t, x).sum()))(trainable)
  delta = params["w"] * (np.asarray(trainable["w"].lora_a) @ np.asarray(trainable["w"].lora_b))
  np.testing.assert_allclose(got, x @ np.asarray(params["w"] + delta), rtol=1e-4, atol=1e-4)
  assert gradient["w"].lora_a.shape == (16, 2)


def test_an_update_is_added_first_and_once():
  w, x = {"w": normal(8, 6)}, normal(3, 8)
  twice = lj.HIRA._replace(name="twice", weight=lambda w, p, s: add(add(w, p, s), p, s))
  late = lj.HIRA._replace(name="late", weight=lambda w, p, s: add(w + p.lora_a @ p.lora_b, p, s))
  add = lj.HIRA.weight
  for variant in (twice, late):
    with pytest.raises(ValueError, match="an update without low-rank factors is added first, and"):
      adapted(lambda p, x: x @ p["w"], w, x, variant=variant, target="w")
