"""DeBERTa-v2 and v3: equal to `transformers`, heads and dropout, LoRA, strict about folders."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.interop import load_peft, save_peft
from lora_jax.models.deberta.folder import load_deberta, params_shapes, save_deberta, stored_tensors
from lora_jax.models.deberta.model import Deberta, DebertaConfig, distance_rows
from lora_jax.training.classification import classification_loss

from tests import make_deberta_golden as golden
from tests.toy_models import randomized, relative_difference

COMPUTATIONS = {
  "unrolled": {},
  "scanned": {"scan_layers": True},
  "scanned_remat": {"scan_layers": True, "remat": "dots_saveable"},
  "remat": {"remat": "nothing_saveable"},
}


@functools.partial(jax.jit, static_argnames=("config", "method", "deterministic"))
def run(config, params, *args, key=None, method=None, **settings):
  rngs = None if key is None else {"dropout": key}
  return Deberta(config).apply({"params": params}, *args, rngs=rngs, method=method, **settings)


def expected(name):
  """Returns the tokens, mask and types, and the outputs of `transformers`."""
  arrays = load_file(golden.GOLDEN / f"{name}.safetensors")
  return [jnp.asarray(arrays.pop(key)) for key in ("tokens", "mask", "types")], arrays


@pytest.mark.parametrize(
  ("name", "computation"),
  [(name, "unrolled") for name in golden.MODELS]
  + [("v2_regression", "scanned_remat")]
  + [pytest.param("v2_regression", name, marks=pytest.mark.long) for name in ("scanned", "remat")],
)
def test_outputs_are_those_of_transformers(name, computation):
  config, params = load_deberta(golden.GOLDEN / name, **COMPUTATIONS[computation])
  model_inputs, outputs = expected(name)
  hidden = run(config, params, *model_inputs, method="hidden")
  real = np.asarray(model_inputs[1], bool)
  assert relative_difference(hidden[real], outputs["hidden"][real]) < 1e-5
  assert ("logits" in outputs) == (config.num_labels is not None)
  if config.num_labels is not None:
    assert np.ptp(outputs["logits"]) > 0.1, "logits this close would prove little"
    assert relative_difference(run(config, params, *model_inputs), outputs["logits"]) < 1e-5


@pytest.mark.parametrize("name", golden.MODELS)
def test_folders_go_there_and_back(name, tmp_path):
  config, params = load_deberta(golden.GOLDEN / name)
  save_deberta(tmp_path / "new", config, params, max_shard_bytes=8_000)
  reloaded, same = load_deberta(tmp_path / "new")
  assert reloaded == config
  jax.tree.map(np.testing.assert_array_equal, same, params)
  stacked, layers = load_deberta(golden.GOLDEN / name, scan_layers=True)
  save_deberta(tmp_path / "stacked", stacked, layers)
  jax.tree.map(np.testing.assert_array_equal, load_deberta(tmp_path / "stacked")[1], params)
  if name != "v3_masked":
    names = set(load_file(golden.GOLDEN / name / "model.safetensors"))
    assert names == set(load_file(tmp_path / "stacked" / "model.safetensors"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("name", [name for name in golden.MODELS if name != "v3_masked"])
def test_transformers_reads_our_folders(name, tmp_path):
  transformers = pytest.importorskip("transformers", reason="transformers is not installed")
  save_deberta(tmp_path / "new", *load_deberta(golden.GOLDEN / name))
  kind = golden.MODELS[name][0]
  model = getattr(transformers, f"DebertaV2{kind}").from_pretrained(tmp_path / "new").eval()
  model_inputs, outputs = expected(name)
  arrays = dict(zip(("tokens", "mask", "types"), map(np.array, model_inputs), strict=True))
  for key, array in golden.outputs(model, arrays).items():
    assert relative_difference(array, outputs[key]) < 1e-5


def test_packed_rows_and_some_outputs():
  config, params = load_deberta(golden.GOLDEN / "v3_classifier")
  (tokens, _, _), _ = expected("v3_classifier")
  segments = jnp.asarray([[1] * 5 + [2] * 5 + [0] * 3])
  alone = run(config, params, tokens[0, :10].reshape(2, 5))
  packed = run(config, params, tokens[:1], segments, token_index=jnp.asarray([[0, 5, 5]]))
  assert relative_difference(packed[0], alone[jnp.asarray([0, 1, 1])]) < 1e-5
  config, params = load_deberta(golden.GOLDEN / "v2_regression")
  with pytest.raises(ValueError, match="a convolution takes no packed rows"):
    run(config, params, tokens[:1], segments, None, jnp.arange(13)[None])


def test_a_convolution_is_trained_on_padded_batches():
  config, params = load_deberta(golden.GOLDEN / "v2_regression")
  tokens, mask, types = (np.asarray(x) for x in expected("v2_regression")[0])
  count = len(tokens)
  batch = {"tokens": tokens, "segment_ids": mask, "token_types": types}
  batch |= {"labels": np.ones(count, np.float32), "weights": np.ones(count, np.float32)}
  actual = jax.jit(classification_loss(Deberta(config)))(params, batch)
  _, outputs = expected("v2_regression")
  assert float(actual.total) == pytest.approx(((outputs["logits"][:, 0] - 1) ** 2).sum(), rel=1e-4)


def torch_rows(length, buckets, positions):
  """Returns the rows that the formula of the authors' code gives, in Python's floats."""
  rows = np.empty((length, length), np.int32)
  half = buckets // 2
  for i in range(length):
    for j in range(length):
      distance = i - j
      far = max(abs(distance), half)
      bucket = np.ceil(np.log(far / half) / np.log((positions - 1) / half) * (half - 1)) + half
      is_close = abs(distance) <= half
      rows[i, j] = (distance if is_close else np.sign(distance) * bucket) + buckets
  return rows.clip(0, 2 * buckets - 1)


@pytest.mark.parametrize(("buckets", "positions"), [(256, 512), (8, 24)])
def test_distances_share_buckets(buckets, positions):
  length = 40
  config = DebertaConfig(num_buckets=buckets, max_distance=positions)
  rows = np.asarray(distance_rows(config, length))
  np.testing.assert_array_equal(rows, torch_rows(length, buckets, positions))
  assert rows[0, 0] == buckets


RATES = ("hidden_dropout", "attention_dropout", "pooler_dropout", "head_dropout")


@pytest.mark.parametrize("rate", RATES)
def test_dropout(rate):
  model_inputs, outputs = expected("v2_regression")
  keys, none = jax.random.split(jax.random.key(0)), dict.fromkeys(RATES, 0.0)
  config, params = load_deberta(golden.GOLDEN / "v2_regression", **none | {rate: 0.3})
  first_draw, second_draw = (
    run(config, params, *model_inputs, deterministic=False, key=key) for key in keys
  )
  assert relative_difference(first_draw, outputs["logits"]) > 1e-3
  assert relative_difference(first_draw, second_draw) > 1e-3
  # The same for every rate, and so compiled once.
  plain = run(dataclasses.replace(config, **dict.fromkeys(RATES, 0.3)), params, *model_inputs)
  assert relative_difference(plain, outputs["logits"]) < 1e-5
  config, _ = load_deberta(golden.GOLDEN / "v2_regression", **none)
  zero = run(config, params, *model_inputs, deterministic=False, key=keys[0])
  np.testing.assert_array_equal(zero, plain)


@pytest.mark.parametrize(
  ("name", "computation"),
  [
    ("v2_regression", "scanned"),
    pytest.param("v3_classifier", "unrolled", marks=pytest.mark.long),
  ],
)
def test_lora_of_all_dense_layers(name, computation, tmp_path):
  """Each layer uses query and key twice, for tokens and for distances."""
  config, params = load_deberta(golden.GOLDEN / name, **COMPUTATIONS[computation])
  model_inputs, outputs = expected(name)
  target, fn = r"layers(_\d+)?/(attn|mlp)/\w+/kernel", functools.partial(run, config)
  lora_config = lj.LoraConfig(2, 4.0, target, extra="head/.*")
  adapted = lj.lora(fn, lora_config)
  trainable = adapted.init(jax.random.key(0), params, *model_inputs)
  apply = jax.jit(adapted.apply)
  assert relative_difference(apply(params, trainable, *model_inputs), outputs["logits"]) < 1e-5
  trainable = randomized(trainable)
  out = apply(params, trainable, *model_inputs)
  assert relative_difference(fn(adapted.merge(params, trainable), *model_inputs), out) < 1e-5
  assert relative_difference(out, outputs["logits"]) > 0.1
  tensors = stored_tensors(config)
  save_peft(tmp_path / "new", lora_config, trainable, tensors, params)
  back = load_peft(tmp_path / "new", tensors, params)
  reloaded = jax.jit(lj.lora(fn, back[0]).apply)
  assert relative_difference(reloaded(params, back[1], *model_inputs), out) < 1e-5


@pytest.mark.parametrize("name", ["v3_masked", "v3_classifier"])
def test_a_new_head(name):
  key, (model_inputs, outputs) = jax.random.key(7), expected(name)
  config, params = load_deberta(golden.GOLDEN / name, num_labels=5, key=key)
  assert 0.01 < float(params["head"]["dense"]["kernel"].std()) < 0.03
  logits = jax.eval_shape(functools.partial(run, config), params, *model_inputs)
  assert logits.shape == (2, 5)
  hidden = run(config, params, *model_inputs, method="hidden")
  real = np.asarray(model_inputs[1], bool)
  assert relative_difference(hidden[real], outputs["hidden"][real]) < 1e-5
  with pytest.raises(ValueError, match=r"not one of 5\. Give a key to make a new one"):
    load_deberta(golden.GOLDEN / name, num_labels=5)


def test_a_null_is_the_default(tmp_path):
  shutil.copytree(golden.GOLDEN / "v3", tmp_path / "new")
  path = tmp_path / "new" / "config.json"
  fields = json.loads(path.read_text())
  empty = {"pooler_dropout": None, "conv_act": None, "cls_dropout": None, "conv_kernel_size": None}
  path.write_text(json.dumps(fields | empty))
  assert load_deberta(tmp_path / "new")[0] == load_deberta(golden.GOLDEN / "v3")[0]


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("v3", {"model_type": "deberta"}, "expected model_type deberta-v2, got 'deberta'"),
    ("v3", {"hidden_size": 0}, r"hidden_size must be an integer in \[1, .*, got 0"),
    ("v3", {"position_buckets": "8"}, "position_buckets must be an integer, got '8'"),
    ("v3", {"relative_attention": False}, "relative_attention=False is not supported"),
    ("v3", {"embedding_size": 8}, "embedding_size=8 is not supported; expected 16"),
    ("v3", {"conv_groups": 2}, "conv_groups=2 is not supported; expected 1"),
    ("v3", {"position_buckets": 64}, "num_buckets must be at least 4 and below 47"),
    ("v3", {"pooler_hidden_act": "mish"}, "pooler_hidden_act must be one of .* got 'mish'"),
    ("v3", {"share_att_key": False}, r"missing .*attention\.self\.pos_key_proj"),
    ("v3", {"conv_kernel_size": 4}, "conv_size must be an odd number, got 4"),
    ("v3", {"num_hidden_layers": 1}, "num_hidden_layers is 1 .* the weights have 2 layers"),
  ],
)
def test_folders_that_are_computed_otherwise_are_refused(name, fields, message, tmp_path):
  shutil.copytree(golden.GOLDEN / name, tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  with pytest.raises(ValueError, match=message):
    load_deberta(tmp_path / "model")


V2 = {"embed_dim": 1536, "num_heads": 24, "mlp_dim": 6144, "conv_size": 3}
LARGE = {"embed_dim": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}
PUBLISHED = {  # parameters of the published models, heads of language models left out
  "deberta-v2-xlarge": (DebertaConfig(num_layers=24, **V2), 884_593_152),
  "deberta-v2-xxlarge": (DebertaConfig(num_layers=48, scan_layers=True, **V2), 1_564_549_632),
  "deberta-v2-xxlarge, MNLI": (
    DebertaConfig(num_layers=48, scan_layers=True, num_labels=3, **V2),
    1_566_915_075,
  ),
  "deberta-v3-base": (DebertaConfig(), 183_831_552),
  "deberta-v3-large": (DebertaConfig(**LARGE), 434_012_160),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  config, count = PUBLISHED[name]
  assert sum(leaf.size for leaf in jax.tree.leaves(params_shapes(config))) == count
