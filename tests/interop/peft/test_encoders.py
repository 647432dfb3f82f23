"""Adapters of encoders with a head, from and to PEFT, have the same logits, names and shapes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.interop import load_peft, save_peft
from lora_jax.models.bert import folder as bert_folder
from lora_jax.models.bert.model import Bert
from lora_jax.models.deberta import folder as deberta_folder
from lora_jax.models.deberta.model import Deberta, DebertaConfig

from tests import make_peft_golden as golden
from tests.toy_models import randomized, relative_difference

BASES = {
  "bert": "bert/bert_classifier",
  "roberta": "bert/roberta_regression",
  "deberta": "deberta/v2_regression",
}
QUERY_VALUE = r".*/attn/(query|value)/kernel"


@functools.cache
def base(name, scan_layers=False):
  deberta = name.startswith("deberta")
  load = deberta_folder.load_deberta if deberta else bert_folder.load_bert
  config, params = load(golden.MODELS / name, scan_layers=scan_layers)
  family = deberta_folder if deberta else bert_folder
  return config, params, family.stored_tensors(config)


@functools.cache
def model(config):
  module = Deberta(config) if isinstance(config, DebertaConfig) else Bert(config)
  return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))


def inputs_of(name):
  return [jnp.asarray(array) for array in golden.inputs_of(name)]


def logits(name, adapter, scan_layers=False):
  """Returns the logits of an adapted model, branch by branch and merged."""
  config, params, _ = base(name, scan_layers)
  adapted, inputs = lj.lora(model(config), adapter[0]), inputs_of(name)
  merged = model(config)(adapted.merge(params, adapter[1]), *inputs)
  return jax.jit(adapted.apply)(params, adapter[1], *inputs), merged


def expected(name):
  return load_file(golden.GOLDEN / f"{name}.safetensors")["logits"]


@pytest.mark.parametrize(
  ("name", "scan_layers"), [*((name, False) for name in golden.ENCODERS), ("bert", True)]
)
def test_logits_and_files_are_pefts(name, scan_layers, tmp_path):
  base_name, _ = golden.ENCODERS[name]
  config, params, tensors = base(base_name, scan_layers)
  adapter = load_peft(golden.GOLDEN / name, tensors, params)
  plain = model(config)(params, *inputs_of(base_name))
  assert relative_difference(plain, expected(name)) > 0.05, "the adapter changes next to nothing"
  for got in logits(base_name, adapter, scan_layers):
    assert relative_difference(got, expected(name)) < 1e-5
  save_peft(tmp_path / "new", *adapter, tensors, params)
  first, second = (
    load_file(folder / "adapter_model.safetensors")
    for folder in (golden.GOLDEN / name, tmp_path / "new")
  )
  copies = ("original_module.bias", "modules_to_save.bias")  # unread, or read twice
  first = {key: array for key, array in first.items() if not key.endswith(copies)}
  assert first.keys() == second.keys()
  for key, array in first.items():
    np.testing.assert_array_equal(second[key], array)
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
  assert written["bias"] == golden.ENCODERS[name][1].get("bias", "none")


CASES = {
  "with the head": ({"extra": "head/.*"}, "SEQ_CLS"),
  "with the pooler": ({"extra": "(pooler|head)/.*"}, "SEQ_CLS"),
  "without": ({}, None),
  "with a part of the head": ({"extra": "head/out/.*"}, None),  # RoBERTa's has two
  "with an embedding": ({"target": r"token_embedding/embedding|.*/mlp/up/kernel"}, None),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", BASES)
def test_peft_itself_agrees(kind, case, tmp_path):
  base_name, (settings, task) = BASES[kind], CASES[case]
  config, params, tensors = base(base_name)
  lora_config = lj.LoraConfig(**{"rank": 2, "alpha": 6.0, "target": QUERY_VALUE} | settings)
  adapted = lj.lora(model(config), lora_config)
  trainable = randomized(adapted.init(jax.random.key(0), params, *inputs_of(base_name)))
  save_peft(tmp_path / "new", lora_config, trainable, tensors, params)
  reference = logits(base_name, (lora_config, trainable))[0]
  back = load_peft(tmp_path / "new", tensors, params)
  assert relative_difference(logits(base_name, back)[0], reference) < 1e-5
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  whole = task or (kind != "roberta" and "part" in case and "SEQ_CLS") or None
  assert written["task_type"] == whole
  peft = pytest.importorskip("peft", reason="peft is not installed")
  peer = peft.PeftModel.from_pretrained(golden.base_model(base_name), tmp_path / "new").eval()
  assert relative_difference(golden.logits(peer, *golden.inputs_of(base_name)), reference) < 1e-5


def test_a_module_that_transformers_never_calls_is_refused(tmp_path):
  """PEFT's adapter of DeBERTa's relative positions changes nothing; ours would."""
  base_name = "deberta/one_term"
  config, params, tensors = base(base_name)
  lora_config = lj.LoraConfig(rank=2, alpha=4.0, target="relative_embedding/embedding")
  adapted = lj.lora(model(config), lora_config)
  trainable = adapted.init(jax.random.key(0), params, *inputs_of(base_name))
  with pytest.raises(ValueError, match=r"rel_embeddings but never calls the module"):
    save_peft(tmp_path / "new", lora_config, trainable, tensors, params)
