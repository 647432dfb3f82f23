"""The zoo loads any of its families by the folder's model_type, and refuses other models."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.bert import folder as bert_folder
from lora_jax.models.bert.model import Bert
from lora_jax.models.deberta import folder as deberta_folder
from lora_jax.models.deberta.model import Deberta
from lora_jax.models.gpt2 import folder as gpt2_folder
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.llama import config_json as llama_json
from lora_jax.models.llama.model import Llama
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.zoo import CAUSAL_LMS, load_causal_lm, plan_causal_lm
from lora_jax.trees import leaves_with_path

from tests import make_bert_golden, make_deberta_golden, make_gpt2_golden, make_llama_golden
from tests.toy_models import relative_difference

FOLDERS = {
  "gpt2": make_gpt2_golden.GOLDEN / "tied",
  "mistral": make_llama_golden.GOLDEN / "mistral",
  "gemma": make_llama_golden.GOLDEN / "gemma",
}


@pytest.mark.parametrize("model_type", FOLDERS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_folder_says_which_model_it_is(model_type, scan_layers, tmp_path):
  model = load_causal_lm(FOLDERS[model_type], scan_layers=scan_layers)
  assert (model.model_type, model.folder) == (model_type, FOLDERS[model_type])
  held = {path for tensor in model.stored for path in tensor.paths}
  assert held == {path for path, _ in leaves_with_path(model.params)}
  tokens = jnp.asarray([[3, 1, 4, 1, 5]])
  cache = model.init_cache(1, 5)
  mask = jnp.tril(jnp.ones((1, 5, 5), bool))

  @jax.jit
  def both(params):
    apply = functools.partial(model.module.apply, {"params": params})
    hidden, _ = apply(tokens, jnp.arange(5)[None], cache, 0, mask, method="extend")
    return apply(tokens), apply(hidden, method="logits")

  logits, cached = both(model.params)
  assert relative_difference(cached, logits) < 1e-5
  model.save(tmp_path / "new", model.params, end_of_text_id=0)
  reloaded = load_causal_lm(tmp_path / "new", scan_layers=scan_layers)
  assert reloaded.model_type == model_type
  assert reloaded.num_positions == model.num_positions
  jax.tree.map(np.testing.assert_array_equal, reloaded.params, model.params)


@pytest.mark.parametrize(
  ("module", "read_config", "folder", "scans"),
  [
    (GPT2, gpt2_folder.read_config, make_gpt2_golden.GOLDEN / "tied", (False, True)),
    (Llama, llama_json.read_config, make_llama_golden.GOLDEN / "mixtral", (False, True)),
    (Llama, llama_json.read_config, make_llama_golden.GOLDEN / "qwen2_mixed", (False,)),
    (Bert, bert_folder.read_config, make_bert_golden.GOLDEN / "bert_classifier", (False, True)),
    (Deberta, deberta_folder.read_config, make_deberta_golden.GOLDEN / "v2_regression", (False,)),
  ],
)
def test_shapes_by_one_layer_are_those_of_the_whole_model(module, read_config, folder, scans):
  tokens = jax.ShapeDtypeStruct((1, 1), "int32")
  for scan_layers in scans:
    model = module(read_config(folder, scan_layers=scan_layers, param_dtype="bfloat16"))
    whole = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert model.config.num_layers > 1
    assert shapes_of(model) == whole


def test_the_longest_sequence_that_is_decoded():
  gpt2, mistral = (load_causal_lm(FOLDERS[name]) for name in ("gpt2", "mistral"))
  assert gpt2.num_slots == gpt2.num_positions
  assert mistral.num_slots == 5 < mistral.num_positions


def test_an_encoder_is_sent_to_its_own_experiment():
  with pytest.raises(ValueError, match=r"roberta is an encoder.* python -m experiments\.glue"):
    load_causal_lm(make_bert_golden.GOLDEN / "roberta")


def test_a_loaded_model_prints_as_one_line():
  model = load_causal_lm(FOLDERS["gpt2"])
  text = f"LanguageModel(gpt2, 28,288 parameters, float32, {FOLDERS['gpt2']})"
  assert (repr(model), str(model)) == (text, text)
  plan = plan_causal_lm(FOLDERS["gpt2"], param_dtype="bfloat16")
  assert repr(plan) == text.replace("float32", "bfloat16")
  pair = bert_folder.load_bert(make_bert_golden.GOLDEN / "bert")
  assert str(pair) == "(BertConfig, 5,600 parameters, float32)"
  config, params = pair
  assert pair == (config, params)


def test_the_folder_of_a_run_is_not_a_model(tmp_path):
  """It has a config.json too, which is another one."""
  (tmp_path / "config.json").write_text('{"method": "lora"}')
  (tmp_path / "metrics.jsonl").touch()
  with pytest.raises(
    ValueError, match=rf"is the folder of a run: .*\.export {tmp_path} NEW --merg"
  ):
    plan_causal_lm(tmp_path)


def test_weights_come_in_the_dtype_asked_for():
  model = load_causal_lm(FOLDERS["gpt2"], param_dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("model_type", ["falcon", None, ["gpt2"]])
def test_a_model_that_the_zoo_lacks(model_type, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
  with pytest.raises(ValueError, match=r"lora_jax\.lora\(fn, config\)") as raised:
    load_causal_lm(tmp_path)
  assert f"no language model of type {model_type!r}" in str(raised.value)
  assert all(name in str(raised.value) for name in CAUSAL_LMS)
