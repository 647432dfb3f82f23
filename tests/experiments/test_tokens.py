"""Trained tokens of a run: texts become ids, rows alone or beside LoRA, and what is refused."""

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import gpt2_e2e as e2e_configs
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.harness.methods import EMBEDDING, METHODS, adapt, check_used
from experiments.nlg.config import E2EConfig
from experiments.nlg.tokens import with_token_ids
from lora_jax.adapters.delta import adapter_weights
from lora_jax.trees import matches

from tests.experiments.harness.test_methods import MODELS


def config_of(method, tokens, **changes):
  fields = {"method": method, "lora.tokens": tokens, "lora.rank": 2, **changes}
  return read_config(E2EConfig, apply(e2e_configs.get_config(), fields))


def test_texts_are_the_ids_of_single_tokens():
  config = with_token_ids(config_of("lora", ("<|endoftext|>", " food", 5)))
  assert config.lora.tokens == (0, 3173, 5)
  assert with_token_ids(config) == config
  assert with_token_ids(config_of("pissa", ())).lora.tokens == ()


@pytest.mark.parametrize(
  ("method", "tokens", "changes", "message"),
  [
    ("lora", (" friendly",), {}, "' friendly', .* not a single token .* ' friend' . 'ly'. Give"),
    ("lora", ("",), {}, "'', which is not a single token of the tokenizer, but none"),
    ("lora", (" food", 3173), {}, "' food' and 3173, which are both token 3173"),
    ("lora", (3, 5, 3), {}, "lora.tokens has 3 and 3, which are both token 3; expected each once"),
    ("hira", (5,), {}, r"lora.tokens=\(5,\) has no effect with method=hira: .*: lora, dora, tra"),
    ("trainable_tokens", (), {}, "method=trainable_tokens trains the embeddings of lora.tokens, "),
    ("lora", (5,), {"lora.target": ".*embedding"}, "lora.target=.* has the embedding of"),
  ],
)
def test_what_cannot_be_trained_is_refused(method, tokens, changes, message):
  with pytest.raises(ValueError, match=message):
    with_token_ids(config_of(method, tokens, **changes))


def test_other_methods_have_no_tokens():
  message = r"lora.tokens=\(3,\) has no effect with method=pissa.*: lora, dora, trainable_tokens$"
  with pytest.raises(ValueError, match=message):
    check_used("pissa", {"lora.tokens": (3,)}, "gpt2_e2e")
  assert [name for name, row in METHODS.items() if row.needs_tokens] == ["trainable_tokens"]


@pytest.mark.parametrize(
  ("family", "method"), [("gpt2", "trainable_tokens"), ("gpt2", "dora"), ("llama", "lora")]
)
def test_the_rows_of_the_tokens_are_trained(family, method):
  module, target = MODELS[family]
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
  fields = {} if method == "trainable_tokens" else {"lora.target": target, "lora.dropout": 0.1}
  config = config_of(method, (3, 0), **fields)
  adapted = adapt(config)(lambda params, tokens: module.apply({"params": params}, tokens))
  trainable = jax.eval_shape(adapted.init, jax.random.key(0), params, tokens)
  nodes = adapter_weights(trainable)
  of_tokens = [path for path in nodes if matches(EMBEDDING, path)]
  assert len(of_tokens) == 1
  assert nodes[of_tokens[0]].token_delta.shape == (2, 8)
  assert (len(nodes) > 1) == (method != "trainable_tokens")
