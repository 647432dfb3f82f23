"""(IA)^3: the paper's formula, biases that are scaled and those that cannot be, PEFT's logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

import lora_jax as lj
from experiments.configs import finetune as finetune_configs
from experiments.harness.config import read_config, replace_fields
from experiments.harness.methods import lora_config
from experiments.nlg.config import FinetuneConfig
from lora_jax.adapters.biases import find_biases
from lora_jax.adapters.targets import find_leaves

from tests import make_shared_golden as golden
from tests import parity
from tests.experiments.harness.test_methods import MODELS
from tests.toy_models import relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=1, alpha=1.0, target=".*/kernel", variant=lj.IA3)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def randomized(trainable):
  return jax.tree.map(lambda x: x + 0.5 * normal(*x.shape, seed=1), trainable)


def test_biases_that_are_not_a_mapping_are_refused():
  with pytest.raises(ValueError, match=r"biases must be a mapping from the paths .* got 3"):
    lj.ia3_variant(3)  # pyright: ignore[reportArgumentType]


def dense(p, x):
  return x @ p["kernel"] + p["bias"][None]


def layer(params, x):
  return dense(params["down"], jnp.tanh(dense(params["value"], x)))


def module(d_in, d_out, seed):
  return {"kernel": normal(d_in, d_out, seed=seed), "bias": normal(d_out, seed=seed + 1)}


def example():
  return {"value": module(4, 6, 2), "down": module(6, 5, 4)}, normal(3, 4)


def test_outputs_and_gradients_are_the_papers():
  params, x = example()
  plain = dataclasses.replace(CONFIG, variant=None)
  ia3 = lj.ia3(layer, plain, feedforward="down/kernel")
  start = ia3.init(KEY, params, x)
  np.testing.assert_array_equal(jax.jit(ia3.apply)(params, start, x), jax.jit(layer)(params, x))
  trainable = randomized(start)
  assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 6 + 6  # d_v + d_ff

  def paper(trainable):
    gains = [trainable[name]["kernel"].ia3_gain[None] for name in ("value", "down")]
    hidden = jnp.tanh(dense(params["value"], x) * gains[0])  # with its bias
    return jnp.sum(dense(params["down"], hidden * gains[1]) ** 2)  # without

  def loss(trainable):
    return jnp.sum(ia3.apply(params, trainable, x) ** 2)

  def merged(trainable):
    return jnp.sum(layer(ia3.merge(params, trainable), x) ** 2)

  both = jax.jit(lambda t: [jax.grad(f)(t) for f in (loss, merged, paper)])
  got, of_merged, expected = both(trainable)
  assert relative_difference(got, expected) < 1e-5
  assert relative_difference(of_merged, expected) < 1e-5


@pytest.mark.parametrize("layers", [None, (2, 0)])
def test_a_stack_of_biases_is_scaled_in_the_adapted_layers(layers):
  params = {"h": {"kernel": normal(3, 4, 4), "bias": normal(3, 4, seed=1)}}
  x = normal(2, 4, seed=2)

  def fn(params, x):
    body = jax.checkpoint(lambda x, p: (jnp.tanh(dense(p, x)), None))
    return lax.scan(body, x, params["h"])[0]

  ia3 = lj.lora(fn, dataclasses.replace(CONFIG, stacked_layers=layers))
  trainable = randomized(ia3.init(KEY, params, x))
  merged = ia3.merge(params, trainable)
  assert relative_difference(jax.jit(ia3.apply)(params, trainable, x), fn(merged, x)) < 1e-5
  for i in range(3):
    ratio = merged["h"]["bias"][i] / params["h"]["bias"][i]
    if layers is None or i in layers:
      row = i if layers is None else layers.index(i)
      gain = trainable["h"]["kernel"].ia3_gain[row]
      np.testing.assert_allclose(ratio, gain, rtol=1e-5)
    else:
      np.testing.assert_array_equal(ratio, 1.0)


def heads(params, x):
  """Several output axes, and an Equinox-like bias with axes of size 1."""
  h = jnp.einsum("bi,ihd->bhd", x, params["q"]["kernel"]) + params["q"]["bias"][None]
  return jnp.einsum("bhd,ohd->bo", h, params["o"]["kernel"]) + params["o"]["b"][:, 0][None]


def test_biases_of_several_axes_and_of_another_name():
  params = {
    "q": {"kernel": normal(4, 2, 3), "bias": normal(2, 3, seed=1)},
    "o": {"kernel": normal(5, 2, 3, seed=2), "b": normal(5, 1, seed=3)},
  }
  x = normal(2, 4, seed=4)
  ia3 = lj.lora(heads, CONFIG)
  trainable = randomized(ia3.init(KEY, params, x))
  out = ia3.apply(params, trainable, x)
  assert relative_difference(out, heads(ia3.merge(params, trainable), x)) < 1e-5
  gain = trainable["o"]["kernel"].ia3_gain
  last = lj.lora(heads, dataclasses.replace(CONFIG, target="q/kernel"))
  before = last.apply(params, {"q": trainable["q"]}, x)
  assert relative_difference(out, before * gain[None]) < 1e-5


def flat(params, x):
  return (x @ params["wk"] + params["bk"][None]) * (x @ params["wv"] + params["bv"][None])


FLAT = {"wk": normal(4, 3), "bk": normal(3, seed=1), "wv": normal(4, 3, seed=2)} | {
  "bv": normal(3, seed=3)
}


def test_biases_that_the_user_names():
  biases = {"wk": "bk", "wv": "bv"}
  config = dataclasses.replace(CONFIG, target="w.", variant=lj.ia3_variant(biases))
  x = normal(2, 4)
  ia3 = lj.lora(flat, config)
  trainable = randomized(ia3.init(KEY, FLAT, x))
  gain = trainable["wk"].ia3_gain * trainable["wv"].ia3_gain
  assert relative_difference(ia3.apply(FLAT, trainable, x), flat(FLAT, x) * gain[None]) < 1e-5


def refused(fn, params, message, **changes):
  settings = {"target": ".*w.?"} | changes
  with pytest.raises(ValueError, match=message):
    lj.lora(fn, dataclasses.replace(CONFIG, **settings)).init(KEY, params, normal(2, 4))


def test_to_lora_says_that_biases_are_scaled():
  params, x = example()
  trainable = lj.lora(layer, CONFIG).init(KEY, params, x)
  with pytest.raises(ValueError, match=r"/bias is scaled with .*\. Merge the adapter instead"):
    lj.to_lora(CONFIG, trainable, params)


def test_a_bias_that_cannot_be_found_is_refused():
  refused(
    flat, FLAT, "bk may be the bias of w[kv], and would have to be scaled with it. Name the b"
  )
  swapped = lj.ia3_variant({"wk": "bk", "wv": "bk"})
  refused(flat, FLAT, "bk is scaled as the bias of wv, and adapted or fully", variant=swapped)
  lost = lj.ia3_variant({"wk": "bq", "wv": "bv"})
  refused(flat, FLAT, "no leaf 'bq', the bias of wk. Did you mean b", variant=lost)
  none = lj.ia3_variant({"wk": None})
  refused(flat, FLAT, "may be the bias of wv", variant=none)
  crossed = lj.ia3_variant({"wk": "bv", "wv": "bk"})
  refused(flat, FLAT, "b[kv] is not only added to the output of w[kv], .* used by 'add' at .*test_",
          variant=crossed)  # fmt: skip


def branch(params, x):
  return lax.cond(x[0, 0] > 0, dense_w, lambda p, x: -dense_w(p, x), params["m"], x)


def dense_w(p, x):
  return x @ p["w"] + p["bias"][None]


USES = {
  "a residual first": lambda p, x: (x @ p["w"] + x) + p["bias"][None],
  "of the input": lambda p, x: (x + p["bias"][None]) @ p["w"] + p["bias"][None],
  "after a nonlinearity": lambda p, x: jnp.tanh(x @ p["w"]) + p["bias"][None],
  "after another matmul": lambda p, x: (x @ p["w"]) @ x.mT @ x + p["bias"][None],
  "after a product": lambda p, x: (x @ p["w"]) * (x @ p["w"]) + p["bias"][None],
  "after an inverse": lambda p, x: x / (x @ p["w"]) + p["bias"][None],
  "twice": lambda p, x: dense_w(p, x) * p["bias"][None],
  "in a loop": lambda p, x: lax.fori_loop(0, 2, lambda i, y: y * p["bias"][None], x @ p["w"]),
  "in a later iteration": lambda p, x: lax.fori_loop(
    0, 2, lambda i, y: jnp.tanh(y + p["bias"][None]), x @ p["w"]
  ),
  "swapped in a loop": lambda p, x: (
    (x @ p["w"])
    * lax.fori_loop(0, 3, lambda i, y: y[::-1], (p["bias"], jnp.zeros_like(p["bias"])))[1][None]
  ),
  "in one branch": lambda p, x: (
    (x @ p["w"]) * lax.cond(x[0, 0] > 0, lambda: p["bias"], lambda: x[0])[None]
  ),
  "returned": lambda p, x: (dense_w(p, x), p["bias"]),
}


@pytest.mark.parametrize("use", USES)
def test_a_bias_with_another_use_is_refused(use):
  fn = lambda params, x: USES[use](params["m"], x)  # noqa: E731
  params = {"m": {"w": normal(4, 4), "bias": normal(4, seed=1)}}
  refused(fn, params, "m/bias is not only added to the output of m/w, .* it is (used|returned) by")


def test_uses_inside_control_flow_are_seen():
  params = {"m": {"w": normal(4, 4), "bias": normal(4, seed=1)}}
  ia3 = lj.lora(branch, dataclasses.replace(CONFIG, target="m/w"))
  x = normal(2, 4)
  trainable = randomized(ia3.init(KEY, params, x))
  gain = trainable["m"]["w"].ia3_gain[None]
  assert relative_difference(ia3.apply(params, trainable, x), branch(params, x) * gain) < 1e-5


def test_other_misfits_are_refused():
  params, x = example()
  wrong = {"value": params["value"] | {"bias": jnp.zeros(5)}}
  ones = lambda p, x: x @ p["value"]["kernel"] + p["value"]["bias"].sum()  # noqa: E731
  refused(ones, wrong, r"value/bias is float32 of shape \(5,\), and the bias of value/kernel would",
          target=".*kernel")  # fmt: skip
  extra = dataclasses.replace(CONFIG, extra="value/bias")
  with pytest.raises(ValueError, match="value/bias is scaled as the bias of value/kernel, and ada"):
    lj.lora(layer, extra).init(KEY, params, x)
  dropping = dataclasses.replace(CONFIG, dropout=0.1)
  with pytest.raises(ValueError, match="dropout"):
    lj.lora(layer, dropping).init(KEY, params, x)
  with pytest.raises(ValueError, match=r"\(IA\)\^3 got a config of another variant, DoRA"):
    lj.ia3(layer, dataclasses.replace(CONFIG, variant=lj.DORA), feedforward="down.*")
  with pytest.raises(ValueError, match="the rule 'up' matches none"):
    lj.ia3(layer, CONFIG, feedforward="up").init(KEY, params, x)
  trainable = lj.lora(layer, CONFIG).init(KEY, params, x)
  with pytest.raises(ValueError, match=r"/bias is scaled with .*/kernel, and plain LoRA leaves"):
    lj.convert(CONFIG, trainable, params, rank=2)
  bias = lj.IA3.bias._replace(array="gain")
  with pytest.raises(ValueError, match="bias names 'gain', expected an array of 'batch out'"):
    dataclasses.replace(CONFIG, variant=lj.IA3._replace(bias=bias))


@pytest.mark.long
def test_biases_of_a_bfloat16_and_of_a_quantized_layer():
  params, x = example()
  low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
  ia3 = lj.lora(layer, CONFIG)
  start = ia3.init(KEY, low, x)
  out = ia3.merge(low, randomized(start))
  assert out["value"]["bias"].dtype == jnp.bfloat16
  quantized = lj.quantize(params, "int8", "value/kernel")
  trainable = randomized(ia3.init(KEY, quantized, x))
  expected = layer(ia3.merge(lj.dequantize(quantized), trainable), x)
  assert relative_difference(ia3.apply(quantized, trainable, x), expected) < 1e-5


@pytest.mark.long  # in CI tests/interop/peft/test_variants.py reads such an adapter
def test_the_logits_are_pefts():
  base, _, _ = golden.ADAPTERS["ia3"]
  arrays = load_file(golden.GOLDEN / "ia3.safetensors")
  family = parity.family_of(base)
  model_config, params = family.load(golden.MODELS / base)
  fn, inputs = parity.function(base, model_config), parity.inputs_of(base)
  config = lj.LoraConfig(1, 1.0, r"layers_\d/(attn/(key|value)|mlp/down)/kernel")
  ia3 = lj.ia3(fn, config, feedforward=r".*/mlp/down/kernel")
  trainable = ia3.init(KEY, params, *inputs)
  names = {"k_proj": "attn/key", "v_proj": "attn/value", "down_proj": "mlp/down"}
  for name, array in arrays.items():
    if name == "logits":
      continue
    parts = name.split(".")
    group, kind = names[parts[-2]].split("/")
    place = trainable[f"layers_{parts[4]}"][group][kind]
    place["kernel"] = place["kernel"].replace(ia3_gain=jnp.asarray(array.ravel()))
  out = jax.jit(ia3.apply)(params, trainable, *inputs)
  assert relative_difference(out, arrays["logits"]) < 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_the_biases_of_each_model_are_scaled(family):
  module, _ = MODELS[family]
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.eval_shape(module.init, KEY, tokens)["params"]
  config = lora_config(apply_changes({"method": "ia3", "lora.dropout": 0.1}))
  fn = lambda params, tokens: module.apply({"params": params}, tokens)  # noqa: E731
  trainable = jax.eval_shape(lj.lora(fn, config).init, KEY, params, tokens)
  layers = 1 if family == "gpt2_scanned" else 2
  assert len(jax.tree.leaves(trainable)) == 3 * layers
  targets, extra = find_leaves(config, params)
  biases = find_biases(targets, extra, params)
  has_biases = family not in ("llama", "mixture")
  assert len(biases) == (2 * layers if has_biases else 0)
  assert all(bias.path == path.replace("kernel", "bias") for path, bias in biases.items())


def apply_changes(changes):
  config = read_config(FinetuneConfig, finetune_configs.get_config())
  return replace_fields(config, changes)
