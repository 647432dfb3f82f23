"""lora_jax's rules of training agree with the vectors."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax as lj
from conformance.check import disagreements
from lora_jax.axes import LoraAxes

from tests.conformance.vectors import cases, vector

AXES = LoraAxes((), (0,), (1,))


def pair(tensors, case):
  a, b = (jnp.asarray(tensors[f"{case}/{name}"], jnp.float32) for name in ("lora_a", "lora_b"))
  return {"w": lj.LoraWeight(a, b, AXES)}


@pytest.mark.parametrize("case", ["sgd", "adamw"])
def test_lora_plus(case):
  tensors, settings = vector("lora_plus")[0], cases("lora_plus")[case]

  def make(rate):
    if case == "sgd":
      return optax.sgd(rate)
    return optax.adamw(rate, eps=settings["epsilon"], weight_decay=settings["weight_decay"])

  optimizer = lj.lora_plus(make, settings["learning_rate"], settings["ratio"])
  trainable = pair(tensors, case)
  state = optimizer.init(trainable)
  for step in range(settings["steps"]):
    gradients = [
      jnp.asarray(tensors[f"{case}/gradients/{name}"][step], jnp.float32)
      for name in ("lora_a", "lora_b")
    ]
    updates, state = optimizer.update({"w": lj.LoraWeight(*gradients, AXES)}, state, trainable)
    trainable = optax.apply_updates(trainable, updates)
  results = {f"{case}/out/{name}": trainable["w"].arrays[name] for name in ("lora_a", "lora_b")}
  assert disagreements(tensors, results) == []


@pytest.mark.parametrize("case", ["matmul", "stack"])
def test_relora_trains_on_the_merged_weight(case):
  """The round before, merged by the library, gives the weight of the next one."""
  tensors, details = vector("relora")[0], cases("relora")[case]

  def fn(params, x):
    return x @ params["w"]

  config = lj.LoraConfig(details["rank"], details["alpha"], "w")
  before = {"w": jnp.asarray(tensors[f"{case}/before/w"], jnp.float32)}
  adaptation = lj.lora(fn, config)
  x = jnp.asarray(tensors[f"{case}/x"], jnp.float32)
  node = adaptation.init(jax.random.key(0), before, x)["w"]
  arrays = [
    jnp.asarray(tensors[f"{case}/before/p/{name}"], jnp.float32) for name in ("lora_a", "lora_b")
  ]
  merged = adaptation.merge(before, {"w": node.replace(lora_a=arrays[0], lora_b=arrays[1])})
  assert disagreements(tensors, {f"{case}/w": merged["w"]}) == []
