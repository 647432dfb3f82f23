"""RandLoRA, Uni-LoRA and TinyLoRA have the logits of PEFT's adapters (tests.make_shared_golden)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj

from tests.make_shared_golden import ADAPTERS, GOLDEN
from tests.toy_models import relative_difference
from tests.variants.test_products import MODULES, base


def rand_lora(arrays, shared):
  """PEFT pairs the columns of B in the order of (rank, bases), and stores them as (bases, rank)."""
  bases, rank = arrays["gamma"].shape[0], arrays["lambda"].shape[0]
  b = shared["B"][:, :bases].reshape(-1, rank, bases)
  a = shared["A"][:, 0, :32].T  # PEFT's is as long as the smaller of the longest sides
  node = {"rand_lambda": arrays["lambda"].T, "rand_gamma": arrays["gamma"]}
  return node, {"rand_a": a, "rand_b": b.transpose(2, 1, 0)}


def uni_lora(arrays, shared):
  theta = shared["theta_d"]
  inverse_root = np.zeros_like(theta)
  for side in "AB":
    inverse_root[arrays[f"indices_{side}"]] = arrays[f"scales_{side}"]
  node = {"index_a": arrays["indices_A"].T, "index_b": arrays["indices_B"].T}
  return node, {"theta": theta, "inverse_root": inverse_root}


def tiny_lora(arrays, shared):
  node = {"lora_a": arrays["A"].T, "lora_b": arrays["B"].T}
  return node | {"projection": arrays["P"].transpose(0, 2, 1)}, {"tiny_v": shared["v.0"]}


FAMILIES = {  # the variant, alpha, and the arrays of one weight from PEFT's
  "randlora": (lj.RAND_LORA, 2.0, rand_lora),
  "unilora": (lj.uni_lora_variant(40), 3.0, uni_lora),
  "tinylora": (lj.tiny_lora_variant(5), 3.0, tiny_lora),
}


@pytest.mark.parametrize(
  "name", [n if n == "randlora" else pytest.param(n, marks=pytest.mark.long) for n in FAMILIES]
)
def test_the_logits_are_pefts(name):
  variant, alpha, convert = FAMILIES[name]
  settings, golden = ADAPTERS[name][2], load_file(GOLDEN / f"{name}.safetensors")
  params, fn, tokens = base()
  modules = {
    ours: theirs
    for ours, theirs in MODULES.items()
    if theirs.split(".")[1] in settings["target_modules"]
  }
  target = rf".*/({'|'.join(modules)})/kernel"
  adapted = lj.lora(fn, lj.LoraConfig(settings["r"], alpha, target, variant=variant))
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), params, tokens)
  trainable = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  start = f"base_model.{name}_"
  shared = {n.removeprefix(start): x for n, x in golden.items() if n.startswith(start)}
  for layer in (0, 1):
    for module, theirs in modules.items():
      prefix = f"base_model.model.model.layers.{layer}.{theirs}.{name}_"
      arrays = {n.removeprefix(prefix): x for n, x in golden.items() if n.startswith(prefix)}
      node_arrays, shared_arrays = convert(arrays, shared)
      group = trainable[f"layers_{layer}"]["mlp" if module == "down" else "attn"][module]
      group["kernel"] = replaced(group["kernel"], node_arrays)
  trainable["lora_shared"][variant.name] = replaced(
    trainable["lora_shared"][variant.name], shared_arrays
  )
  logits = fn(adapted.merge(params, trainable), tokens)
  got, expected = (jax.tree.map(jnp.shape, tree) for tree in (trainable, shapes))
  assert got == expected
  assert relative_difference(logits, golden["logits"]) < 1e-5
  assert relative_difference(fn(params, tokens), golden["logits"]) > 1e-2


def replaced(node, arrays):
  return node.replace(**{n: jnp.asarray(each, jnp.float32) for n, each in arrays.items()})
