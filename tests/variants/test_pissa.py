"""PiSSA, OLoRA and MiLoRA: their starts, step 0 to the bit, PEFT's outputs, exact plain LoRA."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj

from tests.make_pissa_golden import ALPHA, GOLDEN, RANK
from tests.toy_models import make_params, relative_difference, scanned, tokens, unrolled

KEY = jax.random.key(0)
VARIANTS = {"pissa": lj.PISSA, "olora": lj.OLORA, "milora": lj.MILORA}


def normal(*shape, seed=0, scale=1.0):
  return jnp.asarray(np.float32(scale * np.random.default_rng(seed).standard_normal(shape)))


def dense(params, x):
  return x @ params["w"]


def config_of(variant, alpha=6.0):
  return lj.LoraConfig(rank=3, alpha=alpha, target="w", variant=variant)


def moved(trainable):
  """Returns an adapter after some training: its trained arrays have changed."""
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  trained, frozen = lj.partition(trainable, mask)
  leaves, structure = jax.tree.flatten(trained)
  drawn = [leaf + normal(*leaf.shape, seed=i, scale=0.3) for i, leaf in enumerate(leaves)]
  return lj.combine(jax.tree.unflatten(structure, drawn), frozen)


def initial(variant, w, **options):
  config = config_of(variant, **options)
  return lj.lora(dense, config).init(KEY, {"w": w}, jnp.ones((1, len(w))))["w"]


@pytest.mark.parametrize(("name", "terms"), [("pissa", slice(3)), ("milora", slice(-3, None))])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_the_start_is_a_part_of_the_decomposition(name, terms, shape):
  w = normal(*shape)
  node = initial(VARIANTS[name], w)
  u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
  expected = (u[:, terms] * s[terms]) @ v[terms]
  np.testing.assert_allclose(2.0 * node.lora_a @ node.lora_b, expected, atol=1e-5)
  norms = np.linalg.norm(node.lora_a, axis=0), np.linalg.norm(node.lora_b, axis=1)
  np.testing.assert_allclose(norms, [np.sqrt(s[terms] / 2)] * 2, rtol=1e-4)
  np.testing.assert_array_equal(node.initial_a, node.lora_a)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_olora_is_a_part_of_the_qr_decomposition(shape):
  w = normal(*shape)
  node = initial(lj.OLORA, w)
  q, r = np.linalg.qr(np.asarray(w, np.float64).T)
  np.testing.assert_allclose(node.lora_a @ node.lora_b, (q[:, :3] @ r[:3]).T, atol=1e-5)
  np.testing.assert_allclose(node.lora_b @ node.lora_b.T, np.eye(3), atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_gradients_are_those_of_the_residual_and_the_trained_factors(name):
  w, x = normal(8, 6), normal(5, 8, seed=1)
  adapted = lj.lora(dense, config_of(VARIANTS[name]))
  trainable = moved(adapted.init(KEY, {"w": w}, x))

  def loss(a, b, x):
    node = {"w": trainable["w"].replace(lora_a=a, lora_b=b)}
    return jnp.sum(jnp.tanh(adapted.apply({"w": w}, node, x)))

  def expected_loss(a, b, x):
    residual = w - 2.0 * trainable["w"].initial_a @ trainable["w"].initial_b
    return jnp.sum(jnp.tanh(x @ residual + 2.0 * x @ a @ b))

  factors = trainable["w"].lora_a, trainable["w"].lora_b, x
  got, expected = (jax.grad(f, argnums=(0, 1, 2))(*factors) for f in (loss, expected_loss))
  for one, other in zip(got, expected, strict=True):
    assert relative_difference(one, other) < 1e-5


def test_step_0_is_the_base_model_to_the_bit_in_bfloat16():
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params(stacked=True))
  config = lj.LoraConfig(4, 8.0, r"blocks/.*/kernel", stacked_layers=[0, 2], variant=lj.PISSA)
  adapted = lj.lora(scanned, config)
  trainable = adapted.init(KEY, params, tokens())
  out = jax.jit(adapted.apply)(params, trainable, tokens())
  np.testing.assert_array_equal(out, jax.jit(scanned)(params, tokens()))


def test_step_0_is_the_base_model_under_dropout_too():
  w, x = normal(8, 6), normal(5, 8, seed=1)
  adapted = lj.lora(dense, lj.LoraConfig(3, 6.0, "w", dropout=0.5, variant=lj.PISSA))
  trainable = adapted.init(KEY, {"w": w}, x)
  out = adapted.apply({"w": w}, trainable, x, lora_key=KEY)
  np.testing.assert_array_equal(out, dense({"w": w}, x))
  trainable = moved(trainable)
  outs = [adapted.apply({"w": w}, trainable, x, lora_key=key) for key in (KEY, None)]
  assert relative_difference(*outs) > 0.1


def signs(node, a):
  """Returns the sign of each of PEFT's terms against ours."""
  return np.sign(np.sum(np.asarray(node.lora_a) * a.T, axis=0))


@pytest.mark.parametrize(
  ("variant", "init"),
  [(lj.PISSA, "pissa"), (lj.pissa_variant(16), "pissa"), (lj.OLORA, "olora")],
  ids=["pissa", "pissa_16", "olora"],
)
def test_it_agrees_with_peft(variant, init):
  golden = load_file(GOLDEN / f"{init}.safetensors")
  params, x = {"w": jnp.asarray(golden["weight"].T)}, jnp.asarray(golden["x"])
  adapted = lj.lora(dense, lj.LoraConfig(RANK, float(ALPHA), "w", variant=variant))
  trainable = adapted.init(KEY, params, x)
  node, sign = trainable["w"], signs(trainable["w"], golden["initial_a"])
  initial_a, initial_b = (np.asarray(array) for array in (node.lora_a, node.lora_b))
  np.testing.assert_allclose(initial_a * sign, golden["initial_a"].T, atol=2e-5)
  np.testing.assert_allclose(initial_b * sign[:, None], golden["initial_b"].T, atol=2e-5)
  np.testing.assert_allclose(adapted.apply(params, trainable, x), golden["first"], atol=1e-5)
  a, b = golden["a"].T * sign, golden["b"].T * sign[:, None]
  trainable = {"w": node.replace(lora_a=jnp.asarray(a), lora_b=jnp.asarray(b))}
  out = adapted.apply(params, trainable, x)
  assert relative_difference(out, jnp.asarray(golden["trained"])) < 1e-5


def test_subspace_iterations_converge_to_the_decomposition():
  u, _, v = np.linalg.svd(normal(40, 30), full_matrices=False)
  w = jnp.asarray((u * 0.8 ** np.arange(30)) @ v, jnp.float32)
  exact = initial(lj.PISSA, w)
  errors = []
  for count in (1, 8):
    node = initial(lj.pissa_variant(count), w)
    errors.append(relative_difference(node.lora_a @ node.lora_b, exact.lora_a @ exact.lora_b))
  assert errors[1] < 1e-3 < errors[0]


def test_variants_are_values():
  assert lj.pissa_variant() == lj.PISSA != lj.pissa_variant(4)
  assert pickle.loads(pickle.dumps(config_of(lj.PISSA))) == config_of(lj.PISSA)
  with pytest.raises(ValueError, match="num_iterations"):
    lj.pissa_variant(0)
  with pytest.raises(ValueError, match="PiSSA got a config of another variant, OLoRA"):
    lj.pissa(dense, config_of(lj.OLORA))


def test_a_negative_alpha_and_shapes_without_values_are_refused():
  with pytest.raises(ValueError, match=r"w: .* scaling is -2.0; expected a positive alpha"):
    initial(lj.PISSA, normal(8, 6), alpha=-6.0)
  with pytest.raises(ValueError, match="w: this variant is initialized from the weight's values"):
    lj.lora(dense, config_of(lj.MILORA)).init(
      KEY, {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}, normal(5, 8)
    )


def test_a_trained_parameter_count_of_a_block():
  """rank * (inputs + outputs) of each weight; as many arrays are frozen."""
  params = {name: leaf for name, leaf in make_params().items() if name in ("embed", "h_0")}
  config = lj.LoraConfig(4, 8.0, "h_0/.*kernel", variant=lj.PISSA)

  def block(params, tokens):
    return unrolled(params | {"h_1": params["h_0"], "h_2": params["h_0"]}, tokens)

  shapes = jax.eval_shape(lj.lora(block, config).init, KEY, params, tokens())
  mask = lj.trainable_mask({"base": None, "adapter": shapes})["adapter"]
  counts = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in lj.partition(shapes, mask)]
  assert counts == [4 * (4 * (24 + 24) + 2 * (24 + 96))] * 2


def layers(params, ids):
  x, _ = jax.lax.scan(lambda x, w: (x @ w, None), params["embedding"][ids], params["stack"])
  return x @ params["qa"] @ params["xs"] @ params["plain"]


def mixed():
  shapes = {"embedding": (9, 8), "stack": (3, 8, 8), "qa": (8, 8), "xs": (8, 6), "plain": (6, 7)}
  params = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
  rules = [
    lj.LoraRule("stack", variant=lj.OLORA, stacked_layers=[0, 2]),
    lj.LoraRule("qa", variant=lj.qa_lora_variant(2)),
    lj.LoraRule("xs", variant=lj.LORA_XS),
    lj.LoraRule("plain", variant=lj.LORA, rank=2, alpha=3.0),
  ]
  config = lj.LoraConfig(3, 6.0, ".*", rules=rules, variant=lj.PISSA)
  return params, config, moved(lj.lora(layers, config).init(KEY, params, jnp.arange(4)))


def test_to_lora_changes_the_weights_alike():
  params, config, trainable = mixed()
  plain, low_rank = lj.to_lora(config, trainable, params)
  shapes = jax.eval_shape(lambda: params)
  jax.tree.map(np.testing.assert_array_equal, lj.to_lora(config, trainable, shapes)[1], low_rank)
  assert plain.variant is None
  ranks = {"embedding": 6, "stack": 6, "qa": 3, "xs": 3, "plain": 2}
  assert {name: node.rank for name, node in low_rank.items()} == ranks
  assert low_rank["stack"].layers == (0, 2)
  merged = lj.lora(layers, config).merge(params, trainable)
  expected = lj.lora(layers, plain).merge(params, low_rank)
  for name, array in merged.items():
    assert relative_difference(array, params[name]) > 0.01
    np.testing.assert_allclose(array, expected[name], atol=1e-5)


def test_plain_lora_can_be_summed_and_a_gain_is_refused():
  w, x = normal(8, 6), normal(5, 8, seed=1)
  adapted = lj.lora(dense, config_of(lj.PISSA))
  trainable = moved(adapted.init(KEY, {"w": w}, x))
  with pytest.raises(ValueError, match=r"w is adapted by PiSSA .* Use lora_jax.convert first"):
    lj.weighted_sum([(config_of(lj.PISSA), trainable)], [1.0], {"w": w})
  plain = lj.to_lora(config_of(lj.PISSA), trainable, {"w": w})
  twice, tree = lj.weighted_sum([plain, plain], [1.5, -0.5], {"w": w})
  out = lj.lora(dense, twice).apply({"w": w}, tree, x)
  assert relative_difference(out, adapted.apply({"w": w}, trainable, x)) < 1e-5
  dora = lj.dora(dense, config_of(None)).init(KEY, {"w": w}, x)
  with pytest.raises(ValueError, match="w: DoRA changes the weight by more than low-rank terms"):
    lj.to_lora(config_of(lj.DORA), dora, {"w": w})


def test_a_quantized_base_model():
  base = lj.quantize({"w": normal(64, 6)}, "int8", target="w")
  x = normal(5, 64, seed=1)
  adapted = lj.lora(dense, config_of(lj.PISSA))
  trainable = adapted.init(KEY, base, x)
  out = jax.jit(adapted.apply)(base, trainable, x)
  np.testing.assert_array_equal(out, jax.jit(lj.dequantized(dense))(base, x))
  plain, low_rank = lj.to_lora(config_of(lj.PISSA), moved(trainable), base)
  expected = adapted.merge(lj.dequantize(base), moved(trainable))
  got = lj.lora(dense, plain).merge(lj.dequantize(base), low_rank)
  np.testing.assert_allclose(got["w"], expected["w"], atol=1e-5)


def test_shardings_and_disk_follow_from_the_table():
  w, x = normal(8, 6), normal(5, 8, seed=1)
  trainable = moved(lj.lora(dense, config_of(lj.PISSA)).init(KEY, {"w": w}, x))
  specs = lj.shardings(trainable, {"w": jax.sharding.PartitionSpec("fsdp", "tensor")})["w"].arrays
  assert {name: tuple(spec) for name, spec in specs.items()} == {
    **dict.fromkeys(("lora_a", "initial_a"), ("fsdp", None)),
    **dict.fromkeys(("lora_b", "initial_b"), (None, "tensor")),
  }
  jax.tree.map(
    np.testing.assert_array_equal, lj.unpack(*lj.pack(trainable), like=trainable), trainable
  )
