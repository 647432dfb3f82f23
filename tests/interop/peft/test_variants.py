"""Adapters of PEFT's other methods: logits of its files, and the same files written from here."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.interop import load_peft, save_peft
from lora_jax.models.bert import folder as bert_folder
from lora_jax.models.bert.model import Bert
from lora_jax.models.zoo import load_causal_lm

from tests import make_peft_variants_golden as golden
from tests.make_peft_golden import MODELS, base_model, tokens_of
from tests.make_peft_golden import logits as peers_logits
from tests.toy_models import randomized, relative_difference

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@functools.cache
def base(name, scan_layers=False):
  """Returns a model, its jitted function of merged params, and its inputs."""
  if name == golden.BERT:
    config, params = bert_folder.load_bert(MODELS / name)
    model = SimpleNamespace(params=params, stored=bert_folder.stored_tensors(config))
    module, inputs = Bert(config), golden.inputs_of(name)
  else:
    model = load_causal_lm(MODELS / name, scan_layers=scan_layers)
    module, inputs = model.module, golden.tokens_only(name)
  fn = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))
  return model, fn, [jnp.asarray(array) for array in inputs]


@functools.cache
def read(name, scan_layers=False):
  model, _, _ = base(golden.ADAPTERS[name][0], scan_layers)
  return load_peft(golden.GOLDEN / name, model.stored, model.params)


def logits(name, adapter, scan_layers=False):
  """Returns the logits of a small model with an adapter merged, by the one compiled function."""
  model, fn, inputs = base(name, scan_layers)
  return fn(lj.lora(fn, adapter[0]).merge(model.params, adapter[1]), *inputs)


def expected(name):
  return load_file(golden.GOLDEN / f"{name}.safetensors")["logits"]


def some(names, few):
  """Returns the parameters of a test, of which only a few run in CI."""
  return [name if name in few else pytest.param(name, marks=pytest.mark.long) for name in names]


FEW = ("ia3", "hira_fused", "loha", "lokr_both", "miss_bat", "vera", "adalora", "lora_and_tokens")


@pytest.mark.parametrize("name", some(golden.ADAPTERS, (*FEW, "norms")))
def test_the_logits_are_pefts(name):
  base_name, _, _ = golden.ADAPTERS[name]
  model, fn, inputs = base(base_name)
  assert relative_difference(fn(model.params, *inputs), expected(name)) > 0.01
  assert relative_difference(logits(base_name, read(name)), expected(name)) < 1e-5


@pytest.mark.parametrize(
  ("name", "scan_layers"),
  [
    *((name, False) for name in golden.ADAPTERS),
    *((name, True) for name in ("ia3_fused", "lokr", "vera", "adalora_fused", "norms")),
  ],
)
def test_the_same_file_is_written(name, scan_layers, tmp_path):
  """The adapter that was read is written with PEFT's tensors, and fields of the same meaning."""
  model, _, _ = base(golden.ADAPTERS[name][0], scan_layers)
  save_peft(tmp_path / "new", *read(name, scan_layers), model.stored, model.params)
  arrays, theirs = (load_file(folder / FILE) for folder in (tmp_path / "new", golden.GOLDEN / name))
  assert arrays.keys() == theirs.keys()
  for key, array in theirs.items():
    np.testing.assert_allclose(arrays[key], array, rtol=1e-6, atol=1e-6, err_msg=key)
  fields, their_fields = (
    json.loads((folder / CONFIG).read_text()) for folder in (tmp_path / "new", golden.GOLDEN / name)
  )
  assert fields.keys() <= their_fields.keys(), "PEFT has all fields"
  for key in OWN_FIELDS & fields.keys() & their_fields.keys():
    assert fields[key] == their_fields[key], key


OWN_FIELDS = {
  *("peft_type", "r", "init_r", "lora_alpha", "alpha", "alpha_pattern", "bias", "token_indices"),
  *("decompose_both", "decompose_factor", "save_projection", "mini_r", "init_weights"),
}

LLAMA, GPT2 = golden.LLAMA, golden.GPT2
SOME = r".*/(query|value|down)/kernel"
UP = ".*/mlp/up/kernel"
TOKENS = lj.trainable_tokens_variant([9, 2, 5])
FEEDFORWARD = lj.LoraRule(".*/down/kernel", variant=lj.IA3_FEEDFORWARD)
OURS = {  # the model, the method of PEFT, and settings that one of its files cannot have by itself
  "scaled": (LLAMA, "HIRA", {"variant": lj.HIRA, "rules": [lj.LoraRule(UP, rank=3, alpha=9.0)]}),
  "fused HiRA": (GPT2, "HIRA", {"variant": lj.HIRA, "target": r".*/(query|value)/kernel"}),
  "ranks of LoHa": (LLAMA, "LOHA", {"variant": lj.LOHA, "rules": [lj.LoraRule(UP, rank=3)]}),
  "whole": (LLAMA, "LOKR", {"variant": lj.lokr_variant(4, "none"), "rank": 1}),
  "some pairs of LoKr": (
    LLAMA,
    "LOKR",
    {
      "variant": lj.lokr_variant(8, "both"),
      "rules": [lj.LoraRule(".*/down/kernel", rank=4), lj.LoraRule(UP, rank=1)],
    },
  ),
  "a factor between the sizes": (
    LLAMA,
    "LOKR",
    {
      "variant": lj.lokr_variant(7),
      "rank": 1,
      "target": ".*/(query|value)/kernel|lm_head/kernel",
    },
  ),
  "scaled MiSS": (LLAMA, "MISS", {"variant": lj.MISS, "rank": 3, "alpha": 5.0}),
  "scaled bat": (LLAMA, "MISS", {"variant": lj.MISS_BAT, "rank": 2, "alpha": 5.0}),
  "ranks of VeRA": (LLAMA, "VERA", {"variant": lj.VERA, "rules": [lj.LoraRule(UP, rank=5)]}),
  "one output of (IA)^3": (
    GPT2,
    "IA3",
    {"variant": lj.IA3, "rules": [FEEDFORWARD], "target": r".*/(value|down)/kernel"},
  ),
  "ranks of AdaLoRA": (
    GPT2,
    "ADALORA",
    {
      "variant": lj.ADALORA,
      "rules": [lj.LoraRule(UP, rank=5, alpha=2.0)],
      "extra": "ln_f/.*",
      "target": r".*/(query|value|up)/kernel",
    },
  ),
  "tokens and positions": (GPT2, "TRAINABLE_TOKENS", {"variant": TOKENS, "target": "w[tp]e/.*"}),
  "tokens and LoRA": (
    LLAMA,
    "LORA",
    {"target": f"{SOME}|.*embedding", "rules": [lj.LoraRule(".*embedding", variant=TOKENS)]},
  ),
  "tokens and PiSSA": (
    GPT2,
    "LORA",
    {
      "variant": lj.PISSA,
      "target": ".*/(query|down)/kernel|wte/embedding",
      "rules": [lj.LoraRule("wte/.*", variant=TOKENS)],
    },
  ),
  "norms": (LLAMA, "LN_TUNING", {"target": (), "extra": lj.NORMS}),
  "some norms": (GPT2, "LN_TUNING", {"target": (), "extra": "h_1/ln_2/.*"}),
  "VeRA and LoRA": (
    LLAMA,
    "LORA",
    {"rules": [lj.LoraRule(".*/down/kernel", variant=lj.VERA)]},
  ),
}
SCANNED = {  # over layers
  "VeRA": {"variant": lj.VERA, "rank": 6},
  "LoKr of a layer": {"variant": lj.lokr_variant(4), "stacked_layers": [1]},
  "(IA)^3": {"variant": lj.IA3, "rules": [FEEDFORWARD]},
  "AdaLoRA": {"variant": lj.ADALORA},
  "norms": {"target": (), "extra": lj.NORMS},
}


def random_adapter(base_name, scan_layers=False, **settings):
  model, fn, inputs = base(base_name, scan_layers)
  config = lj.LoraConfig(**{"rank": 2, "alpha": 6.0, "target": f"{SOME}|{UP}", **settings})
  init = lj.lora(fn, config).init
  return config, pruned(randomized(init(jax.random.key(0), model.params, *inputs)))


def pruned(trainable):
  """Returns a trained tree in which the first triplet of each weight of AdaLoRA is pruned."""
  prune = lambda path, x: x.at[..., :1].set(0) if "lora_e" in str(path[-1]) else x  # noqa: E731
  return jax.tree_util.tree_map_with_path(prune, trainable)


@pytest.mark.long
@pytest.mark.parametrize("name", OURS)
def test_our_adapters_there_and_back(name, tmp_path):
  base_name, method, settings = OURS[name]
  model, _, _ = base(base_name)
  adapter = random_adapter(base_name, **settings)
  save_peft(tmp_path / "new", *adapter, model.stored, model.params)
  assert json.loads((tmp_path / "new" / CONFIG).read_text())["peft_type"] == method
  back = load_peft(tmp_path / "new", model.stored, model.params)
  assert relative_difference(logits(base_name, back), logits(base_name, adapter)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", SCANNED)
def test_stacked_layers_there_and_back(name, tmp_path):
  model, _, _ = base(LLAMA, scan_layers=True)
  adapter = random_adapter(LLAMA, scan_layers=True, **SCANNED[name])
  save_peft(tmp_path / "new", *adapter, model.stored, model.params)
  back = load_peft(tmp_path / "new", model.stored, model.params)
  got = logits(LLAMA, back, scan_layers=True)
  assert relative_difference(got, logits(LLAMA, adapter, scan_layers=True)) < 1e-5


@pytest.mark.long
def test_some_experts_are_refused(tmp_path):
  name, settings = "llama/mixtral_fused", {"target": ".*/experts/.*", "stacked_layers": [1]}
  adapter, (model, _, _) = random_adapter(name, variant=lj.HIRA, **settings), base(name)
  with pytest.raises(ValueError, match="is of experts, for which PEFT has no HiRA"):
    save_peft(tmp_path / "new", *adapter, model.stored, model.params)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # they did match
@pytest.mark.parametrize("name", [*OURS, *(f"scanned {name}" for name in SCANNED)])
def test_peft_itself_agrees(name, tmp_path):
  peft = pytest.importorskip("peft", reason="peft is not installed")
  scan = name.startswith("scanned ")
  settings = SCANNED[name.removeprefix("scanned ")] if scan else OURS[name][2]
  base_name = LLAMA if scan else OURS[name][0]
  model, _, _ = base(base_name, scan)
  adapter = random_adapter(base_name, scan, **settings)
  save_peft(tmp_path / "new", *adapter, model.stored, model.params)
  peer = peft.PeftModel.from_pretrained(base_model(base_name), tmp_path / "new").eval()
  got = peers_logits(peer, tokens_of(base_name))
  assert relative_difference(got, logits(base_name, adapter, scan)) < 1e-5
