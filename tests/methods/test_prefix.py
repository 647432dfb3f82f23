"""Prefix tuning: PEFT's outputs, a hand-written model's gradients, decoding, and errors.

`tests/golden/prefix` is PEFT's: `make_prefix_golden.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.data.batches import packed_batches, padded_batches
from lora_jax.data.text import Example, with_slots
from lora_jax.decoding import BeamConfig, SamplingConfig, adapted, beam_search, from_linen, generate
from lora_jax.marks import LAYER_INPUT, LAYER_OUTPUT, TOKEN_EMBEDDINGS
from lora_jax.marks import TOKENS as TOKENS_MARK
from lora_jax.models.bert.folder import load_bert
from lora_jax.models.bert.model import Bert
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.causal_lm import Context, init_cache
from lora_jax.models.zoo import load_causal_lm
from lora_jax.slots import FIRST_SLOT, Slots
from lora_jax.training.loss import language_model_loss
from lora_jax.transform.marks import trace_marks

from tests.docs.pages import code_blocks, page
from tests.make_peft_golden import inputs_of, is_encoder, tokens_of
from tests.make_prefix_golden import GOLDEN, MODELS, NUM_SLOTS, PAST, PROMPT

SLOTS = Slots(2, 1)
EMBEDDING = functools.partial(lj.prefix_embedding, num_slots=NUM_SLOTS)
LAYER = functools.partial(lj.prefix_layer, num_slots=NUM_SLOTS, std=1.0)


def prefixed(tokens):
  """Returns rows of tokens after NUM_SLOTS slots."""
  return np.stack([Slots(NUM_SLOTS).around(row) for row in tokens]).astype(np.int32)


def loaded(base, scan_layers):
  """Returns the params of a small model of tests/golden, its function, and its inputs."""
  if not is_encoder(base):
    model = load_causal_lm(MODELS / base, scan_layers=scan_layers)
    return model.params, model.call, (prefixed(tokens_of(base)),)
  config, params = load_bert(MODELS / base, scan_layers=scan_layers)
  tokens, mask, _ = inputs_of(base)
  segments = np.pad(mask.astype(np.int32), ((0, 0), (NUM_SLOTS, 0)), constant_values=1)
  return (
    params,
    lambda p, *args: Bert(config).apply({"params": p}, *args),
    (
      prefixed(tokens),
      segments,
    ),
  )


def added(name, vectors):
  return {"lora_added": {name: jnp.asarray(vectors)}}


LONG = pytest.mark.long


@pytest.mark.parametrize(
  ("name", "scan_layers"),
  [
    ("bert", True),
    pytest.param("llama", True, marks=LONG),
    pytest.param("roberta", False, marks=LONG),
  ],
)
def test_prefix_embedding_is_prompt_tuning_of_peft(name, scan_layers):
  """Adapters of language models: tests/interop/peft/test_prompts.py."""
  params, fn, inputs = loaded(PROMPT[name], scan_layers)
  vectors = load_file(GOLDEN / name / "adapter_model.safetensors")["prompt_embeddings"]
  out = jax.jit(EMBEDDING(fn).apply)(params, added("prefix_embedding", vectors), *inputs)
  expected = load_file(GOLDEN / f"{name}.safetensors")["logits"]
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "scan_layers"), [("llama", True), pytest.param("gpt2", False, marks=LONG)]
)
def test_prefix_layer_is_prefix_tuning_of_peft_with_the_keys_of_these_activations(
  name, scan_layers
):
  params, fn, inputs = loaded(PAST[name], scan_layers)
  arrays = load_file(GOLDEN / f"past_{name}.safetensors")
  out = jax.jit(LAYER(fn).apply)(params, added("prefix_layer", arrays["vectors"]), *inputs)
  np.testing.assert_allclose(out[:, NUM_SLOTS:], arrays["logits"], rtol=1e-4, atol=1e-4)


SHAPE = GPT2Config(vocab_size=31, num_positions=24, embed_dim=16, num_layers=2, num_heads=2)
LLAMA = LlamaConfig(
  **{name: getattr(SHAPE, name) for name in ("vocab_size", "num_positions", "embed_dim")},
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  mlp_dim=32,
  scan_layers=True,
)
TOKENS = np.array([[FIRST_SLOT, FIRST_SLOT + 1, 3, 4, FIRST_SLOT + 2, 5, 6, 7]] * 2, np.int32)
TOKENS[1, 5:] = 9, 8, 1


@pytest.fixture(scope="module")
def model():
  return GPT2(SHAPE)


@pytest.fixture(scope="module")
def params(model):
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def stacked(params):
  """Returns the params of the model with scanned layers."""
  layers = [params[f"h_{i}"] for i in range(SHAPE.num_layers)]
  others = {name: leaf for name, leaf in params.items() if not name.startswith("h_")}
  return others | {"h": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def call(model):
  return lambda params, tokens: model.apply({"params": params}, tokens)


def by_hand(model, params, name, vectors):
  """Returns the logits of a model with the prefix built in."""
  bound, slots = model.bind({"params": params}), TOKENS - FIRST_SLOT

  def replaced(x, rows):
    for slot in range(NUM_SLOTS):
      x = jnp.where((slots == slot)[..., None], rows[slot], x)
    return x

  x = bound.wte(jnp.where(slots < 0, TOKENS, 0))
  if name == "prefix_embedding":
    x = replaced(x, vectors)
  x = x + bound.wpe(jnp.arange(TOKENS.shape[1])[None])
  for i, block in enumerate(bound.h):
    x, _ = block(replaced(x, vectors[i]) if name == "prefix_layer" else x, None, Context())
  return bound.logits(bound.norm(x))


@pytest.mark.parametrize("method", [pytest.param(EMBEDDING, marks=LONG), LAYER])
def test_gradients_are_those_of_a_hand_written_model_and_do_not_depend_on_scan(
  method, model, params
):
  tune = method(call(model)).init(jax.random.key(1), params, TOKENS)
  ((name, vectors),) = tune["lora_added"].items()
  weights = jax.random.normal(jax.random.key(2), (*TOKENS.shape, SHAPE.vocab_size))

  def expected(vectors):
    return jnp.sum(weights * jax.nn.log_softmax(by_hand(model, params, name, vectors)))

  def loss(vectors, model, params):
    logits = method(call(model)).apply(params, added(name, vectors), TOKENS)
    return jnp.sum(weights * jax.nn.log_softmax(logits))

  wanted = jax.jit(jax.value_and_grad(expected))(vectors)
  assert np.abs(np.asarray(wanted[1])).min(axis=-1).max() > 0, "each vector has a gradient"
  scanned = GPT2(dataclasses.replace(SHAPE, scan_layers=True, remat="dots_saveable"))
  for module, base in ((model, params), (scanned, stacked(params))):
    actual = jax.jit(jax.value_and_grad(functools.partial(loss, model=module, params=base)))(
      vectors
    )
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), actual, wanted
    )


def test_prefix_layer_replaces_the_slots_of_each_layer_and_nothing_else(model, params):
  method = LAYER(call(model))
  tune = method.init(jax.random.key(1), params, TOKENS)
  is_slot = TOKENS >= FIRST_SLOT

  @jax.jit
  def logits(before_last, after_last):
    """Returns the logits with layers' outputs changed at some tokens."""

    def visit(mark, x, arrays):
      del arrays
      where = before_last if mark.number < SHAPE.num_layers - 1 else after_last
      return jnp.where(where[..., None], x + jnp.arange(x.shape[-1])[None, None], x)

    marked = trace_marks(method.apply, [LAYER_OUTPUT], params, (tune, TOKENS), {})
    return marked.evaluate(visit, dict.fromkeys(marked.marks, ()))

  nowhere = np.zeros_like(is_slot)
  plain = logits(nowhere, nowhere)
  np.testing.assert_array_equal(logits(is_slot, nowhere), plain)
  assert np.abs(logits(nowhere, is_slot) - plain)[is_slot].max() > 1e-3  # an infix slot's is read
  for row, column in zip(*np.nonzero(~is_slot), strict=True):
    only = np.zeros_like(is_slot)
    only[row, column] = True
    assert np.abs(logits(only, nowhere) - plain)[row, column].max() > 1e-3


def test_what_is_computed_of_a_slots_id_reaches_no_gradient():
  """The table has no row for it: the lookup would give NaN, and so would the scale's gradient."""

  def fn(params, tokens):
    tokens = checkpoint_name(tokens, TOKENS_MARK)
    rows = params["table"].at[tokens].get(mode="fill", fill_value=jnp.nan)
    return checkpoint_name(rows * params["scale"], TOKEN_EMBEDDINGS)

  params = {"table": jnp.ones((12, 4)), "scale": jnp.array(2.0)}
  scale = functools.partial(lj.partial_finetuning, train="scale")
  method = lj.compose(fn, scale, functools.partial(EMBEDDING, table="table"))
  tune = method.init(jax.random.key(0), params, TOKENS)
  gradient = jax.grad(lambda tune: method.apply(params, tune, TOKENS).sum())(tune)
  assert gradient["part_0"]["scale"] == 4 * np.sum(TOKENS < FIRST_SLOT)
  np.testing.assert_array_equal(gradient["part_1"]["lora_added"]["prefix_embedding"], 2.0)


@pytest.mark.long
@pytest.mark.parametrize("method", [EMBEDDING, LAYER], ids=["embedding", "layer"])
def test_a_quantized_base_has_the_outputs_of_its_floats(method, model, params):
  quantized = lj.quantize(params, "int8")
  fn = method(call(model))
  tune = fn.init(jax.random.key(1), quantized, TOKENS)
  outputs = [
    jax.jit(fn.apply)(base, tune, TOKENS) for base in (quantized, lj.dequantize(quantized))
  ]
  np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_vectors_start_as_embeddings_of_distinct_tokens_or_normal(model, params):
  fn = call(model)
  vectors = EMBEDDING(fn).init(jax.random.key(1), params, TOKENS)["lora_added"]["prefix_embedding"]
  table = params["wte"]["embedding"]
  rows = np.argmin(np.abs(vectors[:, None] - table[None]).sum(-1), axis=1)
  np.testing.assert_array_equal(vectors, table[rows])
  assert len(set(rows.tolist())) == NUM_SLOTS
  words = jnp.where(TOKENS < FIRST_SLOT, TOKENS, rows[np.maximum(TOKENS - FIRST_SLOT, 0)])
  out = jax.jit(EMBEDDING(fn).apply)(params, added("prefix_embedding", vectors), TOKENS)
  np.testing.assert_allclose(out, jax.jit(fn)(params, words), atol=1e-5)
  normal = lj.prefix_embedding(fn, NUM_SLOTS, std=3.0).init(jax.random.key(1), params, TOKENS)
  assert 2 < np.std(normal["lora_added"]["prefix_embedding"]) < 4


def examples():
  """Returns three examples of different lengths, between slots."""
  rows = [([3, 4, 5], [6, 7]), ([8], [9, 10, 11]), ([12, 13], [14])]
  return with_slots(
    [
      Example(
        np.array([*prompt, *completion[:-1]], np.int32),
        np.array(completion, np.int32),
        np.arange(len(prompt) - 1, len(prompt) + len(completion) - 1, dtype=np.int32),
      )
      for prompt, completion in rows
    ],
    SLOTS,
  )


@pytest.mark.parametrize("method", [pytest.param(EMBEDDING, marks=LONG), LAYER])
def test_packed_and_padded_rows_have_one_loss(method, model, params):
  shape = {"loss_length": 6, "seed": None}
  packed = packed_batches(examples(), row_length=20, batch_size=1, **shape)
  padded = padded_batches(examples(), row_lengths=[9], batch_size=3, **shape)
  assert len(packed) == len(padded) == 1, "the three examples are in one row"
  loss = method(language_model_loss(model))
  tune = loss.init(jax.random.key(1), params, packed[0])
  of_packed, of_padded = (jax.jit(loss.apply)(params, tune, x[0]) for x in (packed, padded))
  assert of_packed.weight == of_padded.weight == 6
  np.testing.assert_allclose(of_packed.total, of_padded.total, rtol=1e-5)


GREEDY = SamplingConfig(eos_ids=(0,), temperature=0.0, max_new_tokens=4)
BEAMS = BeamConfig(eos_ids=(0,), num_beams=3, max_new_tokens=4, length_penalty=1.0)
LORA = functools.partial(
  lj.lora, config=lj.LoraConfig(2, 8.0, target=r".*/attn/(query|value)/kernel")
)


@pytest.mark.parametrize(
  ("family", "search"),
  [
    ("gpt2", "beams"),
    pytest.param("gpt2", "greedy", marks=LONG),
    pytest.param("llama", "beams", marks=LONG),
  ],
)
def test_decoding_with_a_cache_is_decoding_without_one(family, search, model, params):
  """LoRA+PL, with prompts of different lengths."""
  if family == "llama":
    model = Llama(LLAMA)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

  def method(fn):
    return lj.compose(fn, LORA, LAYER)

  prompts = [SLOTS.around(prompt) for prompt in ([3, 4, 5, 6], [7], [8, 9])]
  tune = method(call(model)).init(jax.random.key(1), params, np.array(prompts[:1]))
  tune = jax.tree.map(lambda x: x + 0.1 * np.sin(np.arange(x.size)).reshape(x.shape), tune)
  plain = from_linen(model, functools.partial(init_cache, model.config), 24)
  decoder, both = adapted(plain, method), {"base": params, "adapter": tune}
  if search == "greedy":
    outputs, scores = generate(decoder, both, prompts, GREEDY), None
  else:
    beams = beam_search(decoder, both, prompts, BEAMS)
    outputs = [ids[:n] for ids, n in zip(beams.tokens[:, 0], beams.lengths[:, 0], strict=True)]
    scores = beams.scores[:, 0]

  rows = [[*prompt, *out] for prompt, out in zip(prompts, outputs, strict=True)]
  whole = np.array([[*row, *[1] * (12 - len(row))] for row in rows], np.int32)
  logits = jax.jit(method(call(model)).apply, static_argnames="lora_key")(params, tune, whole)
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  for i, (prompt, out) in enumerate(zip(prompts, outputs, strict=True)):
    places = np.arange(len(prompt) - 1, len(prompt) - 1 + len(out))
    if scores is None:
      assert log_probs[i, places].argmax(-1).tolist() == list(out)
    else:
      np.testing.assert_allclose(scores[i], log_probs[i, places, out].sum() / len(out), rtol=1e-4)


def test_the_counts_are_the_papers_formulae_at_gpt3s_shape():
  """D (lp + li) and L D (lp + li); table 15 prints 20.2 M for a PreLayer of 16 slots."""
  config = GPT2Config(embed_dim=12288, num_layers=96, num_heads=96, scan_layers=True)
  fn, tokens = call(GPT2(config)), jax.ShapeDtypeStruct((1, 20), "int32")
  params = jax.eval_shape(GPT2(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  for method, count in ((lj.prefix_embedding, 196_608), (lj.prefix_layer, 18_874_368)):
    init = method(fn, 16).init
    tree = jax.eval_shape(init, jax.random.key(0), params["params"], tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    (TOKENS[:, 2:4], "expected the slots 0 to 2 among the tokens, got none"),
    (TOKENS[:, :4], "expected the slots 0 to 2 among the tokens, got 0, 1. Put them there"),
    (TOKENS + (TOKENS >= FIRST_SLOT), "got 1, 2, 3"),
  ],
  ids=["none", "few", "others"],
)
def test_tokens_with_other_slots_are_refused(tokens, message, model, params):
  with pytest.raises(ValueError, match=message):
    EMBEDDING(call(model)).init(jax.random.key(0), params, tokens)


def test_a_slot_without_a_vector_gives_nan(model, params):
  """So does a model that is not adapted."""
  tune = added("prefix_embedding", jnp.zeros((NUM_SLOTS, SHAPE.embed_dim)))
  tokens = jnp.where(TOKENS == FIRST_SLOT, FIRST_SLOT + NUM_SLOTS, TOKENS)
  for fn, inputs in ((EMBEDDING(call(model)).apply, (tune,)), (call(model), ())):
    assert np.isnan(jax.jit(fn)(params, *inputs, tokens)).all()


def test_other_trees_functions_and_tables_are_refused(model, params):
  fn, key = call(model), jax.random.key(0)
  with pytest.raises(
    ValueError, match="prefix_layer cannot be merged: its vectors are inputs at 3"
  ):
    LAYER(fn).merge(params, {})
  with pytest.raises(
    ValueError, match=r"the leaf lora_added/prefix_layer, got lora_added/prefix_e"
  ):
    LAYER(fn).apply(params, added("prefix_embedding", jnp.zeros((3, 16))), TOKENS)
  with pytest.raises(ValueError, match=r"of shape \(2, 16\), expected floats of shape \(3, 16\)"):
    EMBEDDING(fn).apply(params, added("prefix_embedding", jnp.zeros((2, 16))), TOKENS)
  with pytest.raises(ValueError, match=r"lora_jax.prefix_embedding needs marked values"):
    EMBEDDING(lambda p, tokens: p["wte"]["embedding"][tokens]).init(key, params, TOKENS)
  with pytest.raises(ValueError, match="table 'wpe' matches none"):
    lj.prefix_embedding(fn, NUM_SLOTS, table="wpe").init(key, params, TOKENS)
  with pytest.raises(ValueError, match=r"must match one table .* \(V, 16\), got wpe/embedding"):
    lj.prefix_embedding(fn, NUM_SLOTS, table="w.e/embedding").init(key, params, TOKENS)
  with pytest.raises(ValueError, match="num_slots must be"):
    lj.prefix_layer(fn, 0)
  with pytest.raises(ValueError, match="25 tokens a row, but the model has 24 positions"):
    EMBEDDING(fn).init(key, params, np.array([Slots(2, 1).around([1] * 22)]))


def test_tokens_that_layers_cannot_see_are_named():
  def look_up(params, tokens):
    return params["table"][checkpoint_name(tokens, TOKENS_MARK)]

  def layer(params, x):
    return jnp.tanh(checkpoint_name(x, LAYER_INPUT))

  method = functools.partial(lj.prefix_layer, num_slots=1)
  args = {"table": jnp.ones((3, 2))}, jnp.array([Slots(1).around([1])])
  apart = method(lambda params, tokens: layer(params, jax.jit(look_up)(params, tokens)))
  tune = apart.init(jax.random.key(0), *args)
  with pytest.raises(ValueError, match=r"outside of that jit, .* Mark the tokens before it: token"):
    apart.apply(args[0], tune, args[1])
  with pytest.raises(ValueError, match=r"lora_jax.prefix_layer needs marked values, .* the ids of"):
    method(layer).apply(args[0], tune, jnp.ones((1, 2, 2)))


@pytest.mark.long
def test_the_page_on_prefix_tuning_runs():
  (block,) = [block for block in code_blocks(page("prefix")) if "import" in block]
  names: dict[str, Any] = {}
  exec(block, names)
  assert names["out"].shape == (1, 8, 31)
  assert len(names["answer"]) <= 4
