"""Adapters from and to PEFT: the same logits, names and shapes, and nothing read loosely."""

import dataclasses
import functools
import json
import pickle
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
from lora_jax.interop.peft.config import parse, shortest_endings
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
  """Returns the logits of an adapted base, branch by branch and merged."""
  config, params, _ = base(name, scan_layers)
  adapted = lj.lora(model(config), adapter[0])
  tokens = jnp.asarray(golden.tokens_of(name))
  merged = model(config)(adapted.merge(params, adapter[1]), tokens)
  return jax.jit(adapted.apply)(params, adapter[1], tokens), merged


def expected(name):
  return load_file(golden.GOLDEN / f"{name}.safetensors")["logits"]


@pytest.mark.parametrize("name", ALL)
def test_logits_are_pefts(name):
  of, _ = golden.ADAPTERS[name]
  config, params, tensors = base(of)
  adapter = load_peft(golden.GOLDEN / name, tensors, params)
  plain = model(config)(params, jnp.asarray(golden.tokens_of(of)))
  assert relative_difference(plain, expected(name)) > 0.05, "the adapter changes next to nothing"
  for got in logits(of, adapter):
    assert relative_difference(got, expected(name)) < 1e-5


@pytest.mark.parametrize("name", ["fused", "layers", "biases"])
def test_logits_are_pefts_with_stacked_layers(name):
  _, params, tensors = base("gpt2/tied", scan_layers=True)
  adapter = load_peft(golden.GOLDEN / name, tensors, params)
  for got in logits("gpt2/tied", adapter, scan_layers=True):
    assert relative_difference(got, expected(name)) < 1e-5


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
  "name",
  [
    *("fused", "rslora", "layers", "biases", "own_biases", "saved"),
    *("llama", "qwen", "llama_saved"),
    *("mixtral", "experts", "one_parameter", "router"),
  ],
)
def test_there_and_back(name, scan_layers, tmp_path):
  """Parts of a fused weight that share A become one again: PEFT's own file."""
  of, _ = golden.ADAPTERS[name]
  _, params, tensors = base(of, scan_layers)
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
  for got in logits(of, load_peft(tmp_path / "new", tensors, params), scan_layers):
    assert relative_difference(got, expected(name)) < 1e-5


def ours(name="gpt2/tied", scan_layers=False, **settings):
  """Returns an adapter made here, of q and v by default, whose factors are all different."""
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
def test_ours_as_pefts(case, tmp_path):
  """Of separate q and v, ranks add up on the fused weight: q's rows, k's zeros, v's rows."""
  scan_layers = CASES[case].get("scan_layers", False)
  adapter = ours(**CASES[case])
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
  adapter = ours(**CASES[case])
  for name, for_server in (("new", False), ("server", True)):
    if for_server and "extra" in CASES[case]:
      continue
    save_peft(tmp_path / name, *adapter, tensors, params, for_server=for_server)
    theirs = peft.PeftModel.from_pretrained(golden.base_model("gpt2/tied"), tmp_path / name).eval()
    got = golden.logits(theirs, golden.tokens_of("gpt2/tied"))
    assert relative_difference(got, logits("gpt2/tied", adapter)[0]) < 1e-5


EXPERTS = {"alpha": 6.0, "target": r".*(/experts/\w+|/attn/query/kernel)"}


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_experts_there_and_back(scan_layers, published, tmp_path):
  """Gate and up stand in PEFT's fused parameter, or by the names of published folders alone."""
  name = "llama/mixtral"
  config, params, _ = base(name, scan_layers)
  adapter = ours(name, scan_layers, rules=[lj.LoraRule(".*/up", rank=3)], **EXPERTS)
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
    with pytest.raises(ValueError, match="the form for servers has no target_parameters"):
      save_peft(tmp_path / "server", *adapter, tensors, params, for_server=True)


@pytest.mark.parametrize("published", [False, True])
def test_an_adapter_of_some_experts(published, tmp_path):
  name = "llama/mixtral"
  config, params, _ = base(name)
  rule = lj.LoraRule(".*/down", stacked_layers=[1, 2])
  adapter = ours(name, rules=[rule], **EXPERTS | {"target": "layers_0/mlp/experts/down"})
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
  adapter = ours(name, **EXPERTS)
  tensors = llama_folder.stored_tensors(config, published=published)
  save_peft(tmp_path / "new", *adapter, tensors, params)
  theirs = peft.PeftModel.from_pretrained(golden.base_model(name), tmp_path / "new").eval()
  tokens = golden.tokens_of(name)
  for got in (golden.logits(theirs, tokens), golden.logits(theirs.merge_and_unload(), tokens)):
    assert relative_difference(got, logits(name, adapter)[0]) < 1e-5


def test_the_form_for_servers(tmp_path):
  """One rank and one alpha, and the fields of the published form alone."""
  _, params, tensors = base("gpt2/tied")
  adapter = ours(**CASES["rules"])
  save_peft(tmp_path / "new", *adapter, tensors, params, for_server=True)
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  assert (written["r"], written["lora_alpha"]) == (5, 5.0)
  assert not {"rank_pattern", "alpha_pattern", "modules_to_save", "use_dora"} & set(written)
  arrays = load_file(tmp_path / "new" / "adapter_model.safetensors")
  assert {key.split(".")[-2] for key in arrays} == {"lora_A", "lora_B"}
  assert {min(array.shape) for array in arrays.values()} == {5}
  got = logits("gpt2/tied", load_peft(tmp_path / "new", tensors, params))[0]
  assert relative_difference(got, logits("gpt2/tied", adapter)[0]) < 1e-5
  adapter = ours(extra="ln_f/.*")
  with pytest.raises(ValueError, match=r"servers read no leaves that are trained whole: ln_f/bias"):
    save_peft(tmp_path / "other", *adapter, tensors, params, for_server=True)


def test_the_keys_that_servers_read(tmp_path):
  """Of a Llama: those of its modules in `transformers`, each with an A and a B, and no others."""
  config, params, tensors = base("llama/llama3")
  save_peft(
    tmp_path / "new",
    *ours("llama/llama3", target=r".*/attn/(query|out)/kernel"),
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


def test_what_peft_has_no_form_for(tmp_path):
  _, params, tensors = base("gpt2/tied")
  with pytest.raises(ValueError, match=r"PEFT trains all biases, .* has transformer\.h\.0\.attn"):
    save_peft(tmp_path / "new", *ours(extra="h_0/attn/out/bias"), tensors, params)
  with pytest.raises(ValueError, match=r"transformer.ln_f has ln_f/bias, ln_f/scale, of which"):
    save_peft(tmp_path / "new", *ours(extra="ln_f/scale"), tensors, params)
  with pytest.raises(ValueError, match=r"wte is the head too\. PEFT trains its lookup alone"):
    save_peft(tmp_path / "new", *ours(target="wte/embedding"), tensors, params)
  (tmp_path / "there").mkdir()
  with pytest.raises(FileExistsError, match="nothing is overwritten"):
    save_peft(tmp_path / "there", *ours(), tensors, params)
  assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.fixture
def adapter(tmp_path):
  shutil.copytree(golden.GOLDEN / "fused", tmp_path / "adapter")
  return tmp_path / "adapter"


def edit_config(folder, **fields):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"r": 8}, r"lora_A.weight has shape \(4, 32\), expected \(8, 32\)"),
    ({"r": 8}, r"Load the base that it was trained on \(golden/gpt2/tied\), and leave adapter_c"),
    ({"kasa_config": {"a": 1}}, r"KaSA does not exist here yet"),
    ({"r": "8"}, r"the rank 'r' is|r is '8', expected int"),
    ({"use_dora": True}, r"missing base_model.*c_attn\.lora_magnitude_vector \(96,\)"),
    ({"use_dora": True, "lora_bias": True}, r"PEFT has no use_dora with lora_bias"),
    ({"use_dora": True, "target_parameters": ["down_proj"]}, r"no use_dora with target_parameters"),
    ({"peft_type": "IA3"}, r"expected peft_type LORA, got 'IA3'"),
    ({"target_modules": ["q_proj"]}, r"\['q_proj'\]|\('q_proj',\) are none of this model's"),
    ({"target_modules": ["c_attn", "c_fc"]}, r"missing base_model.*c_fc.lora_A.weight \(4, 32\)"),
    ({"layers_to_transform": [0]}, r"unexpected base_model.*h\.1\.attn\.c_attn\.lora_A"),
    ({"bias": "some"}, r"bias is 'some', expected none, all or lora_only"),
    ({"new_thing": 3}, r"the field new_thing=3 is not known here"),
    ({"target_parameters": ["experts"]}, r"\('experts',\): this model has no experts, but none"),
    ({"target_modules": ["wte"]}, r"wte is the head too"),
    ({"target_modules": None}, r"target_modules is missing"),
    ({"init_lora_weights": "pissa"}, r"'pissa' changes the base when PEFT loads the adapter"),
    ({"modules_to_save": ["wte"]}, r"wte is the head too"),
  ],
)
def test_configs_that_do_not_fit_are_refused(adapter, fields, message):
  edit_config(adapter, **fields)
  _, params, tensors = base("gpt2/tied")
  with pytest.raises(ValueError, match=message):
    load_peft(adapter, tensors, params)


def test_the_bases_embedding_beside_its_adapter_is_compared(tmp_path):
  """PEFT saves it by default where the embedding or the head is adapted."""
  _, params, tensors = base("llama/llama_biased")
  shutil.copytree(golden.GOLDEN / "llama_saved", tmp_path / "adapter")
  path = tmp_path / "adapter" / "adapter_model.safetensors"
  arrays, name = load_file(path), "base_model.model.model.embed_tokens.base_layer.weight"
  table = np.asarray(params["token_embedding"]["embedding"])
  save_file(arrays | {name: table}, path)
  got = logits("llama/llama_biased", load_peft(tmp_path / "adapter", tensors, params))[0]
  assert relative_difference(got, expected("llama_saved")) < 1e-5
  narrow = table.astype(jnp.bfloat16)  # as of a base that was loaded so
  save_file(arrays | {name: narrow}, path)
  load_peft(tmp_path / "adapter", tensors, params)
  other = params | {"token_embedding": {"embedding": jnp.asarray(narrow)}}
  save_file(arrays | {name: table}, path)
  load_peft(tmp_path / "adapter", tensors, other)
  save_file(arrays | {name: table + 1}, path)
  load_peft(tmp_path / "adapter", tensors, jax.eval_shape(lambda: params))  # which have no values
  with pytest.raises(ValueError, match=r"embed_tokens that is saved with the adapter is not this"):
    load_peft(tmp_path / "adapter", tensors, params)


def test_a_name_on_the_hub_is_no_folder():
  _, params, tensors = base("gpt2/tied")
  with pytest.raises(FileNotFoundError, match=r"is not a folder; .*snapshot_download"):
    load_peft("user/adapter", tensors, params)


def test_files_that_do_not_fit_are_refused(adapter):
  config, params, tensors = base("gpt2/tied")
  weights = adapter / "adapter_model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="truncated or no safetensors file"):
    load_peft(adapter, tensors, params)
  weights.unlink()
  (adapter / "adapter_model.bin").write_bytes(pickle.dumps({}))
  with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin may be a pickle"):
    load_peft(adapter, tensors, params)
  weights.write_bytes(whole)
  arrays = load_file(weights)
  save_file({f"{name}.default": array for name, array in arrays.items()}, weights)
  with pytest.raises(ValueError, match=r"missing base_model.*; unexpected|and 4 more"):
    load_peft(adapter, tensors, params)
  smaller = stored_tensors(dataclasses.replace(config, num_layers=1))
  weights.write_bytes(whole)
  with pytest.raises(ValueError, match=r"unexpected .*h\.1\.attn"):
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


def test_the_adapter_is_read_where_its_base_is_not_needed():
  """Shapes alone do, unless biases of B are to be added to the base's."""
  _, params, tensors = base("gpt2/tied")
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
  _, trainable = load_peft(golden.GOLDEN / "fused", tensors, shapes)
  assert set(adapter_weights(trainable)) == {
    path
    for path, _ in leaves_with_path(params)
    if path.split("/")[-2] in ("query", "key", "value") and path.endswith("kernel")
  }
