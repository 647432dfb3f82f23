"""VeRA: the paper's formula and sizes, and the logits of PEFT."""

import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import lora_jax as lj

from tests import make_shared_golden as golden
from tests import parity
from tests.toy_models import mlp, mlp_example, randomized, relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=12, alpha=6.0, target=".*", variant=lj.VERA)


SHAPES = {"up": (5, 8), "down": (8, 6)}  # smaller than the rank, which only counts d


def test_outputs_and_gradients_are_the_papers():
  params, x = mlp_example(SHAPES)
  vera = lj.vera(mlp, dataclasses.replace(CONFIG, variant=None))
  trainable = randomized(vera.init(KEY, params, x))
  shared = trainable["lora_shared"]["VeRA"]

  def dense(trainable, name, x):
    node, (inputs, outputs) = trainable[name], SHAPES[name]
    z = (x @ shared.vera_in[:inputs]) * node.vera_d[None]
    return x @ params[name] + (z @ shared.vera_out[:, :outputs]) * node.vera_b[None]

  def paper(trainable):
    return jnp.sum(dense(trainable, "down", jnp.tanh(dense(trainable, "up", x))) ** 2)

  def loss(trainable):
    return jnp.sum(vera.apply(params, trainable, x) ** 2)

  def part(gradient):
    return {name: gradient[name] for name in SHAPES}

  got, expected = (part(jax.jit(jax.grad(f))(trainable)) for f in (loss, paper))
  assert relative_difference(got, expected) < 1e-5
  merged = vera.merge(params, trainable)
  assert relative_difference(jnp.sum(mlp(merged, x) ** 2), paper(trainable)) < 1e-5
  swept = vera.apply(params, trainable, x, scaling=7.0)
  np.testing.assert_array_equal(swept, vera.apply(params, trainable, x))  # it has no scaling


def test_the_initial_values_are_the_papers():
  params, x = {"up": jnp.ones((400, 8)), "down": jnp.ones((8, 300))}, jnp.ones((1, 400))
  variant = lj.vera_variant(d_initial=0.5)
  trainable = lj.lora(mlp, dataclasses.replace(CONFIG, rank=100, variant=variant)).init(
    KEY, params, x
  )
  assert set(np.unique(trainable["up"].vera_d)) == {0.5}
  assert not trainable["up"].vera_b.any()
  assert variant.name == "VeRA of d 0.5"
  a, b = (trainable["lora_shared"][variant.name].arrays[name] for name in ("vera_in", "vera_out"))
  for array, fan_in in ((a, 400), (b, 100)):
    bound = math.sqrt(6 / fan_in)
    assert 0.99 * bound < float(jnp.abs(array).max()) <= bound
    assert float(array.std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
  assert pickle.loads(pickle.dumps(variant)) == variant != lj.VERA


def test_one_copy_for_twelve_layers():
  """The trained arrays are L (2 rank + 2 out) numbers, the frozen ones (in + out) rank in all."""
  width, rank, layers = 768, 256, 12
  kernel = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
  params = [{"query": kernel, "value": kernel} for _ in range(layers)]

  def fn(params, x):
    for layer in params:
      x = jnp.tanh(x @ layer["query"]) @ layer["value"]
    return x

  config = dataclasses.replace(CONFIG, rank=rank)
  x = jax.ShapeDtypeStruct((2, width), jnp.bfloat16)
  trainable = jax.eval_shape(lj.lora(fn, config).init, KEY, params, x)
  trained = 2 * layers * (rank + width)
  assert sum(leaf.size * 4 for leaf in jax.tree.leaves(trainable)) == 4 * (
    trained + 2 * width * rank
  )
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  part, _ = lj.partition(trainable, mask)
  assert sum(leaf.size for leaf in jax.tree.leaves(part)) == trained == 24_576
  assert "24,576" in lj.summary(params, trainable, config, by_kind=True).splitlines()[-2]


@pytest.mark.parametrize("quantized", [False, True])
def test_vera_beside_lora_and_on_a_quantized_base(quantized):
  plain, x = mlp_example(SHAPES)
  params = lj.quantize(plain, "int8", "down") if quantized else plain
  rules = [] if quantized else [lj.LoraRule("up", rank=2, variant=lj.LORA)]
  vera = lj.lora(mlp, dataclasses.replace(CONFIG, rules=rules))
  trainable = randomized(vera.init(KEY, params, x))
  plain = lj.dequantize(params)
  out = jax.jit(vera.apply)(params, trainable, x)
  assert relative_difference(out, mlp(vera.merge(plain, trainable), x)) < 1e-5
  assert relative_difference(out, mlp(plain, x)) > 1e-2


def test_convert_makes_it_plain_lora():
  params, x = mlp_example(SHAPES)
  vera = lj.lora(mlp, CONFIG)
  trainable = randomized(vera.init(KEY, params, x))
  config, plain, errors = lj.convert(CONFIG, trainable, params, rank=5)
  assert max(map(float, errors.values())) < 0.5
  merged, exact = lj.lora(mlp, config).merge(params, plain), vera.merge(params, trainable)
  assert relative_difference(merged["up"], exact["up"]) < 1e-5  # of rank 5
  assert "lora_shared" not in plain


def test_d_is_initialized_to_the_argument():
  params, x = mlp_example(SHAPES)
  vera = lj.vera(mlp, dataclasses.replace(CONFIG, variant=None), d_initial=0.5)
  np.testing.assert_array_equal(vera.init(KEY, params, x)["up"].vera_d, 0.5)


def test_weights_with_another_d_have_arrays_of_their_own():
  params, x = mlp_example(SHAPES)
  rules = [lj.LoraRule("up", variant=lj.vera_variant(0.5))]
  vera = lj.lora(mlp, dataclasses.replace(CONFIG, rules=rules))
  trainable = vera.init(KEY, params, x)
  np.testing.assert_array_equal(trainable["up"].vera_d, 0.5)
  shapes = {n: node.vera_in.shape for n, node in trainable["lora_shared"].items()}
  assert shapes == {"VeRA": (8, 12), "VeRA of d 0.5": (5, 12)}


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match="d_initial must not be 0"):
    lj.vera_variant(0.0)
  with pytest.raises(ValueError, match="d_initial"):
    lj.vera_variant(float("nan"))
  other = dataclasses.replace(CONFIG, variant=lj.DORA)
  with pytest.raises(ValueError, match="VeRA got a config of another variant, DoRA"):
    lj.vera(mlp, other)
  params, x = mlp_example(SHAPES)
  adapter = lj.lora(mlp, CONFIG).init(KEY, params, x)
  with pytest.raises(ValueError, match="is adapted by VeRA"):
    lj.weighted_sum([(CONFIG, adapter)], [1.0], params)


@pytest.mark.long  # in CI tests/interop/peft/test_variants.py reads such an adapter
def test_the_logits_are_pefts():
  base, _, settings = golden.ADAPTERS["vera"]
  arrays = load_file(golden.GOLDEN / "vera.safetensors")
  family = parity.family_of(base)
  model_config, params = family.load(golden.MODELS / base)
  fn, inputs = parity.function(base, model_config), parity.inputs_of(base)
  target = r"layers_\d/(attn/(query|value)|mlp/down)/kernel"
  vera = lj.lora(fn, dataclasses.replace(CONFIG, rank=settings["r"], target=target))
  trainable = vera.init(KEY, params, *inputs)
  names = {"q_proj": "attn/query", "v_proj": "attn/value", "down_proj": "mlp/down"}
  for name, array in arrays.items():
    if "lambda" not in name:
      continue
    parts = name.split(".")
    group, layer = names[parts[-2]].split("/")
    module = trainable[f"layers_{parts[4]}"][group][layer]
    key = parts[-1].replace("vera_lambda", "vera")
    module["kernel"] = module["kernel"].replace(**{key: jnp.asarray(array)})
  shared = {"vera_in": arrays["base_model.vera_A"].T, "vera_out": arrays["base_model.vera_B"].T}
  node = trainable["lora_shared"]["VeRA"]
  assert {key: x.shape for key, x in node.arrays.items()} == {k: x.shape for k, x in shared.items()}
  trainable["lora_shared"]["VeRA"] = node.replace(**shared)
  out = jax.jit(vera.apply)(params, trainable, *inputs)
  assert relative_difference(out, arrays["logits"]) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shared_arrays_on_a_mesh(kind):
  draw = np.random.default_rng(0).standard_normal
  params = {n: jnp.asarray(draw(s), jnp.float32) for n, s in (("up", (8, 12)), ("down", (12, 4)))}
  x = jnp.asarray(draw((4, 8)), jnp.float32)
  single = lj.lora(mlp, CONFIG)
  trainable = randomized(single.init(KEY, params, x))
  expected = jax.jit(jax.value_and_grad(lambda t: single.apply(params, t, x).sum()))(trainable)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
  out = P("data", "tensor") if kind == AxisType.Explicit else None

  def fn(params, x):
    h = jnp.tanh(jnp.einsum("bi,io->bo", x, params["up"], out_sharding=out))
    return jnp.einsum("bi,io->bo", h, params["down"], out_sharding=out)

  with jax.set_mesh(mesh):
    specs = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(params, places)
    x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    vera = lj.lora(fn, CONFIG)
    start = vera.init(KEY, params, x)
    placed = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), trainable, start)
    got = jax.jit(jax.value_and_grad(lambda t: vera.apply(params, t, x).sum()))(placed)
  assert relative_difference(jax.device_get(got), jax.device_get(expected)) < 1e-5
