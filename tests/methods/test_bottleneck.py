"""Bottleneck adapters: a model with the layers built in, the paper's counts, caches, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lj
from lora_jax.marks import ATTENTION_OUTPUT, LAYER_OUTPUT, MLP_OUTPUT
from lora_jax.methods.bottleneck import BottleneckConfig, bottleneck
from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.models.gpt2.model import (
  GPT2,
  MLP,
  Attention,
  Block,
  GPT2Config,
  init_cache,
  layer_norm,
)
from lora_jax.models.parts.causal_lm import make_layers, shapes_of

from tests.docs.pages import code_blocks, page
from tests.experiments.harness.test_methods import MODELS
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
TINY = GPT2Config(
  vocab_size=40, num_positions=16, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24
)
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 40, (2, 6)), jnp.int32)
EVERYWHERE = BottleneckConfig(3, (ATTENTION_OUTPUT, MLP_OUTPUT, LAYER_OUTPUT), "gelu", norm=True)
CONFIGS = {
  "H": lj.houlsby_config(3),
  "L": lj.lin_config(3),
  "P": lj.pfeiffer_config(3),
  "D": lj.adapter_drop_config(3, 1),
}

NAMES = ["H", "L", pytest.param("P", marks=pytest.mark.long), "D"]  # P is L without a norm


def hidden(config, params, tokens, token_index=None):
  return GPT2(config).apply({"params": params}, tokens, token_index=token_index, method="hidden")


def method_of(config, bottleneck_config=EVERYWHERE):
  return lj.bottleneck_adapter(functools.partial(hidden, config), bottleneck_config)


@pytest.fixture(scope="module")
def params():
  return randomized(shapes_of(GPT2(TINY)), 0.3)


@pytest.fixture(scope="module")
def trainable(params):
  return randomized(jax.eval_shape(method_of(TINY).init, KEY, params, TOKENS), 0.3, seed=4)


class Adapter(nn.Module):
  """The adapter as a module, with Flax's layers."""

  @nn.compact
  def __call__(self, x):
    h = nn.LayerNorm(1e-5, use_fast_variance=False, name="norm")(x)
    h = nn.gelu(nn.Dense(3, name="down")(h), approximate=False)
    return x + nn.Dense(x.shape[-1], name="up")(h)


class AdaptedBlock(Block):
  """GPT-2's layer with adapters built in."""

  @nn.compact
  def __call__(self, x, cache, context):
    config = self.config
    out, cache = Attention(config, name="attn")(layer_norm(config, "ln_1")(x), cache, context)
    x = x + Adapter(name="attention_output")(out)
    out = MLP(config, name="mlp")(layer_norm(config, "ln_2")(x))
    return Adapter(name="layer_output")(x + Adapter(name="mlp_output")(out)), cache


class AdaptedGPT2(GPT2):
  def setup(self):
    config = self.config
    self.wte = nn.Embed(config.vocab_size, config.embed_dim)
    self.wpe = nn.Embed(config.num_positions, config.embed_dim)
    self.h = make_layers(config, AdaptedBlock)
    self.ln_f = layer_norm(config, None)


def stacked(tree, names):
  """Returns the layers' trees as one stack."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[name] for name in names))


def adapters_of(trainable):
  return trainable["lora_added"]["bottleneck"]


def value(out):
  return jnp.vdot(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)), out.ravel())


def gradients(fn, trainable):
  """Returns the value of a function of a trainable tree, and its gradients."""
  return jax.jit(jax.value_and_grad(lambda tree: value(fn(tree))))(trainable)


def built_in(config, params, adapters):
  """Returns the hidden states of a model with the adapters built in."""
  for i in range(config.num_layers):
    params = params | {f"h_{i}": params[f"h_{i}"] | adapters[f"layer_{i}"]}
  return AdaptedGPT2(config).apply({"params": params}, TOKENS, method="hidden")


def test_gradients_are_those_of_a_model_with_adapters_built_in(params, trainable):
  apply = functools.partial(method_of(TINY).apply, params)
  got = gradients(lambda tree: apply(tree, TOKENS), trainable)
  by_hand = functools.partial(built_in, TINY, params)
  expected = gradients(by_hand, adapters_of(trainable))
  np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
  assert relative_difference(adapters_of(got[1]), expected[1]) < 1e-5


@pytest.mark.long  # in CI a function that scans its layers is below
def test_unrolled_and_scanned_layers_have_the_same_gradients():
  config = dataclasses.replace(TINY, num_layers=2)
  params = randomized(shapes_of(GPT2(config)), 0.3)
  method = method_of(config)
  trainable = randomized(jax.eval_shape(method.init, KEY, params, TOKENS), 0.3, seed=4)
  expected = gradients(functools.partial(built_in, config, params), adapters_of(trainable))
  got = gradients(lambda tree: method.apply(params, tree, TOKENS), trainable)
  assert relative_difference(adapters_of(got[1]), expected[1]) < 1e-5

  scanned = dataclasses.replace(config, scan_layers=True, remat="nothing_saveable")
  stack = {name: leaf for name, leaf in params.items() if not name.startswith("h_")}
  stack["h"] = stacked(params, ["h_0", "h_1"])
  layers = stacked(adapters_of(trainable), ["layer_0", "layer_1"])
  apply = functools.partial(method_of(scanned).apply, stack)
  tree = {"lora_added": {"bottleneck": {"layers": layers}}}
  got = gradients(lambda tree: apply(tree, TOKENS), tree)
  np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
  of_stack = stacked(expected[1], ["layer_0", "layer_1"])
  assert relative_difference(adapters_of(got[1])["layers"], of_stack) < 1e-5


# ---- on small functions -----------------------------------------------------------------------


def fn(params, x):
  """Two layers of a function in plain JAX, with an attention that only adds a number."""
  for layer in params["layers"]:
    x = x + checkpoint_name(jnp.sin(x), ATTENTION_OUTPUT)
    x = checkpoint_name(x + checkpoint_name(x @ layer["kernel"], MLP_OUTPUT), LAYER_OUTPUT)
  return x @ params["head"]


def stacked_fn(params, x):
  def layer(x, params):
    return fn({"layers": [params], "head": jnp.eye(64)}, x), None

  return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


PARAMS = randomized(
  {
    "layers": [{"kernel": jax.ShapeDtypeStruct((64, 64), "float32")}] * 2,
    "head": jax.ShapeDtypeStruct((64, 2), "float32"),
  },
  0.1,
)
STACK = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *PARAMS["layers"]), "head": PARAMS["head"]}
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)


def trained(config, function=fn, params=PARAMS):
  method = lj.bottleneck_adapter(function, config)
  return method, randomized(jax.eval_shape(method.init, KEY, params, X), 0.3)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_output_is_the_base_models_bit_for_bit(name):
  method = lj.bottleneck_adapter(fn, CONFIGS[name])
  start = method.init(KEY, PARAMS, X)
  np.testing.assert_array_equal(method.apply(PARAMS, start, X), fn(PARAMS, X))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_trainable_tree(name):
  config = CONFIGS[name]
  shapes = jax.eval_shape(lj.bottleneck_adapter(fn, config).init, KEY, PARAMS, X)
  node = {
    "down": {"kernel": (64, 3), "bias": (3,)},
    "up": {"kernel": (3, 64), "bias": (64,)},
    **({"norm": {"scale": (64,), "bias": (64,)}} if name == "L" else {}),
  }
  places = ["attention_output", "mlp_output"] if name == "H" else ["layer_output"]
  numbers = [1] if name == "D" else [0, 1]
  layers = {f"layer_{i}": dict.fromkeys(places, node) for i in numbers}
  assert jax.tree.map(jnp.shape, adapters_of(shapes)) == layers
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  shapes = jax.eval_shape(lj.bottleneck_adapter(stacked_fn, config).init, KEY, STACK, X)
  stack = jax.tree.map(lambda s: (len(numbers), *s), node, is_leaf=lambda s: isinstance(s, tuple))
  assert jax.tree.map(jnp.shape, adapters_of(shapes)) == {"layers": dict.fromkeys(places, stack)}


def by_hand(config, params, adapters, x):
  """The same function, with the adapters of a tree in it."""

  def at(place, i, x):
    p = adapters.get(f"layer_{i}", {}).get(place)
    return x if p is None else bottleneck(x, p, config.activation)

  for i, layer in enumerate(params["layers"]):
    x = x + at("attention_output", i, jnp.sin(x))
    x = at("layer_output", i, x + at("mlp_output", i, x @ layer["kernel"]))
  return x @ params["head"]


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_where_their_papers_have_them(name):
  config = CONFIGS[name]
  method, tune = trained(config)
  out = method.apply(PARAMS, tune, X)
  np.testing.assert_allclose(out, by_hand(config, PARAMS, adapters_of(tune), X), rtol=1e-4)
  assert relative_difference(out, fn(PARAMS, X)) > 0.1
  layers = [adapters_of(tune)[name] for name in sorted(adapters_of(tune))]
  stack = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
  tune = {"lora_added": {"bottleneck": stack}}
  got = lj.bottleneck_adapter(stacked_fn, config).apply(STACK, tune, X)
  np.testing.assert_allclose(got, out, rtol=1e-4)


def test_a_bottleneck_is_its_equation():
  """With numbers by hand: norm([1, 3]) = [-1, 1], and 2 of the 3 inner values are negative."""
  p = {
    "norm": {"scale": jnp.array([2.0, 1.0]), "bias": jnp.array([0.0, 1.0])},
    "down": {"kernel": jnp.array([[1.0, -1.0, 0.0], [1.0, -2.0, 0.5]]), "bias": jnp.zeros(3)},
    "up": {"kernel": jnp.array([[5.0, 5.0], [7.0, 7.0], [1.0, -3.0]]), "bias": jnp.array([0.5, 0])},
  }
  out = bottleneck(jnp.array([[1.0, 3.0]]), p, "relu")
  np.testing.assert_allclose(out, [[1 + 1.0 + 0.5, 3 - 3.0]], atol=1e-4)  # inner: 0, -2, 1


def test_a_quantized_base_and_lora_with_adapters():
  config = lj.houlsby_config(3)
  quantized = lj.quantize(PARAMS, "int8", "layers/.*/kernel")
  method, tune = trained(config)
  expected = method.apply(lj.dequantize(quantized), tune, X)
  np.testing.assert_allclose(method.apply(quantized, tune, X), expected, rtol=1e-5)
  lora_config = lj.LoraConfig(2, 4.0, target="layers/.*/kernel")
  lora = functools.partial(lj.lora, config=lora_config)
  adapters = functools.partial(lj.bottleneck_adapter, config=config)
  low_rank = randomized(jax.eval_shape(lora(fn).init, KEY, PARAMS, X), 0.3)
  merged = lora(fn).merge(PARAMS, low_rank)
  expected = method.apply(merged, tune, X)
  assert relative_difference(expected, method.apply(PARAMS, tune, X)) > 0.1
  for methods, parts in (
    ((lora, adapters), (low_rank, tune)),
    ((adapters, lora), (tune, low_rank)),
  ):
    both = lj.compose(fn, *methods)
    parts = {f"part_{i}": part for i, part in enumerate(parts)}
    assert relative_difference(both.apply(PARAMS, parts, X), expected) < 1e-5


def test_two_adapters_at_one_place_follow_each_other():
  method, tune = trained(lj.pfeiffer_config(3))
  single = functools.partial(lj.bottleneck_adapter, config=lj.pfeiffer_config(3))
  both = lj.compose(fn, single, single)
  start = both.init(KEY, PARAMS, X)
  expected = method.apply(PARAMS, tune, X)
  for name in start:
    got = both.apply(PARAMS, start | {name: tune}, X)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_bfloat16_computes_in_it_and_trains_float32():
  method, tune = trained(lj.lin_config(3))
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, X))
  out = method.apply(half[0], tune, half[1])
  assert out.dtype == jnp.bfloat16
  assert relative_difference(out.astype(jnp.float32), method.apply(PARAMS, tune, X)) < 0.03
  gradient = jax.grad(lambda t: method.apply(half[0], t, half[1]).astype(jnp.float32).sum())
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(gradient, tune))}
  assert dtypes == {jnp.dtype("float32")}


def test_with_64_bits_it_trains_float32():
  with jax.enable_x64(True):
    shapes = jax.eval_shape(lj.bottleneck_adapter(fn, lj.lin_config(3)).init, KEY, PARAMS, X)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_a_head_is_fully_trained():
  method = lj.bottleneck_adapter(fn, lj.pfeiffer_config(3, extra="head"))
  start = method.init(KEY, PARAMS, X)
  np.testing.assert_array_equal(start["head"], PARAMS["head"])
  doubled = start | {"head": 2 * start["head"]}
  np.testing.assert_allclose(method.apply(PARAMS, doubled, X), 2 * fn(PARAMS, X), rtol=1e-6)
  with pytest.raises(ValueError, match="extra 'heads' matches none of the 3 leaves"):
    lj.bottleneck_adapter(fn, lj.pfeiffer_config(3, extra="heads")).init(KEY, PARAMS, X)


@pytest.mark.long
def test_the_code_on_the_page_runs():
  (block,) = code_blocks(page("bottleneck"))
  names = {}
  exec(block, names)
  plain = names["logits"](names["params"], names["tokens"])
  np.testing.assert_array_equal(names["out"], plain)


# ---- in the zoo's models ---------------------------------------------------------------------


def test_the_cache_and_chosen_tokens_change_nothing(params, trainable):
  method = method_of(TINY)

  def extend(params, *args):
    return GPT2(TINY).apply({"params": params}, *args, method="extend")

  @jax.jit
  def run(trainable):
    whole = method.apply(params, trainable, TOKENS)
    index = jnp.array([[5], [2]])
    chosen = method.apply(params, trainable, TOKENS, index)
    cache = init_cache(TINY, 2, 6)
    step = lj.bottleneck_adapter(extend, EVERYWHERE).apply
    causal, places = jnp.tril(jnp.ones((6, 6), bool))[None], jnp.arange(6)[None]
    first, cache = step(params, trainable, TOKENS[:, :4], places[:, :4], cache, 0, causal[:, :4])
    rest, _ = step(params, trainable, TOKENS[:, 4:], places[:, 4:], cache, 4, causal[:, 4:])
    return whole, chosen, jnp.concatenate([first, rest], axis=1)

  whole, chosen, cached = run(trainable)
  assert relative_difference(cached, whole) < 1e-5
  assert relative_difference(chosen[:, 0], whole[jnp.arange(2), jnp.array([5, 2])]) < 1e-5


def test_a_function_of_the_head_has_no_adapters(trainable):
  method = lj.bottleneck_adapter(lambda params, x: 2 * x, EVERYWHERE)
  np.testing.assert_array_equal(method.apply({"w": X}, trainable, X), 2 * X)


@pytest.mark.parametrize("family", MODELS)
def test_each_model_has_the_marks(family):
  module, _ = MODELS[family]
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = shapes_of(module)
  fn = lambda params, tokens: module.apply({"params": params}, tokens)  # noqa: E731
  shapes = jax.eval_shape(lj.bottleneck_adapter(fn, EVERYWHERE).init, KEY, params, tokens)
  places = {"attention_output", "mlp_output", "layer_output"}
  layers = ["layers"] if family == "gpt2_scanned" else ["layer_0", "layer_1"]
  assert list(adapters_of(shapes)) == layers
  assert all(set(nodes) == places for nodes in adapters_of(shapes).values())


# ---- the paper's counts ------------------------------------------------------------------------

GPT2_MEDIUM = {"embed_dim": 1024, "num_layers": 24, "num_heads": 16}
GPT2_LARGE = {"embed_dim": 1280, "num_layers": 36, "num_heads": 20}
GPT3 = {"embed_dim": 12288, "num_layers": 96, "num_heads": 96}
ROBERTA_BASE = {"kind": "roberta", "pad_id": 1, "pooler": False, "num_positions": 514}
ROBERTA_LARGE = ROBERTA_BASE | GPT2_MEDIUM | {"mlp_dim": 4096}


def count(shape, config):
  kind, module = (BertConfig, Bert) if "kind" in shape else (GPT2Config, GPT2)
  model = module(kind(**shape, scan_layers=True))
  fn = lambda params, tokens: model.apply({"params": params}, tokens, method="hidden")  # noqa: E731
  tokens = jax.ShapeDtypeStruct((1, 1), "int32")
  init = lj.bottleneck_adapter(fn, config).init
  return sum(
    leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, KEY, shapes_of(model), tokens))
  )


def formula(embed_dim, width, num_adapters, num_norms):
  """The paper's count, in its section 5.1."""
  return num_adapters * (2 * embed_dim * width + width + embed_dim) + 2 * num_norms * embed_dim


LONG = pytest.mark.long


@pytest.mark.parametrize(
  ("shape", "config", "expected", "printed"),
  [
    # Tables 3, 13 and 14
    pytest.param(GPT2_MEDIUM, lj.lin_config(6), formula(1024, 6, 24, 24), 0.37, marks=LONG),
    (GPT2_MEDIUM, lj.lin_config(224), formula(1024, 224, 24, 24), 11.09),
    # Adapter_H has 11.06 M with 112, and 11.16 M with 113: the print repeats Adapter_L's 11.09 M
    pytest.param(GPT2_MEDIUM, lj.houlsby_config(112), formula(1024, 112, 48, 0), 11.06, marks=LONG),
    pytest.param(GPT2_LARGE, lj.lin_config(8), formula(1280, 8, 36, 36), 0.88, marks=LONG),
    pytest.param(GPT2_LARGE, lj.lin_config(248), formula(1280, 248, 36, 36), 23.00, marks=LONG),
    # Table 2: Adapter_D with the default width of D / 16; 0.3 M is 4 layers of 12
    (ROBERTA_BASE, lj.adapter_drop_config(48, 8), formula(768, 48, 4, 0), 0.3),
    pytest.param(
      ROBERTA_BASE, lj.adapter_drop_config(48, 0), formula(768, 48, 12, 0), 0.9, marks=LONG
    ),
    pytest.param(ROBERTA_LARGE, lj.pfeiffer_config(16), formula(1024, 16, 24, 0), 0.8, marks=LONG),
    # the widths of Table 9; 3.0 M and 6.0 M, as printed, are in units of 2^20
    pytest.param(ROBERTA_LARGE, lj.pfeiffer_config(64), formula(1024, 64, 24, 0), 3.2, marks=LONG),
    pytest.param(ROBERTA_LARGE, lj.houlsby_config(8), formula(1024, 8, 48, 0), 0.8, marks=LONG),
    pytest.param(ROBERTA_LARGE, lj.houlsby_config(64), formula(1024, 64, 48, 0), 6.3, marks=LONG),
    # Table 15
    (GPT3, lj.houlsby_config(1), formula(12288, 1, 192, 0), 7.1),
    pytest.param(GPT3, lj.houlsby_config(4), formula(12288, 4, 192, 0), 21.2, marks=LONG),
    pytest.param(GPT3, lj.houlsby_config(8), formula(12288, 8, 192, 0), 40.1, marks=LONG),
    pytest.param(GPT3, lj.houlsby_config(16), formula(12288, 16, 192, 0), 77.9, marks=LONG),
    pytest.param(GPT3, lj.houlsby_config(64), formula(12288, 64, 192, 0), 304.4, marks=LONG),
  ],
)
def test_the_counts_are_the_papers(shape, config, expected, printed):
  got = count(shape, config)
  assert got == expected
  digits = 2 if printed in (0.37, 0.88, 11.06, 11.09, 23.00) else 1
  assert round(got / 1e6, digits) == printed


# ---- refusals ----------------------------------------------------------------------------------


def test_it_is_not_merged():
  method, tune = trained(CONFIGS["H"])
  with pytest.raises(ValueError, match="bottleneck adapters cannot be merged: they are nonlinear"):
    method.merge(PARAMS, tune)


def test_a_function_without_marks_is_told_what_to_mark():
  method = lj.bottleneck_adapter(lambda params, x: x @ params["w"], CONFIGS["H"])
  message = (
    "lora_jax.bottleneck_adapter needs marked values, and the function marks none of: the "
    "attention's output, .*'lora_jax/attention_output'; the MLP's output, .*checkpoint_name"
  )
  with pytest.raises(ValueError, match=message):
    method.init(KEY, {"w": jnp.eye(64)}, X)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"width": 0}, "width must be"),
    ({"marks": ()}, "marks must name one or more marks"),
    ({"marks": (MLP_OUTPUT, MLP_OUTPUT)}, "each once"),
    ({"activation": "tanh"}, "activation must be"),
    ({"num_dropped": -1}, "num_dropped must be"),
  ],
)
def test_a_bad_config_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIGS["H"], **change)


def test_a_tree_of_another_model_or_config_is_refused():
  with pytest.raises(ValueError, match=r"config must be a BottleneckConfig, got 3"):
    lj.bottleneck_adapter(fn, 3)
  with pytest.raises(ValueError, match="num_dropped=2 leaves no adapter"):
    lj.bottleneck_adapter(fn, lj.adapter_drop_config(3, 2)).init(KEY, PARAMS, X)
  method, tune = trained(CONFIGS["P"])
  for other in ({}, {"lora_added": {"prefix_layer": jnp.ones((2, 1, 64))}}):
    with pytest.raises(ValueError, match="adapters under 'lora_added/bottleneck', as init"):
      method.apply(PARAMS, other, X)
  for config, message in (
    (
      lj.pfeiffer_config(4),
      r"mis-shaped: \S*layer_0/layer_output/down/kernel is \(64, 3\), expect",
    ),
    (CONFIGS["L"], r"missing: \S*layer_0/layer_output/norm/scale"),
    (CONFIGS["D"], r"unexpected: \S*layer_0/layer_output/down/bias"),
  ):
    with pytest.raises(ValueError, match=message):
      lj.bottleneck_adapter(fn, config).apply(PARAMS, tune, X)
  with pytest.raises(ValueError, match=r"missing: \S*layers/layer_output/down/kernel"):
    lj.bottleneck_adapter(stacked_fn, CONFIGS["P"]).apply(STACK, tune, X)
  half = {"layers": PARAMS["layers"][:1], "head": PARAMS["head"]}
  with pytest.raises(ValueError, match=r"unexpected: \S*layer_1/layer_output"):
    method.apply(half, tune, X)
