"""HiRA, LoHa, LoKr and MiSS have the logits of PEFT's adapters (tests.make_products_golden)."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.models.zoo import load_causal_lm
from lora_jax.trees import leaves_with_path, replace_leaves

from tests.make_peft_golden import tokens_of
from tests.make_products_golden import ADAPTERS, BASE, GOLDEN, MODELS
from tests.toy_models import relative_difference

MODULES = {"query": "self_attn.q_proj", "value": "self_attn.v_proj", "down": "mlp.down_proj"}
TENSORS = {  # PEFT's matrices are (out, in), ours (in, out)
  "lora_a": "hira_A",
  "lora_b": "hira_B",
  **{"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"},
  **{"w1": "lokr_w1", "w1_a": "lokr_w1_b", "w1_b": "lokr_w1_a"},
  **{"w2": "lokr_w2", "w2_a": "lokr_w2_b", "w2_b": "lokr_w2_a"},
  "shard": "miss_block",
}
VARIANTS = {  # and alpha / rank
  "hira": (lj.HIRA, 1.0),
  "loha": (lj.LOHA, 2.0),
  "lokr": (lj.lokr_variant(4), 2.0),
  "lokr_whole": (lj.lokr_variant(decompose="none"), 1.0),
  "lokr_both": (lj.lokr_variant(decompose="both"), 2.0),
  "miss": (lj.MISS, 1.0),
  "miss_mini": (lj.miss_mini_variant(4), 1.0),
  "miss_bat": (lj.MISS_BAT, 1.0),
}


@functools.cache
def base():
  model = load_causal_lm(MODELS / BASE)
  fn = jax.jit(lambda params, tokens: model.module.apply({"params": params}, tokens))
  return model.params, fn, jnp.asarray(tokens_of(BASE))


def tensor(golden, path):
  """Returns PEFT's tensor of one of our arrays, in our order of axes."""
  layer, module, name = re.fullmatch(r"layers_(\d)/\w+/(\w+)/kernel/(\w+)", path).groups()
  array = golden[f"base_model.model.model.layers.{layer}.{MODULES[module]}.{TENSORS[name]}"]
  return jnp.asarray(array if name == "shard" else array.T)


@pytest.mark.long  # in CI tests/interop/peft/test_variants.py reads such adapters
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_logits_are_pefts(name):
  params, fn, tokens = base()
  (variant, scaling), rank = VARIANTS[name], ADAPTERS[name][1]["r"]
  config = lj.LoraConfig(rank, scaling * rank, r".*/(query|value|down)/kernel", variant=variant)
  adapted = lj.lora(fn, config)
  trainable = jax.eval_shape(adapted.init, jax.random.key(0), params, tokens)
  golden = load_file(GOLDEN / f"{name}.safetensors")
  arrays = {path: tensor(golden, path) for path, _ in leaves_with_path(trainable)}
  assert len(arrays) == len(golden) - 1  # and the logits
  logits = fn(adapted.merge(params, replace_leaves(trainable, arrays)), tokens)
  assert relative_difference(logits, golden["logits"]) < 1e-5
  assert relative_difference(fn(params, tokens), golden["logits"]) > 1e-2
