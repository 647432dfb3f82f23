"""Trainable tokens: the chosen rows change, also in a tied head, and no others; PEFT's logits."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.trees import leaves_with_path

from tests import make_shared_golden as golden
from tests import parity
from tests.jaxprs import count_of_sizes
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
TOKENS = (9, 2, 5)
CONFIG = lj.LoraConfig(1, 1.0, target="embed", variant=lj.trainable_tokens_variant(TOKENS))


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tied(params, ids):
  x = jnp.tanh(params["embed"][ids])
  return x @ params["embed"].T


def example():
  return {"embed": normal(12, 4)}, jnp.asarray([[2, 9, 1], [0, 5, 5]])


def test_outputs_and_gradients_are_those_of_new_rows():
  params, ids = example()
  adapted = lj.trainable_tokens(tied, dataclasses.replace(CONFIG, variant=None), TOKENS)
  start = adapted.init(KEY, params, ids)
  expected = jax.jit(tied)(params, ids)
  np.testing.assert_array_equal(jax.jit(adapted.apply)(params, start, ids), expected)
  trainable = randomized(start)
  assert trainable["embed"].token_delta.shape == (3, 4)

  def rows(trainable):
    new = params["embed"].at[jnp.asarray(TOKENS)].add(trainable["embed"].token_delta)
    return jnp.sum(jnp.sin(tied({"embed": new}, ids)))

  def loss(trainable):
    return jnp.sum(jnp.sin(adapted.apply(params, trainable, ids)))

  got, expected = (jax.jit(jax.grad(f))(trainable)["embed"].token_delta for f in (loss, rows))
  assert relative_difference(got, expected) < 1e-5
  merged = adapted.merge(params, trainable)["embed"]
  kept = [i for i in range(12) if i not in TOKENS]
  np.testing.assert_array_equal(merged[np.array(kept)], params["embed"][np.array(kept)])
  for i, token in enumerate(TOKENS):
    new = params["embed"][token] + trainable["embed"].token_delta[i]
    np.testing.assert_array_equal(merged[token], new)


def test_nothing_of_the_size_of_the_table_is_made_or_trained():
  params, ids = example()
  adapted = lj.lora(tied, CONFIG)
  trainable = adapted.init(KEY, params, ids)
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  part, frozen = lj.partition(trainable, mask)
  assert [leaf.shape for leaf in jax.tree.leaves(part)] == [(3, 4)]

  def loss(part, ids):
    return jnp.sum(adapted.apply(params, lj.combine(part, frozen), ids))

  step = jax.make_jaxpr(jax.grad(loss))(part, ids)
  base = jax.make_jaxpr(lambda ids: tied(params, ids))(ids)
  assert count_of_sizes(step, {48}) <= count_of_sizes(base, {48})


@pytest.mark.long
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_table_that_is_sharded(kind):
  params, ids = example()
  spec = P("fsdp", "tensor")
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
  out_spec = P("data", None, None) if kind == AxisType.Explicit else None

  def fn(params, ids):
    x = jnp.tanh(params["embed"].at[ids].get(out_sharding=out_spec))
    return jnp.einsum("btd,vd->btv", x, params["embed"], out_sharding=out_spec)

  adapted = lj.lora(tied, CONFIG)
  trainable = randomized(adapted.init(KEY, params, ids))
  expected = adapted.apply(params, trainable, ids)
  with jax.set_mesh(mesh):
    adapted = lj.lora(fn, CONFIG)
    params = {"embed": jax.device_put(params["embed"], NamedSharding(mesh, spec))}
    ids = jax.device_put(ids, NamedSharding(mesh, P("data")))
    start = adapted.init(KEY, params, ids)
    assert start["embed"].token_delta.sharding.spec == P(None, "tensor")
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), trainable, start)
    out = jax.jit(adapted.apply)(params, placed, ids)
  assert relative_difference(np.asarray(out), expected) < 1e-5


def test_beside_lora_and_on_a_quantized_table():
  plain = {"embed": normal(12, 64), "w": normal(64, 5, seed=1)}
  ids = jnp.asarray([2, 9, 0])
  params = lj.quantize(plain, "int8", "embed", axis=-1)
  fn = lambda p, ids: p["embed"][ids] @ p["w"]  # noqa: E731
  rules = [lj.LoraRule("embed", variant=lj.trainable_tokens_variant(TOKENS))]
  adapted = lj.lora(fn, lj.LoraConfig(2, 2.0, ".*", rules=rules))
  trainable = randomized(adapted.init(KEY, params, ids))
  expected = fn(adapted.merge(lj.dequantize(params), trainable), ids)
  assert relative_difference(adapted.apply(params, trainable, ids), expected) < 1e-5


def test_the_ids_are_stored_with_the_adapter():
  params, ids = example()
  trainable = lj.lora(tied, CONFIG).init(KEY, params, ids)
  arrays, axes = lj.pack(trainable)
  assert arrays["embed/token_ids"].tolist() == list(TOKENS)
  assert dict(leaves_with_path(lj.unpack(arrays, axes, like=trainable))).keys() == arrays.keys()
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainable)
  with pytest.raises(ValueError, match="token_ids must be float32, got bfloat16"):
    lj.lora(tied, CONFIG).apply(params, low, ids)
  variant = lj.trainable_tokens_variant(TOKENS)
  assert pickle.loads(pickle.dumps(variant)) == variant != lj.trainable_tokens_variant((1, 2, 3))
  assert "token_delta" in lj.summary(params, trainable, CONFIG)


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    ((), "tokens must be ids, each given once, got"),
    ((3, 3), r"tokens must be ids, each given once, got \[3, 3\]"),
    ((3, -1), "tokens.* must be an integer in"),
    ((1.5,), "tokens"),
    ("35", "tokens"),
  ],
)
def test_bad_tokens_are_refused(tokens, message):
  with pytest.raises(ValueError, match=message):
    lj.trainable_tokens_variant(tokens)


def test_weights_that_are_no_tables_are_refused():
  params, ids = example()
  late = dataclasses.replace(CONFIG, variant=lj.trainable_tokens_variant([12]))
  with pytest.raises(ValueError, match="embed: token 12 is not among its 12 rows"):
    lj.lora(tied, late).init(KEY, params, ids)
  dense = lambda p, x: x @ p["embed"]  # noqa: E731
  with pytest.raises(ValueError, match="embed: trainable tokens are rows that are looked up"):
    lj.lora(dense, CONFIG).init(KEY, params, normal(2, 12))
  dropping = dataclasses.replace(CONFIG, dropout=0.1)
  with pytest.raises(ValueError, match=r"embed: LoRA dropout \(0.1\) acts on"):
    lj.lora(tied, dropping).init(KEY, params, ids)
  other = dataclasses.replace(CONFIG, variant=lj.DORA)
  with pytest.raises(ValueError, match="trainable tokens got a config of another variant, DoRA"):
    lj.trainable_tokens(tied, other, TOKENS)


@pytest.mark.long  # in CI tests/interop/peft/test_variants.py reads such an adapter
def test_the_logits_are_pefts():
  base, _, _ = golden.ADAPTERS["trainable_tokens"]
  arrays = load_file(golden.GOLDEN / "trainable_tokens.safetensors")
  family = parity.family_of(base)
  model_config, params = family.load(golden.MODELS / base)
  fn, inputs = parity.function(base, model_config), parity.inputs_of(base)
  config = lj.LoraConfig(1, 1.0, "wte/embedding")
  adapted = lj.trainable_tokens(fn, config, golden.TOKENS)
  trainable = adapted.init(KEY, params, *inputs)
  rows = jnp.asarray(arrays["base_model.model.transformer.wte.trainable_tokens_delta"])
  delta = rows - params["wte"]["embedding"][jnp.asarray(golden.TOKENS)]
  node = trainable["wte"]["embedding"]
  trainable["wte"]["embedding"] = node.replace(token_delta=delta)
  assert float(jnp.abs(delta).min()) > 1e-4
  out = jax.jit(adapted.apply)(params, trainable, *inputs)
  assert relative_difference(out, arrays["logits"]) < 1e-5
