"""Adapters from and to PEFT have the same logits, names and shapes, and are read strictly."""

import dataclasses
import functools
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights
from lora_jax.interop import load_peft, save_merged, save_peft
from lora_jax.interop.peft.config import parse
from lora_jax.interop.peft.names import shortest_endings
from lora_jax.models.gpt2 import folder as gpt2_folder
from lora_jax.models.gpt2.folder import load_gpt2, stored_tensors
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama import folder as llama_folder
from lora_jax.models.llama.model import Llama
from lora_jax.trees import leaves_with_path

from tests import make_peft_golden as golden
from tests.paths import ROOT
from tests.toy_models import randomized, relative_difference

QUERY_VALUE = r"h(_\d+)?/attn/(query|value)/kernel"
ALL = [pytest.param(name, id=name) for name in golden.ADAPTERS]


@functools.cache
def base(name, scan_layers=False):
  family = gpt2_folder if name.startswith("gpt2") else llama_folder
  load = load_gpt2 if name.startswith("gpt2") else llama_folder.load_llama
  config, params = load(golden.MODELS / name, scan_layers=scan_layers)
  return config, params, family.stored_tensors(config)


@functools.cache
def model(config):
  module = (GPT2 if isinstance(config, GPT2Config) else Llama)(config)
  return jax.jit(lambda params, tokens: module.apply({"params": params}, tokens))


def logits(name, adapter, scan_layers=False):
  """Returns the logits of an adapted model, branch by branch and merged."""
  config, params, _ = base(name, scan_layers)
  adapted = lj.lora(model(config), adapter[0])
  tokens = jnp.asarray(golden.tokens_of(name))
  merged = model(config)(adapted.merge(params, adapter[1]), tokens)
  return jax.jit(adapted.apply)(params, adapter[1], tokens), merged


def expected(name):
  return load_file(golden.GOLDEN / f"{name}.safetensors")["logits"]


@pytest.mark.parametrize("name", ALL)
def test_logits_are_pefts(name):
  base_name, _ = golden.ADAPTERS[name]
  config, params, tensors = base(base_name)
  adapter = load_peft(golden.GOLDEN / name, tensors, params)
  plain = model(config)(params, jnp.asarray(golden.tokens_of(base_name)))
  assert relative_difference(plain, expected(name)) > 0.05, "the adapter changes next to nothing"
  for got in logits(base_name, adapter):
    assert relative_difference(got, expected(name)) < 1e-5


@pytest.mark.parametrize("name", ["fused", "layers", "biases"])
def test_logits_are_pefts_with_stacked_layers(name):
  _, params, tensors = base("gpt2/tied", scan_layers=True)
  adapter = load_peft(golden.GOLDEN / name, tensors, params)
  for got in logits("gpt2/tied", adapter, scan_layers=True):
    assert relative_difference(got, expected(name)) < 1e-5


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(
  "name",
  [
    *("fused", "rslora", "layers", "biases", "own_biases", "saved"),
    *("llama", "qwen", "llama_saved"),
    *("mixtral", "experts", "one_parameter", "router"),
  ],
)
def test_there_and_back(name, scan_layers, tmp_path):
  """Parts of a fused weight that share A become one again, as in PEFT's own file."""
  base_name, _ = golden.ADAPTERS[name]
  _, params, tensors = base(base_name, scan_layers)
  adapter = load_peft(golden.GOLDEN / name, tensors, params)
  save_peft(tmp_path / "new", *adapter, tensors, params)
  first, second = (
    load_file(folder / "adapter_model.safetensors")
    for folder in (golden.GOLDEN / name, tmp_path / "new")
  )
  if name != "layers":  # whose biases of B are in those of the layers then
    assert list(first) == list(second)
    for key, array in first.items():
      np.testing.assert_array_equal(second[key], array)
  for got in logits(base_name, load_peft(tmp_path / "new", tensors, params), scan_layers):
    assert relative_difference(got, expected(name)) < 1e-5


def random_adapter(name="gpt2/tied", scan_layers=False, **settings):
  """Returns an adapter made here, of q and v by default, with different factors everywhere."""
  config, params, _ = base(name, scan_layers)
  settings = {"rank": 2, "alpha": 6.0, "target": QUERY_VALUE} | settings
  lora_config = lj.LoraConfig(**settings)
  adapted = lj.lora(model(config), lora_config)
  tokens = jnp.asarray(golden.tokens_of(name))
  return lora_config, randomized(adapted.init(jax.random.key(0), params, tokens))


CASES = {
  "q and v": {},
  "rules": {"rules": [lj.LoraRule(r"h_1/attn/value/kernel", rank=3, alpha=1.0)]},
  "layers": {"layers": [1]},
  "stack": {"scan_layers": True},
  "part of a stack": {"scan_layers": True, "stacked_layers": [1]},
  "with the last norm": {"extra": "ln_f/.*"},
}


@pytest.mark.parametrize("case", CASES)
def test_our_adapters_in_peft(case, tmp_path):
  """Ranks of separate q and v add up on the fused weight: q's rows, k's zeros, v's rows."""
  scan_layers = CASES[case].get("scan_layers", False)
  adapter = random_adapter(**CASES[case])
  _, params, tensors = base("gpt2/tied", scan_layers)
  save_peft(tmp_path / "new", *adapter, tensors, params, base_model="golden/tied")
  back = load_peft(tmp_path / "new", tensors, params)
  for got, before in zip(
    logits("gpt2/tied", back, scan_layers), logits("gpt2/tied", adapter, scan_layers), strict=True
  ):
    assert relative_difference(got, before) < 1e-5
  arrays = load_file(tmp_path / "new" / "adapter_model.safetensors")
  name = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
  rank = 5 if case == "rules" else 4
  assert arrays[name.format("A")].shape == (rank, 32)
  assert arrays[name.format("B")].shape == (96, rank)
  assert not arrays[name.format("B")][32:64].any()
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  whole = case not in ("layers", "part of a stack")
  assert written["target_modules"] == (["c_attn"] if whole else ["h.1.attn.c_attn"])
  assert written["base_model_name_or_path"] == "golden/tied"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("case", ["q and v", "rules", "with the last norm"])
def test_peft_itself_agrees(case, tmp_path):
  peft = pytest.importorskip("peft", reason="peft is not installed")
  _, params, tensors = base("gpt2/tied")
  adapter = random_adapter(**CASES[case])
  for name, for_server in (("new", False), ("server", True)):
    if for_server and "extra" in CASES[case]:
      continue
    save_peft(tmp_path / name, *adapter, tensors, params, for_server=for_server)
    peer = peft.PeftModel.from_pretrained(golden.base_model("gpt2/tied"), tmp_path / name).eval()
    got = golden.logits(peer, golden.tokens_of("gpt2/tied"))
    assert relative_difference(got, logits("gpt2/tied", adapter)[0]) < 1e-5


EXPERTS = {"alpha": 6.0, "target": r".*(/experts/\w+|/attn/query/kernel)"}


@pytest.mark.parametrize(
  ("scan_layers", "published"),
  [
    (False, False),
    pytest.param(False, True, marks=pytest.mark.long),
    pytest.param(True, False, marks=pytest.mark.long),
    (True, True),
  ],
)
def test_experts_there_and_back(scan_layers, published, tmp_path):
  """Gate and up are in PEFT's fused parameter, or have the names of published folders."""
  name = "llama/mixtral"
  config, params, _ = base(name, scan_layers)
  adapter = random_adapter(name, scan_layers, rules=[lj.LoraRule(".*/up", rank=3)], **EXPERTS)
  tensors = llama_folder.stored_tensors(config, published=published)
  save_peft(tmp_path / "new", *adapter, tensors, params, for_server=published)
  back = load_peft(tmp_path / "new", tensors, params)
  for got, before in zip(
    logits(name, back, scan_layers), logits(name, adapter, scan_layers), strict=True
  ):
    assert relative_difference(got, before) < 1e-5
  arrays = load_file(tmp_path / "new" / "adapter_model.safetensors")
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  prefix = "base_model.model.model.layers.1"
  if published:
    assert arrays[f"{prefix}.block_sparse_moe.experts.3.w1.lora_A.weight"].shape == (3, 16)
    assert written["target_modules"] == ["q_proj", "w1", "w3", "w2"]
  else:
    assert arrays[f"{prefix}.mlp.experts.base_layer.lora_A.weight"].shape == (4 * (2 + 3), 16)
    assert arrays[f"{prefix}.mlp.experts.lora_B.weight"].shape == (16, 2 * 4)
    assert written["target_parameters"] == ["gate_up_proj", "down_proj"]
    with pytest.raises(ValueError, match="servers read no target_parameters"):
      save_peft(tmp_path / "server", *adapter, tensors, params, for_server=True)


@pytest.mark.parametrize("published", [False, True])
def test_an_adapter_of_some_experts(published, tmp_path):
  name = "llama/mixtral"
  config, params, _ = base(name)
  rule = lj.LoraRule(".*/down", stacked_layers=[1, 2])
  adapter = random_adapter(name, rules=[rule], **EXPERTS | {"target": "layers_0/mlp/experts/down"})
  tensors = llama_folder.stored_tensors(config, published=published)
  save_peft(tmp_path / "new", *adapter, tensors, params)
  back = load_peft(tmp_path / "new", tensors, params)
  assert relative_difference(logits(name, back)[0], logits(name, adapter)[0]) < 1e-5
  if published:
    stacked, layers, tensors = base(name, scan_layers=True)
    with pytest.raises(ValueError, match=r"some experts of stacked layers; load .*scan_layers=Fal"):
      load_peft(tmp_path / "new", llama_folder.stored_tensors(stacked, published=True), layers)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # they did match
@pytest.mark.parametrize("published", [False, True])
def test_peft_itself_agrees_about_experts(published, tmp_path):
  peft = pytest.importorskip("peft", reason="peft is not installed")
  name = "llama/mixtral"
  config, params, _ = base(name)
  adapter = random_adapter(name, **EXPERTS)
  tensors = llama_folder.stored_tensors(config, published=published)
  save_peft(tmp_path / "new", *adapter, tensors, params)
  peer = peft.PeftModel.from_pretrained(golden.base_model(name), tmp_path / "new").eval()
  tokens = golden.tokens_of(name)
  for got in (golden.logits(peer, tokens), golden.logits(peer.merge_and_unload(), tokens)):
    assert relative_difference(got, logits(name, adapter)[0]) < 1e-5


def test_the_format_for_servers(tmp_path):
  """It has one rank and one alpha, and only the published fields."""
  _, params, tensors = base("gpt2/tied")
  adapter = random_adapter(**CASES["rules"])
  save_peft(tmp_path / "new", *adapter, tensors, params, for_server=True)
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  assert (written["r"], written["lora_alpha"]) == (5, 6)
  assert not {"rank_pattern", "alpha_pattern", "modules_to_save", "use_dora"} & set(written)
  arrays = load_file(tmp_path / "new" / "adapter_model.safetensors")
  assert {key.split(".")[-2] for key in arrays} == {"lora_A", "lora_B"}
  assert {min(array.shape) for array in arrays.values()} == {5}
  got = logits("gpt2/tied", load_peft(tmp_path / "new", tensors, params))[0]
  assert relative_difference(got, logits("gpt2/tied", adapter)[0]) < 1e-5
  adapter = random_adapter(extra="ln_f/.*")
  with pytest.raises(ValueError, match="servers read no fully trained leaves: ln_f/bias"):
    save_peft(tmp_path / "other", *adapter, tensors, params, for_server=True)


@pytest.mark.parametrize(
  ("name", "settings", "rank", "alpha"),
  [
    ("llama/llama3", {"target": r".*/attn/(query|out)/kernel"}, 2, 6),
    ("gpt2/tied", {}, 4, 12),  # of query and value in one weight
    ("gpt2/tied", {"target": r".*/(attn/query|mlp/up)/kernel"}, 2, 6),
    ("gpt2/tied", {"target": r".*/(query|value|up)/kernel"}, 4, 12),
  ],
)
def test_alpha_is_not_folded_into_b(name, settings, rank, alpha, tmp_path):
  """As long as one scaling holds for all modules, B is written as it was trained."""
  _, params, tensors = base(name)
  config, trainable = random_adapter(name, **settings)
  for form in (False, True):
    save_peft(tmp_path / str(form), config, trainable, tensors, params, for_server=form)
    written = json.loads((tmp_path / str(form) / "adapter_config.json").read_text())
    if form:
      assert (written["r"], written["lora_alpha"]) == (rank, alpha)
      assert type(written["lora_alpha"]) is int
  plain, padded = (
    load_file(tmp_path / str(form) / "adapter_model.safetensors") for form in (False, True)
  )
  for key, array in padded.items():
    trained = plain[key]
    np.testing.assert_array_equal(array[: trained.shape[0], : trained.shape[1]], trained)
    assert np.count_nonzero(array) == np.count_nonzero(trained)


def test_the_keys_that_servers_read(tmp_path):
  """A Llama's are those of its modules in `transformers`, each with an A and a B."""
  config, params, tensors = base("llama/llama3")
  save_peft(
    tmp_path / "new",
    *random_adapter("llama/llama3", target=r".*/attn/(query|out)/kernel"),
    tensors,
    params,
    base_model="meta-llama/Meta-Llama-3-8B",
    for_server=True,
  )
  assert sorted(load_file(tmp_path / "new" / "adapter_model.safetensors")) == [
    f"base_model.model.model.layers.{i}.self_attn.{name}.{factor}.weight"
    for i in range(config.num_layers)
    for name in ("o_proj", "q_proj")
    for factor in ("lora_A", "lora_B")
  ]
  with safe_open(tmp_path / "new" / "adapter_model.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt"}
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  assert written["base_model_name_or_path"] == "meta-llama/Meta-Llama-3-8B"
  assert sorted(written["target_modules"]) == ["o_proj", "q_proj"]
  assert (written["peft_type"], written["task_type"], written["bias"]) == (
    "LORA",
    "CAUSAL_LM",
    "none",
  )


def test_what_peft_has_no_format_for(tmp_path):
  _, params, tensors = base("gpt2/tied")
  with pytest.raises(ValueError, match=r"PEFT trains all biases, .* has transformer\.h\.0\.attn"):
    save_peft(tmp_path / "new", *random_adapter(extra="h_0/attn/out/bias"), tensors, params)
  with pytest.raises(ValueError, match=r"transformer.ln_f has ln_f/bias, ln_f/scale, of which"):
    save_peft(tmp_path / "new", *random_adapter(extra="ln_f/scale"), tensors, params)
  with pytest.raises(ValueError, match=r"wte is the head too .* PEFT trains only the lookup"):
    save_peft(tmp_path / "new", *random_adapter(target="wte/embedding"), tensors, params)
  (tmp_path / "there").mkdir()
  with pytest.raises(FileExistsError, match="nothing is overwritten"):
    save_peft(tmp_path / "there", *random_adapter(), tensors, params)
  assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.fixture
def adapter(tmp_path):
  shutil.copytree(golden.GOLDEN / "fused", tmp_path / "adapter")
  return tmp_path / "adapter"


def edit_config(folder, **fields):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


TABLE = "base_model.model.model.embed_tokens.base_layer.weight"
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture
def llama_adapter(tmp_path):
  """Returns a function that loads an adapter of embeddings with further tensors in its file."""
  _, params, tensors = base("llama/llama_biased")
  shutil.copytree(golden.GOLDEN / "llama_saved", tmp_path / "adapter")
  path = tmp_path / "adapter" / "adapter_model.safetensors"
  arrays = load_file(path)

  def load(extra, params=params, tensors=tensors):
    save_file(arrays | extra, path)
    return load_peft(tmp_path / "adapter", tensors, params)

  return load


def test_a_saved_embedding_is_compared(llama_adapter):
  """PEFT saves it by default where the embedding or the head is adapted."""
  _, params, _ = base("llama/llama_biased")
  table = np.asarray(params["token_embedding"]["embedding"])
  got = logits("llama/llama_biased", llama_adapter({TABLE: table}))[0]
  assert relative_difference(got, expected("llama_saved")) < 1e-5
  llama_adapter({TABLE: table + 1}, jax.eval_shape(lambda: params))  # which have no values


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(("float64", *DTYPES), DTYPES)))
def test_a_saved_embedding_may_be_rounded(saved, loaded, llama_adapter):
  """By the dtype of training or saving, and by the dtype in which the base model is loaded."""
  _, params, _ = base("llama/llama_biased")
  table = np.asarray(params["token_embedding"]["embedding"])
  copy, other = (table.astype(jnp.dtype(dtype)) for dtype in (saved, loaded))
  params = params | {"token_embedding": {"embedding": jnp.asarray(other)}}
  llama_adapter({TABLE: copy}, params)
  changed = copy.copy()
  changed[3, 5] = 1.01 * float(copy[3, 5])
  with pytest.raises(ValueError, match=r"differs from the base model's model\.embed_tokens"):
    llama_adapter({TABLE: changed}, params)


def test_copies_and_names_of_a_state_dict_are_accepted(adapter):
  """Names with the adapter's name, and all tensors of the base model, a tied head included."""
  _, params, tensors = base("gpt2/tied")
  path = adapter / "adapter_model.safetensors"
  arrays = load_file(path)
  model = load_file(golden.MODELS / "gpt2/tied/model.safetensors")
  for name in ("default", "my-adapter_2"):
    renamed = {key.replace(".weight", f".{name}.weight"): x for key, x in arrays.items()}
    copies = {f"base_model.model.{key}": x for key, x in model.items()}
    for key in [key for key in copies if key.endswith(("c_attn.weight", "c_attn.bias"))]:
      module, kind = key.rsplit(".", 1)
      copies[f"{module}.base_layer.{kind}"] = copies.pop(key)
    copies[HEAD] = model["transformer.wte.weight"].copy()
    save_file(renamed | copies, path)
    got = load_peft(adapter, tensors, params)
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.tree.leaves(got[1]),
      jax.tree.leaves(load_peft(golden.GOLDEN / "fused", tensors, params)[1]),
    )


def test_saved_modules_of_a_state_dict_are_read(llama_adapter, tmp_path):
  path = golden.GOLDEN / "llama_saved" / "adapter_model.safetensors"
  _, params, tensors = base("llama/llama_biased")
  shutil.copytree(path.parent, tmp_path / "other")
  arrays = load_file(path)
  head = arrays.pop(HEAD)
  arrays[HEAD.replace(".weight", ".modules_to_save.default.weight")] = head
  arrays[HEAD.replace(".weight", ".original_module.weight")] = load_file(
    golden.MODELS / "llama/llama_biased/model.safetensors"
  )["lm_head.weight"]
  save_file(arrays, tmp_path / "other" / "adapter_model.safetensors")
  got = load_peft(tmp_path / "other", tensors, params)[1]
  jax.tree.map(np.testing.assert_array_equal, got, llama_adapter({})[1])


def test_an_adapter_of_a_deeper_model_is_refused(adapter):
  config, params, _ = base("gpt2/tied")
  smaller = stored_tensors(dataclasses.replace(config, num_layers=1))
  with pytest.raises(ValueError, match=r"layers 0 to 1, expected 0: .* unexpected .*h\.1\.attn"):
    load_peft(adapter, smaller, params)


@pytest.mark.parametrize(
  ("fields", "chosen"),
  [
    ({"target_modules": ["c_proj"]}, ["h.0.attn.c_proj", "h.0.mlp.c_proj"]),
    ({"target_modules": ["mlp.c_proj"]}, ["h.0.mlp.c_proj"]),
    ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, ["h.0.attn.c_proj"]),
    ({"target_modules": ["c_proj"], "layers_to_transform": [1]}, []),
    ({"target_modules": ["h.0.mlp.c_proj"], "layers_to_transform": [1]}, ["h.0.mlp.c_proj"]),
    ({"target_modules": ["c_proj"], "layers_to_transform": 0, "layers_pattern": "h"}, "both"),
    ({"target_modules": ["c_proj"], "modules_to_save": ["mlp"]}, ["h.0.attn.c_proj"]),
    ({"target_modules": ["mlp.c_proj"], "use_dora": None, "lora_bias": None}, ["h.0.mlp.c_proj"]),
  ],
)
def test_which_modules_are_meant(fields, chosen, tmp_path):
  modules = ["h.0.attn.c_proj", "h.0.mlp.c_proj"]
  config = parse({"peft_type": "LORA", "r": 2, **fields}, tmp_path)
  wanted = modules if chosen == "both" else chosen
  assert [name for name in modules if config.targets(name)] == wanted


def test_the_shortest_endings():
  modules = ["h.0.attn.proj", "h.0.mlp.proj", "h.1.attn.proj", "h.1.mlp.proj"]
  assert shortest_endings(modules, modules) == ["proj"]
  assert shortest_endings(["h.0.mlp.proj", "h.1.mlp.proj"], modules) == ["mlp.proj"]
  assert shortest_endings(["h.1.mlp.proj"], modules) == ["h.1.mlp.proj"]


def test_the_docs_examples_run(adapter):
  text = (ROOT / "docs" / "peft.md").read_text()
  block = "".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
  block = block.replace('"BASE"', repr(str(golden.MODELS / "gpt2/tied"))).replace(
    "ADAPTER", str(adapter)
  )
  block = block.replace("NEW", str(adapter.parent / "new"))
  names = {"load_gpt2": load_gpt2, "load_peft": load_peft, "stored_tensors": stored_tensors}
  names |= {
    "save_merged": save_merged,
    "lora_jax": lj,
    "GPT2": GPT2,
    "tokens": jnp.asarray(golden.tokens_of("gpt2/tied")),
  }
  exec(block, names)
  assert relative_difference(names["logits"], expected("fused")) < 1e-5
  merged = load_gpt2(adapter.parent / "new")[1]
  got = model(names["config"])(merged, names["tokens"])
  assert relative_difference(got, expected("fused")) < 1e-5


def test_an_adapter_is_read_with_only_the_base_models_shapes():
  """Shapes suffice unless biases of B must be added to the base model's."""
  _, params, tensors = base("gpt2/tied")
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
  _, trainable = load_peft(golden.GOLDEN / "fused", tensors, shapes)
  assert set(adapter_weights(trainable)) == {
    path
    for path, _ in leaves_with_path(params)
    if path.split("/")[-2] in ("query", "key", "value") and path.endswith("kernel")
  }
