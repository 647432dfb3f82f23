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
  assert disagreements(tensors, results, only=f"{case}/") == []


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
  assert disagreements(tensors, {f"{case}/w": merged["w"]}, only=f"{case}/w") == []

  both = lj.lora(fn, lj.relora_config(config, num_cycles=2))  # merges nothing: two blocks
  second = [jnp.asarray(tensors[f"{case}/p/{name}"], jnp.float32) for name in ("lora_a", "lora_b")]
  a, b = (jnp.concatenate([arrays[i], second[i]], axis=axis) for i, axis in ((0, -1), (1, -2)))
  out = both.apply(before, {"w": lj.LoraWeight(a, b, node.axes)}, x)
  assert disagreements(tensors, {f"{case}/out": out}, only=f"{case}/out") == []


def test_lora_fas_optimizer():
  tensors, settings = vector("lora_fa")[0], cases("lora_fa")["steps"]
  trainable, scaling = pair(tensors, "steps"), float(tensors["steps/scaling"])
  a, b = (trainable["w"].arrays[name] for name in ("lora_a", "lora_b"))
  config = lj.LoraConfig(a.shape[1], scaling * a.shape[1], "w", variant=lj.LORA_FA)
  node = lj.LoraWeight.from_arrays({"lora_a": a, "lora_b": b}, lj.LORA_FA.table, AXES, None)
  params = {"w": jnp.zeros((a.shape[0], b.shape[1]))}
  inner = optax.adamw(settings["learning_rate"], eps=settings["epsilon"], weight_decay=0.0)
  preconditioned = lj.lora_fa_optimizer(optax.identity(), config, {"w": node}, params)
  optimizer = lj.lora_fa_optimizer(inner, config, {"w": node}, params)

  def step(optimizer, tree, state, gradient):
    gradient = {"w": node.replace(lora_a=jnp.zeros_like(a), lora_b=gradient)}
    return optimizer.update(gradient, state, tree)

  tree = {"w": node}
  state, ready = optimizer.init(tree), []
  for gradient in jnp.asarray(tensors["steps/gradients"], jnp.float32):
    ready.append(step(preconditioned, tree, preconditioned.init(tree), gradient)[0]["w"].lora_b)
    updates, state = step(optimizer, tree, state, gradient)
    tree = optax.apply_updates(tree, updates)
  results = {"out/preconditioned": jnp.stack(ready), "out/lora_b": tree["w"].lora_b}
  results = {f"steps/{name}": array for name, array in results.items()}
  assert disagreements(tensors, results, only="steps/") == []


def adalora_nodes(tensors, prefix, step=None):
  """Returns the nodes of two weights from arrays, or from the arrays of a step."""
  nodes = {}
  for weight in ("first", "second"):
    arrays = {}
    for name in ("lora_a", "lora_e", "lora_b"):
      array = tensors[f"allocation/{weight}/{prefix}/{name}"]
      arrays[name] = jnp.asarray(array if step is None else array[step], jnp.float32)
    nodes[weight] = lj.LoraWeight.from_arrays(arrays, lj.ADALORA.table, AXES, None)
  return nodes


def test_adaloras_importance_and_allocation():
  """The inner optimizer moves the arrays to the vector's values; the fifth step allocates."""
  tensors, settings = vector("adalora")[0], cases("adalora")["allocation"]
  steps = [adalora_nodes(tensors, "values", step) for step in range(4)]

  def moves(grads, state, params):
    del grads
    target = jax.tree.map(lambda *x: jnp.stack(x)[jnp.minimum(state, 3)], *steps)
    return jax.tree.map(jnp.subtract, target, params), state + 1

  budget = lj.AdaLoraBudget(
    target_rank=2,
    num_train_steps=5,
    interval=5,
    beta1=settings["beta1"],
    beta2=settings["beta2"],
    orthogonality=0.0,
  )
  optimizer = lj.adalora_optimizer(
    optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), moves), budget
  )
  tree = jax.tree.map(jnp.zeros_like, steps[0])
  state = optimizer.init(tree)
  for step in (0, 1, 2, 3, 3):
    updates, state = optimizer.update(adalora_nodes(tensors, "gradients", step), state, tree)
    tree = optax.apply_updates(tree, updates)
  results = {}
  for weight in ("first", "second"):
    for name in ("sensitivity", "uncertainty"):
      for array, value in getattr(state, name)[weight].arrays.items():
        results[f"allocation/out/{weight}/{name}/{array}"] = value
    results[f"allocation/out/{weight}/kept"] = tree[weight].lora_e != 0
  assert disagreements(tensors, results, only=tuple(results)) == []  # it has no importance


def test_adaloras_budget_and_penalty():
  tensors, settings = vector("adalora")[0], cases("adalora")["allocation"]
  total, warmup, final = (settings[name] for name in ("total", "warmup", "final"))
  budget = lj.AdaLoraBudget(
    target_rank=1, num_train_steps=total, initial_steps=warmup, final_steps=final, orthogonality=1.0
  )
  curve = range(warmup, total - final + 1)
  got = [int(budget.at(jnp.int32(s), settings["first"], settings["last"])) for s in curve]
  assert got == tensors["allocation/out/budget"][curve.start : curve.stop].tolist()

  optimizer = lj.adalora_optimizer(optax.identity(), budget)
  a, b = (jnp.asarray(tensors[f"penalty/{n}"], jnp.float32) for n in ("lora_a", "lora_b"))
  arrays = {"lora_a": a, "lora_e": jnp.ones(a.shape[1]), "lora_b": b}
  tree = {"w": lj.LoraWeight.from_arrays(arrays, lj.ADALORA.table, AXES, None)}
  zeros = jax.tree.map(jnp.zeros_like, tree)
  updates, _ = optimizer.update(zeros, optimizer.init(tree), tree)
  names = {f"penalty/grad/mean_norm/{name}": name for name in ("lora_a", "lora_b")}
  results = {name: updates["w"].arrays[array] for name, array in names.items()}
  assert disagreements(tensors, results, only="penalty/grad/mean_norm/") == []
