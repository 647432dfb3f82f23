"""DoRA: the paper's formula, the base model at step 0 to the bit, and its trained arrays."""

import dataclasses
import functools
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj

from tests import toy_variants as toys
from tests.jaxprs import count_of_sizes, equations
from tests.paths import ROOT
from tests.toy_models import make_params, relative_difference, scanned, tokens, unrolled

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=3, alpha=6.0, target="w")


def dense(params, x):
  return jnp.tanh(x @ params["w"])


def example(dtype=jnp.float32):
  draw = np.random.default_rng(0)
  params = {"w": jnp.asarray(draw.standard_normal((8, 6)), dtype)}
  return params, jnp.asarray(draw.standard_normal((5, 8)), dtype)


def moved(trainable, seed=1):
  """Returns a DoRA tree after some training: every trained array has changed."""
  draw = np.random.default_rng(seed)

  def move(node):
    return node.replace(
      **{
        spec.name: node.arrays[spec.name]
        + jnp.asarray(0.3 * draw.standard_normal(node.arrays[spec.name].shape), jnp.float32)
        for spec in node.table
        if not spec.frozen
      }
    )

  return jax.tree.map(move, trainable, is_leaf=lambda x: isinstance(x, lj.LoraWeight))


def paper(w, node, scaling):
  """Equation 5, with the norm a constant for gradients (sec. 4.3)."""
  v = w + scaling * node.lora_a @ node.lora_b
  norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0, keepdims=True))
  return v * (node.magnitude[None] / norm)


def test_output_and_gradients_are_the_papers():
  params, x = example()
  adapted = lj.dora(dense, CONFIG)
  trainable = moved(adapted.init(KEY, params, x))

  def adapted_loss(trainable, x):
    return jnp.sum(adapted.apply(params, trainable, x) ** 2)

  def paper_loss(trainable, x):
    return jnp.sum(dense({"w": paper(params["w"], trainable["w"], 2.0)}, x) ** 2)

  got, expected = (jax.grad(f, argnums=(0, 1))(trainable, x) for f in (adapted_loss, paper_loss))
  for name in ("lora_a", "lora_b", "magnitude"):
    assert relative_difference(got[0]["w"].arrays[name], expected[0]["w"].arrays[name]) < 1e-5
  assert relative_difference(got[1], expected[1]) < 1e-5
  np.testing.assert_allclose(
    adapted.apply(params, trainable, x),
    dense({"w": paper(params["w"], trainable["w"], 2.0)}, x),
    rtol=1e-5,
  )

  def with_norm_differentiated(trainable):
    v = params["w"] + 2.0 * trainable["w"].lora_a @ trainable["w"].lora_b
    w = v * (trainable["w"].magnitude[None] / jnp.linalg.norm(v, axis=0, keepdims=True))
    return jnp.sum(dense({"w": w}, x) ** 2)

  other = jax.grad(with_norm_differentiated)(trainable)  # the check can tell
  assert relative_difference(got[0]["w"].lora_a, other["w"].lora_a) > 1e-2


STEP_ZERO = """
import sys

import jax, lora_jax as lj, numpy as np
from tests.toy_models import make_params, scanned, tokens, unrolled

target = r".*/(kernel|embedding)"
fn = {"unrolled": unrolled, "scanned": scanned}[sys.argv[1]]
params = make_params(stacked=fn is scanned)
base = np.asarray(jax.jit(fn)(params, tokens()))
for layers in (None, [0, 2]) if fn is scanned else (None,):
  config = lj.LoraConfig(4, 8.0, target if layers is None else r"blocks/.*/kernel",
                         stacked_layers=layers)
  dora = lj.dora(fn, config)
  trainable = dora.init(jax.random.key(0), params, tokens())
  out = np.asarray(jax.jit(dora.apply)(params, trainable, tokens()))
  print(layers, int((out != base).sum()))
"""


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    pytest.param("unrolled", ["None 0"], marks=pytest.mark.long),
    ("scanned", ["None 0", "[0, 2] 0"]),
  ],
)
def test_step_zero_is_the_base_bit_for_bit_under_jit(name, expected):
  """With XLA's usual optimizations, which the other tests leave out."""
  environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", STEP_ZERO, name]
  run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  assert run.stdout.splitlines() == expected


@pytest.mark.long
def test_some_layers_of_a_stack():
  params = make_params(stacked=True)
  config = lj.LoraConfig(4, 8.0, r"blocks/.*/kernel", stacked_layers=[0, 2])
  dora = lj.dora(scanned, config)
  trainable = moved(dora.init(KEY, params, tokens()))
  node = trainable["blocks"]["attn"]["query"]["kernel"]
  assert node.magnitude.shape == (2, 24)
  merged = dora.merge(params, trainable)
  before, after = (p["blocks"]["mlp"]["up"]["kernel"] for p in (params, merged))
  np.testing.assert_array_equal(after[1], before[1])
  assert float(jnp.abs(after[0] - before[0]).max()) > 0.1
  out = jax.jit(dora.apply)(params, trainable, tokens())
  assert relative_difference(out, scanned(merged, tokens())) < 1e-5


def test_the_gain_is_applied_in_float32():
  params, x = example(jnp.bfloat16)
  dora = lj.dora(lambda params, x: x @ params["w"], CONFIG)
  trainable = dora.init(KEY, params, x)
  node = trainable["w"]
  trainable = {"w": node.replace(magnitude=node.magnitude * 1.003)}  # 1.003 is 1 in bfloat16
  out = dora.apply(params, trainable, x)
  base = (x @ params["w"]).astype(jnp.float32)
  np.testing.assert_array_equal(out, (base * np.float32(1.003)).astype(jnp.bfloat16))
  assert bool((out.astype(jnp.float32) != base).any())


def test_the_trained_and_the_frozen_arrays():
  params, x = example()
  dora = lj.dora(dense, CONFIG)
  tree = {"base": params, "adapter": dora.init(KEY, params, x)}
  mask = lj.trainable_mask(tree)
  assert mask["adapter"]["w"].arrays == {
    "lora_a": True,
    "lora_b": True,
    "magnitude": True,
    "norm_squared": False,
  }
  part, frozen = lj.partition(tree, mask)
  assert part["adapter"]["w"].norm_squared is None
  assert frozen["adapter"]["w"].lora_a is None
  optimizer = lj.freeze(optax.adamw(1e-1, weight_decay=0.5), mask)
  state = optimizer.init(part)
  shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
  assert shapes == [(), *[(8, 3), (3, 6), (6,)] * 2]

  def loss(part):
    tree = lj.combine(part, frozen)
    return jnp.sum(dora.apply(tree["base"], tree["adapter"], x) ** 2)

  grads = jax.grad(loss)(part)
  assert grads["adapter"]["w"].norm_squared is None
  updates, state = optimizer.update(grads, state, part)
  after = lj.combine(optax.apply_updates(part, updates), frozen)
  held = after["adapter"]["w"].norm_squared
  np.testing.assert_array_equal(held, tree["adapter"]["w"].norm_squared)
  held, magnitude = tree["adapter"]["w"].norm_squared, tree["adapter"]["w"].magnitude
  assert held.unsafe_buffer_pointer() != magnitude.unsafe_buffer_pointer()  # for donation


def test_init_needs_the_weights_values():
  params, x = example()
  dora = lj.dora(dense, CONFIG)
  shapes = {"w": jax.ShapeDtypeStruct((8, 6), "float32")}
  with pytest.raises(
    ValueError, match=r"w: this variant is initialized from the weight's values.*eval_sh"
  ):
    dora.init(KEY, shapes, x)
  abstract = jax.eval_shape(dora.init, KEY, shapes, x)
  real = dora.init(KEY, params, x)
  assert jax.tree.structure(abstract) == jax.tree.structure(real)
  assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, real)


def test_the_config_names_the_variant():
  params, x = example()
  config = lj.LoraConfig(rank=3, alpha=6.0, target="w", variant=lj.DORA)
  trainable = lj.dora(dense, CONFIG).init(KEY, params, x)
  np.testing.assert_array_equal(
    lj.lora(dense, config).apply(params, trainable, x),
    lj.dora(dense, CONFIG).apply(params, trainable, x),
  )
  message = r"other variant: w is DoRA \(lora_a, lora_b, magnitude, norm_squared\), the config's is"
  with pytest.raises(ValueError, match=message):
    lj.lora(dense, CONFIG).apply(params, trainable, x)


def test_a_rule_mixes_variants():
  rules = [lj.LoraRule(r".*/value/kernel", variant=lj.DORA)]
  config = lj.LoraConfig(2, 4.0, r"h_0/attn/(query|value)/kernel", rules=rules)
  mixed = lj.lora(unrolled, config)
  params = make_params()
  trainable = moved(mixed.init(KEY, params, tokens()))
  nodes = trainable["h_0"]["attn"]
  assert set(nodes["query"]["kernel"].arrays) == {"lora_a", "lora_b"}
  assert set(nodes["value"]["kernel"].arrays) > {"magnitude"}
  out = jax.jit(mixed.apply)(params, trainable, tokens())
  expected = unrolled(mixed.merge(params, trainable), tokens())
  assert relative_difference(out, expected) < 1e-5


def test_summary_shardings_and_disk_follow_from_the_table():
  params, x = example()
  config = lj.LoraConfig(rank=3, alpha=6.0, target="w", variant=lj.DORA)
  trainable = moved(lj.lora(dense, config).init(KEY, params, x))
  assert lj.summary(params, trainable, config).splitlines() == [
    "path      weight   lora_a   lora_b   magnitude  rank  scaling  parameters     share",
    "w         8 x 6    8 x 3    3 x 6    6             3        2          48  100.000%",
    "adapter                                                                48  100.000%",
    "base                                                                   48",
  ]
  specs = lj.shardings(trainable, {"w": jax.sharding.PartitionSpec("fsdp", "tensor")})["w"].arrays
  assert {name: tuple(spec) for name, spec in specs.items()} == {
    "lora_a": ("fsdp", None),
    "lora_b": (None, "tensor"),
    "magnitude": ("tensor",),
    "norm_squared": ("tensor",),
  }
  arrays, axes = lj.pack(trainable)
  loaded = lj.unpack(arrays, axes, like=trainable)
  jax.tree.map(np.testing.assert_array_equal, loaded, trainable)
  plain = lj.lora(dense, CONFIG).init(KEY, params, x)
  with pytest.raises(ValueError, match=r"other variant: w is DoRA .*, expected LoRA \(lora_a"):
    lj.unpack(arrays, axes, like=plain)


@functools.cache
def converted(**options):
  params, x = example()
  config = lj.LoraConfig(rank=3, alpha=6.0, target="w", variant=lj.DORA)
  trainable = moved(lj.lora(dense, config).init(KEY, params, x))
  return params, x, config, trainable, lj.convert(config, trainable, params, **options)


def test_arithmetic_is_for_plain_lora_and_convert_leads_there():
  params, x, config, trainable, (plain, low_rank, errors) = converted(energy=1.0)
  with pytest.raises(ValueError, match=r"w is adapted by DoRA .* Use lora_jax.convert first"):
    lj.weighted_sum([(config, trainable)], [1.0], params)
  assert plain.variant is None
  assert low_rank["w"].is_plain
  out = lj.lora(dense, plain).apply(params, low_rank, x)
  expected = lj.lora(dense, config).apply(params, trainable, x)
  assert relative_difference(out, expected) < 1e-5
  assert float(errors["w"]) < 1e-5
  both, doubled = lj.weighted_sum([(plain, low_rank)], [2.0], params)
  assert lj.lora(dense, both).apply(params, doubled, x).shape == expected.shape


def test_convert_returns_its_error():
  params, _, config, trainable, (_, low_rank, errors) = converted(rank=2)
  delta = lj.lora(dense, config).merge(params, trainable)["w"] - params["w"]
  u, s, v = np.linalg.svd(np.asarray(delta, np.float64))
  assert low_rank["w"].rank == 2
  assert float(errors["w"]) == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), rel=1e-4)
  nearest = (u[:, :2] * s[:2]) @ v[:2]
  np.testing.assert_allclose(low_rank["w"].lora_a @ low_rank["w"].lora_b, nearest, atol=1e-5)
  kept = converted(energy=0.9)[-1]
  share = np.cumsum(s**2) / np.sum(s**2)
  assert kept[1]["w"].rank == int(np.argmax(share >= 0.9)) + 1


def test_convert_takes_layers_one_by_one():
  params = make_params(stacked=True)
  config = lj.LoraConfig(
    4, 8.0, r"blocks/attn/query/kernel", stacked_layers=[0, 2], variant=lj.DORA
  )
  trainable = moved(lj.lora(scanned, config).init(KEY, params, tokens()))
  plain, low_rank, errors = lj.convert(config, trainable, params, rank=24)
  out = jax.jit(lj.lora(scanned, plain).apply)(params, low_rank, tokens())
  expected = scanned(lj.lora(scanned, config).merge(params, trainable), tokens())
  assert relative_difference(out, expected) < 1e-4
  assert float(errors["blocks/attn/query/kernel"]) < 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_output_of_zero_weights_stays_finite(dtype):
  params, x = example(dtype)
  params = {"w": params["w"].at[:, 2].set(0)}
  dora = lj.dora(dense, CONFIG)
  trainable = dora.init(KEY, params, x)
  out, grads = jax.jit(
    jax.value_and_grad(lambda t: jnp.sum(dora.apply(params, t, x).astype(jnp.float32) ** 2))
  )(trainable)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves((out, grads)))
  np.testing.assert_array_equal(dora.apply(params, trainable, x), dense(params, x))
  merged = dora.merge(params, moved(trainable))["w"]
  assert bool(jnp.all(jnp.isfinite(merged)))


def test_scalings_of_any_dtype():
  params, x = example()
  dora = lj.dora(dense, CONFIG)
  trainable = moved(dora.init(KEY, params, x))
  expected = dora.apply(params, trainable, x, scaling=100.0)
  for dtype in (jnp.float16, jnp.int8, jnp.float32):
    out = dora.apply(params, trainable, x, scaling=dtype(100))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_float64_weights():
  with jax.enable_x64(True):
    params, x = example(jnp.float64)
    dora = lj.dora(dense, CONFIG)
    trainable = dora.init(KEY, params, x)
    np.testing.assert_array_equal(dora.apply(params, trainable, x), dense(params, x))


def test_layers_without_an_adapter_are_not_copied():
  params = make_params(stacked=True)
  config = lj.LoraConfig(4, 8.0, r"blocks/attn/query/kernel", stacked_layers=[0, 2])
  dora = lj.dora(scanned, config)
  trainable = dora.init(KEY, params, tokens())
  jaxpr = jax.make_jaxpr(dora.apply)(params, trainable, tokens())
  assert count_of_sizes(jaxpr, {2 * 24 * 24}) == 0
  copied = jax.make_jaxpr(lambda w: jnp.take(w, jnp.array([0, 2]), axis=0))
  stack = params["blocks"]["attn"]["query"]["kernel"]
  assert count_of_sizes(copied(stack), {2 * 24 * 24}) > 0  # the count can tell


@pytest.mark.parametrize(("fn", "uses"), [(dense, 1), (jax.checkpoint(dense), 2)])
def test_the_norm_reads_the_weight_once_and_by_matmuls(fn, uses):
  params, x = example()
  dora = lj.dora(fn, CONFIG)
  trainable = dora.init(KEY, params, x)
  loss = jax.grad(lambda trainable: jnp.sum(dora.apply(params, trainable, x)))
  dots = [
    e for e in equations(jax.make_jaxpr(loss)(trainable)) if e.primitive.name == "dot_general"
  ]
  reads = [dot for dot in dots if (8, 6) in [operand.aval.shape for operand in dot.invars]]
  assert len(reads) == uses + 1  # of the layer, and of the norm
  assert all(dot.params["dimension_numbers"][1] == ((), ()) for dot in dots)  # XLA is slow at these


def test_the_norm_of_a_quantized_stack_dequantizes_one_layer_at_a_time():
  def fn(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

  draw = np.random.default_rng(0).standard_normal
  params = {"w": jnp.asarray(draw((3, 32, 32)), jnp.float32)}
  quantized, x = lj.quantize(params, "int8", target="w"), jnp.asarray(draw((2, 32)), jnp.float32)
  dora = lj.dora(fn, dataclasses.replace(CONFIG, stacked_layers=(0, 2)))
  trainable = moved(dora.init(KEY, quantized, x))
  outputs = [dora.apply(p, trainable, x) for p in (quantized, lj.dequantize(quantized))]
  assert relative_difference(*outputs) < 1e-5
  jaxpr = jax.make_jaxpr(dora.apply)(quantized, trainable, x)
  assert count_of_sizes(jaxpr, {32**2}) > 0
  assert count_of_sizes(jaxpr, {2 * 32**2, 3 * 32**2}) == 0


def test_dora_of_a_config_of_another_variant():
  config = lj.LoraConfig(rank=3, alpha=6.0, target="w", variant=toys.GAIN_OUT)
  with pytest.raises(ValueError, match="DoRA got a config of another variant, gain over batch out"):
    lj.dora(dense, config)


def test_a_config_with_a_variant_can_be_hashed_and_pickled():
  config = lj.LoraConfig(rank=3, alpha=6.0, target="w", variant=lj.DORA)
  assert hash(config) == hash(dataclasses.replace(config))
  assert pickle.loads(pickle.dumps(config)) == config
