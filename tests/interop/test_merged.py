"""Merged folders keep the base model's dtype, shards and files, and little is in memory."""

import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from benchmarks.load import random_llama
from benchmarks.memory import measure
from lora_jax.interop import load_peft, save_merged
from lora_jax.models.bert.folder import load_bert, stored_tensors
from lora_jax.models.bert.model import Bert
from lora_jax.models.llama import folder as llama_folder
from lora_jax.models.zoo import load_causal_lm

from tests import make_llama_golden, make_peft_golden
from tests.paths import ROOT
from tests.toy_models import randomized, relative_difference

GOLDEN = make_peft_golden.MODELS
TOKENS = jnp.asarray([[5, 17, 30, 40, 2, 9]])
ALL = r".*/(query|key|value|out|gate|up|down)/kernel"


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, tokens):
  return module.apply({"params": params}, tokens)


def adapt(model, **settings):
  """Returns an adapted model, its config, and factors that change its outputs much."""
  config = lj.LoraConfig(**{"rank": 3, "alpha": 6.0, "target": ALL} | settings)
  adapted = lj.lora(functools.partial(run, model.module), config)
  start = (jax.random.key(0), model.params, TOKENS)
  trainable = adapted.init(*start) if config.variant else jax.eval_shape(adapted.init, *start)
  return adapted, config, randomized(trainable)


def save(folder, model, config, trainable):
  return save_merged(folder, model.folder, config, trainable, model.stored, model.params)


def files_of(folder):
  """Returns the tensors of a folder, by name."""
  return functools.reduce(lambda a, b: a | load_file(b), sorted(folder.glob("*.safetensors")), {})


@pytest.fixture
def folder(tmp_path):
  """A Llama in several shards, with files of all kinds."""
  model = load_causal_lm(GOLDEN / "llama" / "llama_biased")
  model.save(tmp_path / "base", model.params, max_shard_bytes=20_000)
  for name in ("tokenizer.json", "generation_config.json", "tokenizer.model", "LICENSE.txt"):
    (tmp_path / "base" / name).write_text(f"of {name}")
  for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json"):
    (tmp_path / "base" / name).write_text("of other weights")
  return tmp_path / "base"


CASES = {
  "q and v": {"target": r".*/(query|value)/kernel"},
  "all": {},
  "some layers": {"layers": [1]},
  "stack": {"scan_layers": True},
  "part of a stack": {"scan_layers": True, "stacked_layers": [1]},
  "embedding": {"target": r"(wte|token_embedding)/embedding"},
  "extra": {"extra": [r".*norm/.*|ln_f/.*|.*/bias"]},
  "DoRA": {"variant": lj.DORA},
  "DoRA of part of a stack": {"scan_layers": True, "stacked_layers": [1], "variant": lj.DORA},
  "extra of a stack": {"scan_layers": True, "extra": [r".*/query/bias"]},
}

LONG_CASES = ("all", "some layers", "stack")  # parts of others


@pytest.mark.parametrize(
  ("name", "scan_layers"),
  [
    ("mixtral", False),
    pytest.param("mixtral", True, marks=pytest.mark.long),
    pytest.param("mixtral_fused", False, marks=pytest.mark.long),
    ("mixtral_fused", True),
  ],
)
def test_experts_are_merged_in_the_format_of_their_folder(name, scan_layers, tmp_path):
  model = load_causal_lm(GOLDEN / "llama" / name, scan_layers=scan_layers)
  published = not name.endswith("_fused")
  stored = llama_folder.stored_tensors(model.module.config, published=published)
  adapted, config, trainable = adapt(model, target=r".*/(experts/\w+|query/kernel)")
  save_merged(tmp_path / "new", model.folder, config, trainable, stored, model.params)
  expected = jax.jit(adapted.apply)(model.params, trainable, TOKENS)
  reloaded = load_causal_lm(tmp_path / "new")
  assert relative_difference(run(reloaded.module, reloaded.params, TOKENS), expected) < 1e-5
  assert set(files_of(tmp_path / "new")) == set(files_of(model.folder))


@pytest.mark.parametrize(
  ("name", "case"),
  [
    *(("gpt2/tied", case) for case in CASES if case not in LONG_CASES),
    *(pytest.param("gpt2/tied", case, marks=pytest.mark.long) for case in LONG_CASES),
    ("llama/llama_biased", "part of a stack"),
  ],
)
def test_a_merged_folder_computes_what_the_adapted_model_does(name, case, tmp_path):
  settings = dict(CASES[case])
  scan_layers = settings.pop("scan_layers", False)
  model = load_causal_lm(GOLDEN / name, scan_layers=scan_layers)
  adapted, config, trainable = adapt(model, **settings)
  errors = save(tmp_path / "new", model, config, trainable)
  expected = jax.jit(adapted.apply)(model.params, trainable, TOKENS)
  reloaded = load_causal_lm(tmp_path / "new", scan_layers=scan_layers)
  assert relative_difference(run(model.module, model.params, TOKENS), expected) > 1e-2
  assert relative_difference(run(reloaded.module, reloaded.params, TOKENS), expected) < 1e-5
  merged = jax.jit(adapted.merge)(model.params, trainable)
  assert relative_difference(reloaded.params, merged) < 1e-6
  assert set(errors.values()) == {0.0}, "float32 is not rounded"


def test_all_else_stays_byte_for_byte(folder, tmp_path):
  model = load_causal_lm(folder)
  _, config, trainable = adapt(model, target=r"layers_1/attn/query/kernel")
  save(tmp_path / "new", model, config, trainable)
  copied = {path.name for path in (tmp_path / "new").iterdir()}
  left_out = {"pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json"}
  assert copied == {path.name for path in folder.iterdir()} - left_out
  assert len(list(folder.glob("*.safetensors"))) > 3
  for path in (tmp_path / "new").iterdir():
    same = path.read_bytes() == (folder / path.name).read_bytes()
    assert same or path.suffix == ".safetensors", path
  before, after = files_of(folder), files_of(tmp_path / "new")
  assert list(before) == list(after)
  assert [name for name in before if not np.array_equal(before[name], after[name])] == [
    "model.layers.1.self_attn.q_proj.weight"
  ]
  assert {path.name for path in tmp_path.iterdir()} == {"base", "new"}


def narrow(folder, dtype):
  for path in folder.glob("*.safetensors"):
    save_file({name: array.astype(dtype) for name, array in load_file(path).items()}, path)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_the_base_models_dtype_is_kept_and_rounding_reported(folder, dtype, tmp_path):
  narrow(folder, dtype)
  model = load_causal_lm(folder)
  adapted, config, trainable = adapt(model)
  errors = save(tmp_path / "new", model, config, trainable)
  assert {array.dtype for array in files_of(tmp_path / "new").values()} == {np.dtype(dtype)}
  exact = jax.jit(adapted.merge)(model.params, trainable)
  reloaded = load_causal_lm(tmp_path / "new")
  rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), exact)
  assert relative_difference(reloaded.params, rounded) < 1e-2 * jnp.finfo(dtype).eps
  narrow_params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
  expected = lj.merge_error(adapted, narrow_params, trainable)
  assert errors.keys() == expected.keys()
  for path, error in errors.items():
    assert error == pytest.approx(float(expected[path]), rel=1e-2)
    assert 0 < error < jnp.finfo(dtype).eps


def test_only_adapted_parts_of_a_fused_tensor_change(tmp_path):
  model = load_causal_lm(GOLDEN / "gpt2" / "tied")
  _, config, trainable = adapt(model, target="h_0/attn/value/kernel", extra="h_0/attn/key/bias")
  save(tmp_path / "new", model, config, trainable)
  before, after = files_of(model.folder), files_of(tmp_path / "new")
  name = "transformer.h.0.attn.c_attn"
  same = before[f"{name}.weight"] == after[f"{name}.weight"]
  assert same[:, :64].all()
  assert not same[:, 64:].any()
  bias = after[f"{name}.bias"]
  np.testing.assert_array_equal(bias[32:64], trainable["h_0"]["attn"]["key"]["bias"])


def test_old_names_and_a_tied_head_that_is_written_out(tmp_path):
  base = Path(shutil.copytree(GOLDEN / "gpt2" / "tied", tmp_path / "base"))
  arrays = load_file(base / "model.safetensors")
  arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
  arrays["lm_head.weight"] = arrays["wte.weight"].copy()
  save_file(arrays, base / "model.safetensors")
  model = load_causal_lm(base)
  adapted, config, trainable = adapt(model, target="wte/embedding")
  save(tmp_path / "new", model, config, trainable)
  reloaded = load_causal_lm(tmp_path / "new")  # which refuses a tied head that differs
  merged = jax.jit(adapted.merge)(model.params, trainable)
  assert relative_difference(reloaded.params, merged) < 1e-6


def test_an_encoder_without_its_head_from_a_folder_with_another(tmp_path):
  """The names there have a prefix, and those of norms may be old."""
  base = Path(shutil.copytree(GOLDEN / "bert" / "bert_masked", tmp_path / "base"))
  arrays = load_file(base / "model.safetensors")
  old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in arrays.items()}
  save_file(old, base / "model.safetensors")
  encoder, params = load_bert(base)
  config = lj.LoraConfig(2, 4.0, r".*/query/kernel", extra=r"layers_0/attn_norm/.*")
  adapted = lj.lora(functools.partial(run, Bert(encoder)), config)
  trainable = randomized(adapted.init(jax.random.key(0), params, TOKENS))
  save_merged(tmp_path / "new", base, config, trainable, stored_tensors(encoder), params)
  reloaded = load_bert(tmp_path / "new")[1]
  jax.tree.map(np.testing.assert_array_equal, reloaded, adapted.merge(params, trainable))
  before, after = files_of(base), files_of(tmp_path / "new")
  changed = {name for name in before if np.any(before[name] != after[name])}
  assert "bert.encoder.layer.0.attention.output.LayerNorm.beta" in changed
  assert len(changed) == 4


def test_what_cannot_be_merged_leaves_nothing_behind(folder, tmp_path):
  model = load_causal_lm(folder)
  _, config, trainable = adapt(model)
  with pytest.raises(FileExistsError, match="nothing is overwritten"):
    save(folder, model, config, trainable)
  other = load_causal_lm(GOLDEN / "llama" / "llama2")
  arguments = (config, trainable, other.stored, other.params)
  with pytest.raises(ValueError, match=r"mis-shaped: layers_0/attn/query/kernel/lora_b is \(3, 48"):
    save_merged(tmp_path / "new", other.folder, *arguments)
  arguments = (config, trainable, model.stored, model.params)
  with pytest.raises(ValueError, match=r"q_proj.weight: expected floats of shape .*, got F32 "):
    save_merged(tmp_path / "new", other.folder, *arguments)
  with pytest.raises(ValueError, match=r"q_proj.weight: expected floats of .*, got nothing"):
    save_merged(tmp_path / "new", GOLDEN / "gpt2" / "tied", *arguments)
  narrow(folder, np.float16)
  huge = jax.tree.map(lambda x: 1e3 * x, trainable)
  with pytest.raises(ValueError, match=r"merged, it has values up to .* float16 cannot hold"):
    save(tmp_path / "new", model, config, huge)
  assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("name", ["fused", "saved", "llama", "llama_saved"])
def test_transformers_reads_merged_folders(name, tmp_path):
  transformers = pytest.importorskip("transformers", reason="transformers is not installed")
  base_name, _ = make_peft_golden.ADAPTERS[name]
  model = load_causal_lm(GOLDEN / base_name)
  adapter = load_peft(make_peft_golden.GOLDEN / name, model.stored, model.params)
  save(tmp_path / "new", model, *adapter)
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
  got = make_llama_golden.logits(peer, make_peft_golden.tokens_of(base_name).astype(np.int64))
  expected = load_file(make_peft_golden.GOLDEN / f"{name}.safetensors")["logits"]
  assert relative_difference(got, expected) < 1e-5


MERGE = """
import functools, sys
import jax
from benchmarks.memory import finish, wait_for_start
from lora_jax.interop import save_merged
from lora_jax.models.llama import folder as llama_folder
import lora_jax
from tests.toy_models import randomized

base, new = sys.argv[1:]
config = llama_folder.read_config(base)
shapes = llama_folder.params_shapes(config)
fn = lambda p, x: llama_folder.Llama(config).apply({"params": p}, x)
lora_config = lora_jax.LoraConfig(rank=4, alpha=8.0, target=".*/(query|key|value|out|up)/kernel")
lora = lora_jax.lora(fn, lora_config)
tokens = jax.ShapeDtypeStruct((1, 4), "int32")
trainable = randomized(lora.init(jax.random.key(0), shapes, tokens))
wait_for_start()
errors = save_merged(new, base, lora_config, trainable, llama_folder.stored_tensors(config), shapes)
finish(len(errors))
"""


def test_the_model_is_never_whole_in_memory(tmp_path):
  """128 MB in 8 shards: memory grows by less than half of it, with the compiler's own."""
  random_llama(tmp_path / "base", 128, shards=8, width=512, vocab_size=4096)
  command = [sys.executable, "-c", MERGE, str(tmp_path / "base"), str(tmp_path / "new")]
  root = str(ROOT)
  measured = measure(command, {"PYTHONPATH": root, "XLA_FLAGS": ""})
  assert measured.result > 20
  index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
  assert len(set(index["weight_map"].values())) >= 8
  assert measured.growth < 64_000_000
