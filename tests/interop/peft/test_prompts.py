"""Prompt tuning of PEFT: the logits of its files, the same files written from here, and errors.

`tests/golden/prefix` is PEFT's: `make_prefix_golden.py`.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.interop import load_peft_prompt, save_peft_prompt
from lora_jax.models.zoo import load_causal_lm

from tests.make_peft_golden import MODELS, base_model, tokens_of
from tests.make_peft_golden import logits as peers_logits
from tests.make_prefix_golden import GOLDEN, NUM_SLOTS, PROMPT
from tests.toy_models import relative_difference

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LONG = pytest.mark.long
NAMES = ("gpt2", pytest.param("llama", marks=LONG), pytest.param("gemma", marks=LONG))


@functools.cache
def base(name):
  return load_causal_lm(MODELS / PROMPT[name])


def logits(name, trainable, num_slots=NUM_SLOTS):
  """Returns the logits of a small model after slots, those at the slots included."""
  model, slots = base(name), lj.Slots(num_slots)
  tokens = np.stack([slots.around(row) for row in tokens_of(PROMPT[name])]).astype(np.int32)
  apply = lj.prefix_embedding(model.call, num_slots).apply
  return jax.jit(apply)(model.params, trainable, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_pefts(name):
  trainable = load_peft_prompt(GOLDEN / name, base(name).stored, base(name).params)
  expected = load_file(GOLDEN / f"{name}.safetensors")["logits"]
  assert relative_difference(logits(name, trainable), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_the_same_file_is_written(name, tmp_path):
  model, folder = base(name), tmp_path / "new"
  trainable = load_peft_prompt(GOLDEN / name, model.stored, model.params)
  save_peft_prompt(folder, trainable, model.stored, model.params)
  arrays, theirs = (load_file(of / FILE) for of in (folder, GOLDEN / name))
  np.testing.assert_allclose(arrays["prompt_embeddings"], theirs["prompt_embeddings"], rtol=1e-6)
  fields, their_fields = (json.loads((of / CONFIG).read_text()) for of in (folder, GOLDEN / name))
  del fields["base_model_name_or_path"]
  assert fields.items() <= their_fields.items()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_peft_itself_agrees(name, tmp_path):
  peft = pytest.importorskip("peft", reason="peft is not installed")
  model, num_slots = base(name), 5
  slots = np.array([lj.Slots(num_slots).around([1])], np.int32)
  method = lj.prefix_embedding(model.call, num_slots, std=0.5)
  trainable = method.init(jax.random.key(1), model.params, slots)
  save_peft_prompt(tmp_path / "new", trainable, model.stored, model.params)
  peer = peft.PeftModel.from_pretrained(base_model(PROMPT[name]), tmp_path / "new").eval()
  got = peers_logits(peer, tokens_of(PROMPT[name]))
  assert relative_difference(got, logits(name, trainable, num_slots)) < 1e-5
