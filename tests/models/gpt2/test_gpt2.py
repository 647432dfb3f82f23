"""The GPT-2 of the zoo: equal to `transformers`, causal, cached, and adapted by LoRA."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.models.gpt2.folder import load_gpt2, params_shapes, save_gpt2
from lora_jax.models.gpt2.model import GPT2, GPT2Config, init_cache
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer
from lora_jax.trees import leaves_with_path

from tests import make_gpt2_golden as golden
from tests.toy_models import randomized, relative_difference

EMBEDDED = Path(lj.__file__).parent / "assets" / "gpt2"
COMPUTATIONS = {
  "unrolled": {},
  "remat": {"remat": "nothing_saveable"},
  "scanned": {"scan_layers": True},
  "scanned_remat": {"scan_layers": True, "remat": "dots_saveable"},
}


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, *args):
  return GPT2(config).apply({"params": params}, *args)


def padded(config, params, tokens, mask):
  """Returns our logits of padded rows."""
  places = jnp.asarray(golden.positions(mask), jnp.int32)
  return run(config, params, jnp.asarray(tokens, jnp.int32), places, jnp.asarray(mask, jnp.int32))


def assert_same_logits(got, expected, mask):
  assert np.abs(expected[mask]).max() > 3, "logits this small would prove little"
  assert relative_difference(got[mask], jnp.asarray(expected[mask])) < 1e-5


@pytest.fixture(scope="module")
def tied():
  return load_gpt2(golden.GOLDEN / "tied")


def tokens_of(rows=2, time=9, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 64, (rows, time)), jnp.int32)


@pytest.mark.parametrize(
  ("name", "computation"),
  [("untied", "unrolled"), ("relu", "unrolled"), ("tied", "unrolled"), ("tied", "scanned_remat")]
  + [
    pytest.param(name, computation, marks=pytest.mark.long)
    for name, computation in [("untied", "scanned"), ("tied", "remat"), ("tied", "scanned")]
  ],
)
def test_logits_are_those_of_transformers(name, computation):
  config, params = load_gpt2(golden.GOLDEN / name, **COMPUTATIONS[computation])
  arrays = load_file(golden.GOLDEN / f"{name}.safetensors")
  for kind in ("whole", "right", "left"):
    tokens, mask, expected = (arrays[f"{kind}/{x}"] for x in ("tokens", "mask", "logits"))
    assert_same_logits(padded(config, params, tokens, mask), expected, mask)


def test_rows_without_positions_and_segments_are_whole(tied):
  arrays = load_file(golden.GOLDEN / "tied.safetensors")
  plain = run(*tied, jnp.asarray(arrays["whole/tokens"]))
  assert_same_logits(plain, arrays["whole/logits"], arrays["whole/mask"])


LIVE = golden.SHAPES | {
  "silu": golden.BASE | {"n_embd": 40, "n_layer": 3, "n_head": 5, "activation_function": "silu"},
  "tanh": golden.BASE
  | {"n_embd": 64, "n_layer": 1, "n_head": 8, "activation_function": "gelu_pytorch_tanh"},
  "deep": golden.BASE | {"n_embd": 16, "n_layer": 8, "n_head": 2, "n_inner": 24},
  "long": golden.BASE | {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 1000},
}


@pytest.mark.parametrize("name", LIVE)
def test_folders_go_to_and_from_transformers(name, tmp_path):
  transformers = pytest.importorskip("transformers", reason="transformers is not installed")
  pytest.importorskip("torch", reason="torch is not installed")
  shape = LIVE[name]
  model = golden.make_model(shape, seed=7)
  model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
  for scan_layers in (False, True):
    config, params = load_gpt2(tmp_path / "theirs", scan_layers=scan_layers)
    folder = tmp_path / f"ours_{scan_layers}"
    save_gpt2(folder, config, params, end_of_text_id=0, max_shard_bytes=50_000)
    reloaded = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    stored, expected_state = reloaded.state_dict(), model.state_dict()
    assert stored.keys() == expected_state.keys()
    assert all(bool((stored[key] == expected_state[key]).all()) for key in expected_state)
    for tokens, mask in golden.batches(shape["vocab_size"], seed=7).values():
      expected = golden.logits(model, tokens, mask)
      assert_same_logits(padded(config, params, tokens, mask), expected, mask)
      assert_same_logits(golden.logits(reloaded, tokens, mask), expected, mask)


def test_gradients_do_not_depend_on_remat_or_scan():
  def gradients(computation):
    config, params = load_gpt2(golden.GOLDEN / "tied", **COMPUTATIONS[computation])
    actual = jax.jit(jax.grad(lambda p: (run(config, p, tokens_of()) ** 2).mean()))(params)
    if config.scan_layers:
      layers = {f"h_{i}": jax.tree.map(lambda x, i=i: x[i], actual["h"]) for i in range(2)}
      actual = {key: value for key, value in actual.items() if key != "h"} | layers
    return actual

  assert relative_difference(gradients("scanned_remat"), gradients("unrolled")) < 1e-5


def extended(config, params, tokens, first, num_slots, parts):
  """Returns the logits of `tokens` taken in parts through a cache, from slot `first` on."""

  def step(params, tokens, positions, cache, index, mask):
    model = GPT2(config)
    hidden, cache = model.apply(
      {"params": params}, tokens, positions, cache, index, mask, method="extend"
    )
    return model.apply({"params": params}, hidden, method="logits"), cache

  cache, start, actual = init_cache(config, len(tokens), num_slots), 0, []
  step = jax.jit(step)
  for size in parts:
    place = start + np.arange(size)
    slots = np.arange(num_slots)
    mask = (slots >= first) & (slots <= first + place[:, None])
    positions = jnp.broadcast_to(jnp.asarray(place, jnp.int32)[None], (len(tokens), size))
    part = tokens[:, start : start + size]
    logits, cache = step(
      params, part, positions, cache, jnp.int32(first + start), jnp.asarray(mask)[None]
    )
    actual.append(logits)
    start += size
  return jnp.concatenate(actual, axis=1)


@pytest.mark.parametrize(("scan_layers", "first"), [(False, 4), (True, 0)])
def test_the_cache_gives_what_the_whole_sequence_gives(scan_layers, first):
  config, params = load_gpt2(golden.GOLDEN / "tied", scan_layers=scan_layers)
  tokens = tokens_of()
  got = extended(config, params, tokens, first, num_slots=13, parts=(5, 2, 2))
  assert relative_difference(got, run(config, params, tokens)) < 1e-5


def test_tokens_that_do_not_fit_the_cache_are_refused(tied):
  config, params = tied
  args = tokens_of(time=3), jnp.zeros((2, 3), jnp.int32), init_cache(config, 2, 8), 6
  with pytest.raises(ValueError, match="3 tokens do not fit a cache of 8 slots from slot 6 on"):
    GPT2(config).apply({"params": params}, *args, jnp.ones((1, 3, 8), bool), method="extend")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_no_logit_depends_on_a_later_token(scan_layers):
  config, params = load_gpt2(golden.GOLDEN / "tied", scan_layers=scan_layers)
  dependence = token_dependence(config, params, None)
  np.testing.assert_array_equal(dependence > 0, np.tri(9, dtype=bool))


def test_packed_examples_do_not_see_each_other(tied):
  config, params = tied
  segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
  dependence = token_dependence(config, params, segments)
  same = np.asarray(segments[0])[:, None] == np.asarray(segments[0])[None]
  np.testing.assert_array_equal(dependence > 0, np.tri(9, dtype=bool) & same)

  tokens = tokens_of(rows=1)
  positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
  packed = run(config, params, tokens, positions, segments)
  for part in (slice(0, 3), slice(3, 7)):
    assert relative_difference(packed[:, part], run(config, params, tokens[:, part])) < 1e-5


def token_dependence(config, params, segment_ids):
  """Returns (T, T): the norm of d logits[t] / d embedding of token s."""
  tokens = jnp.arange(9)[None]  # different tokens, so that each has its own row of the gradient

  def logits(table):
    scaled = params | {"wte": {"embedding": table}}
    hidden = GPT2(config).apply({"params": scaled}, tokens, None, segment_ids, method="hidden")
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(config.embed_dim), jnp.float32)
    return hidden[0] @ weights

  gradient = jax.jit(jax.jacrev(logits))(params["wte"]["embedding"])
  return np.asarray(jnp.linalg.norm(gradient[:, :9], axis=-1))


@pytest.mark.parametrize(
  ("computation", "packed"),
  [
    *((computation, True) for computation in ("unrolled", "scanned_remat")),
    ("unrolled", False),
    *(
      pytest.param(computation, packed, marks=pytest.mark.long)
      for computation, packed in [
        *(("scanned", True), ("remat", True), ("xla", True)),
        *((computation, False) for computation in ("scanned", "remat", "scanned_remat", "xla")),
      ]
    ),
  ],
)
def test_outputs_of_some_tokens_are_those_of_all(computation, packed):
  """Values and gradients are equal, whether or not the last layer skips the other tokens."""
  config, params = load_gpt2(
    golden.GOLDEN / "tied", **COMPUTATIONS.get(computation, {"attention": computation})
  )
  tokens = tokens_of()
  segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9]) if packed else None
  token_index = jnp.asarray([[6, 2, 3, 3], [8, 0, 5, 1]])  # in any order, with repeats

  def loss(params, chosen):
    args = (tokens, None, segments, *((token_index,) if chosen else ()))
    hidden = GPT2(config).apply({"params": params}, *args, method="hidden")
    hidden = hidden if chosen else jnp.take_along_axis(hidden, token_index[..., None], axis=1)
    return jnp.sin(hidden).sum(), hidden

  def value_and_grad(chosen):
    call = jax.jit(jax.value_and_grad(functools.partial(loss, chosen=chosen), has_aux=True))
    (_, hidden), gradients = call(params)
    return hidden, gradients, call.lower(params).compile().cost_analysis()["flops"]

  got, expected = value_and_grad(True), value_and_grad(False)
  assert got[0].shape == (2, 4, config.embed_dim)
  assert relative_difference(got[0], expected[0]) < 1e-5
  for name, leaf in leaves_with_path(got[1]):
    other = dict(leaves_with_path(expected[1]))[name]
    assert np.abs(leaf - other).max() < 1e-5 * (1 + np.abs(other).max()), name
  if not config.scan_layers:
    assert got[2] < 0.9 * expected[2]


QUERY_VALUE = r"h(_\d+)?/attn/(query|value)/kernel"
ALL_LINEAR = r"h(_\d+)?/(attn|mlp)/\w+/kernel"


@pytest.mark.parametrize(
  ("target", "name", "computation"),
  [
    (QUERY_VALUE, "tied", "unrolled"),
    (ALL_LINEAR, "tied", "scanned_remat"),
    pytest.param(QUERY_VALUE, "tied", "scanned", marks=pytest.mark.long),
    pytest.param(ALL_LINEAR, "untied", "remat", marks=pytest.mark.long),
  ],
)
def test_lora_starts_at_the_base_and_trains(target, name, computation):
  config, params = load_gpt2(golden.GOLDEN / name, **COMPUTATIONS[computation])
  adapted = lj.lora(functools.partial(run, config), lj.LoraConfig(rank=2, alpha=4.0, target=target))
  tokens = tokens_of()
  start = adapted.init(jax.random.key(0), params, tokens)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradients(tune):
    logits = adapted.apply(params, tune, tokens)
    return logits.var(), logits

  assert relative_difference(gradients(start)[1], run(config, params, tokens)) < 1e-6
  tune = randomized(start)
  actual, logits = gradients(tune)
  assert relative_difference(logits, run(config, adapted.merge(params, tune), tokens)) < 1e-5
  for leaf in jax.tree.leaves(actual):
    assert bool(jnp.isfinite(leaf).all())
    assert float(jnp.abs(leaf).max()) > 0


def test_lora_starts_at_the_base_bit_for_bit():
  config, params = load_gpt2(golden.GOLDEN / "relu")

  def fn(params, tokens):
    return GPT2(config).apply({"params": params}, tokens)

  adapted = lj.lora(fn, lj.LoraConfig(rank=2, alpha=4.0, target=ALL_LINEAR))
  tune = adapted.init(jax.random.key(0), params, tokens_of())
  logits = jax.jit(adapted.apply)(params, tune, tokens_of())
  np.testing.assert_array_equal(logits, jax.jit(fn)(params, tokens_of()))


@pytest.mark.parametrize(
  ("embed_dim", "num_layers", "num_heads", "count"),
  [(768, 12, 12, 124_439_808), (1024, 24, 16, 354_823_168), (1280, 36, 20, 774_030_080)],
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameter_counts_of_small_medium_and_large(
  embed_dim, num_layers, num_heads, count, scan_layers
):
  config = GPT2Config(
    embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads, scan_layers=scan_layers
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(params_shapes(config))) == count


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_bfloat16_logits_keep_float32_steps(name):
  config, params = load_gpt2(golden.GOLDEN / name, dtype="bfloat16", param_dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  got = run(config, params, tokens_of())
  assert got.dtype == jnp.float32
  assert bool((got != got.astype(jnp.bfloat16).astype(jnp.float32)).any())
  exact = load_gpt2(golden.GOLDEN / name)
  assert relative_difference(got, run(*exact, tokens_of())) < 0.05


def test_new_residual_kernels_are_smaller():
  config = GPT2Config(vocab_size=64, num_positions=9, embed_dim=64, num_layers=2, num_heads=2)
  init = jax.jit(GPT2(config).init)
  params = init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  std = jax.tree.map(np.std, params["h_1"])
  for module, name, expected in (
    ("attn", "query", 0.02),
    ("mlp", "up", 0.02),
    ("attn", "out", 0.01),
    ("mlp", "down", 0.01),
  ):
    assert float(std[module][name]["kernel"]) == pytest.approx(expected, rel=0.05)


def test_rows_longer_than_the_positions_are_refused(tied):
  config, params = tied
  with pytest.raises(ValueError, match="25 tokens a row, but the model has 24 positions"):
    run(config, params, tokens_of(time=25))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("num_heads", 5, "num_heads must divide embed_dim, got 5 heads for 768"),
    ("activation", "mish", "activation must be one of gelu_new, .*; got 'mish'"),
    ("remat", "save_only_these_names", "remat must be one of None, .*; got 'save_only_these"),
    ("attention", "flash", "attention must be one of compact, xla, cudnn; got 'flash'"),
    ("dtype", "int8", "dtype must be one of float32, bfloat16, float16; got 'int8'"),
  ],
)
def test_bad_configs_are_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(GPT2Config(), **{field: value})


TEXT = """The city was founded in the 12th century and became the capital of the province. It is
located on the north bank of the river, about 30 miles from the coast. In the late nineteenth
century the population began to grow, and a new railway station was built near the centre of the
town. The university, which opened in 1921, is one of the largest in the country. He was born in
London, where he studied music before he moved to the United States with his family."""


def test_the_embedded_base_is_a_language_model():
  config, params = load_gpt2(EMBEDDED)
  tokenizer = load_tokenizer(EMBEDDED, config.vocab_size)
  tokens = jnp.asarray([[end_of_text_id(tokenizer), *tokenizer.encode(TEXT).ids]])
  assert tokenizer.decode(list(np.asarray(tokens[0, 1:]))) == TEXT

  def loss(params, tokens):
    logprobs = jax.nn.log_softmax(run(config, params, tokens)[0, :-1])
    return -float(jnp.take_along_axis(logprobs, tokens[0, 1:, None], axis=1).mean())

  shuffled = jax.random.permutation(jax.random.key(0), tokens, axis=1)
  assert loss(params, tokens) < 5.5  # nats/token
  assert loss(params, shuffled) > 7
  assert loss(randomized(params, scale=0.02), tokens) > 8
