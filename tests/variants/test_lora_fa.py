"""LoRA-FA: its gradients, what the backward pass keeps, and PEFT's optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import lora_jax as lj

from tests import make_optimizers_golden as golden
from tests.tiny_training import model
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=golden.RANK, alpha=golden.ALPHA, target=".*", variant=lj.LORA_FA)


def mlp(params, x):
  return jax.nn.gelu(x @ params["up"]) @ params["down"]


def example():
  draw = np.random.default_rng(0).standard_normal
  params = {
    name: jnp.asarray(draw(golden.SHAPES[name]), jnp.float32) / 3 for name in ("up", "down")
  }
  return params, jnp.asarray(draw((11, 6)), jnp.float32)


def parts(trainable):
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  return lj.partition(trainable, mask)


def test_only_b_is_trained_and_its_gradient_is_the_merged_weights():
  params, x = example()
  lora_fa = lj.lora_fa(mlp, dataclasses.replace(CONFIG, variant=None))
  trainable = randomized(lora_fa.init(KEY, params, x))
  part, frozen = parts(trainable)
  counts = {name: golden.RANK * outputs for name, (_, outputs) in golden.SHAPES.items()}
  assert {n: part[n].lora_b.size for n in params} == {n: counts[n] for n in params}
  assert all(part[name].lora_a is None for name in params)

  def factored(part):
    return jnp.sum(lora_fa.apply(params, lj.combine(part, frozen), x) ** 2)

  def merged(part):
    weights = {
      name: w + golden.ALPHA / golden.RANK * frozen[name].lora_a @ part[name].lora_b
      for name, w in params.items()
    }
    return jnp.sum(mlp(weights, x) ** 2)

  assert relative_difference(*(jax.jit(jax.grad(f))(part) for f in (factored, merged))) < 1e-5
  plain, low_rank = lj.to_lora(CONFIG, trainable, params)
  assert plain.variant is None
  np.testing.assert_array_equal(low_rank["up"].lora_b, trainable["up"].lora_b)


def residuals(loss, trainable):
  """Returns the shapes of the arrays that the backward pass of the trained part keeps."""
  part, frozen = parts(trainable)

  def kept(part, frozen):
    return jax.tree.leaves(jax.vjp(lambda part: loss(lj.combine(part, frozen)), part)[1])

  return [array.shape for array in jax.eval_shape(kept, part, frozen)]


def without(shapes, others):
  """Returns the shapes that are left of a list after removing those of another."""
  left = list(shapes)
  for shape in others:
    if shape in left:
      left.remove(shape)
  return left


@pytest.mark.parametrize(
  ("target", "saved"),
  [
    ("up", []),  # its input is an argument, which exists anyway
    ("down", [(11, 9)]),
  ],
)
def test_the_input_of_a_layer_is_not_kept(target, saved):
  params, x = example()
  config = dataclasses.replace(CONFIG, target=target)
  kept = {}
  for variant in (lj.LORA, lj.LORA_FA):
    adapted = lj.lora(mlp, dataclasses.replace(config, variant=variant))
    trainable = adapted.init(KEY, params, x)
    kept[variant.name] = residuals(
      lambda t, adapted=adapted: adapted.apply(params, t, x), trainable
    )
  inner = (11, golden.RANK)  # x A
  assert inner in kept["LoRA-FA"]
  assert without(kept["LoRA"], kept["LoRA-FA"]).count((11, 9)) == len(saved)
  if saved:
    assert (11, 9) not in kept["LoRA-FA"]


def test_a_gpt2_block_keeps_nothing_as_wide_as_an_input():
  """LoRA keeps the inputs of query, key and value (one array), out, up and down besides."""
  module, params = model(num_layers=2)
  batch = jnp.ones((3, 16), jnp.int32)

  def kept(variant, layers):
    config = lj.LoraConfig(2, 2.0, rf"{layers}/(attn|mlp)/.*/kernel", variant=variant)
    adapted = lj.lora(lambda p, t: module.apply({"params": p}, t), config)
    trainable = adapted.init(KEY, params, batch)
    shapes = residuals(lambda t: adapted.apply(params, t, batch), trainable)
    return [shape for shape in shapes if shape[:1] == (48,) or shape[:2] == (3, 16)]

  below = kept(lj.LORA_FA, "h_0")  # the backward pass of block 1 as the base model has it
  whole = {variant: kept(variant, "h_.") for variant in (lj.LORA, lj.LORA_FA)}
  assert {shape[-1] for shape in without(whole[lj.LORA_FA], below)} == {2}
  inputs = [(48, 32)] * 5 + [(48, 128)]
  assert sorted(without(whole[lj.LORA], whole[lj.LORA_FA])) == sorted(2 * inputs)


def test_the_compiled_gradient_needs_less_memory():
  rows, width, depth = 512, 32, 4

  def fn(params, x):
    for i in range(depth):
      x = x @ params[f"w_{i}"]
    return jnp.sum(x**2)

  params = {f"w_{i}": jnp.ones((width, width)) for i in range(depth)}
  x, peak = jnp.ones((rows, width)), {}
  for variant in (lj.LORA, lj.LORA_FA):
    adapted = lj.lora(fn, lj.LoraConfig(2, 2.0, "w_.", variant=variant))
    part, frozen = parts(adapted.init(KEY, params, x))

    def loss(part, params, frozen, x, adapted=adapted):
      return adapted.apply(params, lj.combine(part, frozen), x)

    compiled = jax.jit(jax.grad(loss)).lower(part, params, frozen, x).compile()
    sizes = compiled.memory_analysis()
    peak[variant.name] = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes
  activation = rows * width * x.dtype.itemsize
  # The first layer's input is an argument, and the layer at work has one in both.
  assert peak["LoRA"] - peak["LoRA-FA"] >= (depth - 2) * activation


def test_the_optimizer_is_pefts():
  arrays = load_file(golden.GOLDEN / "lora_fa.safetensors")
  params = {name: jnp.zeros(shape) for name, shape in golden.SHAPES.items()}

  def fn(params, x):
    return sum(jnp.sum(x[:, : len(w)] @ w) for w in params.values())

  adapted = lj.lora(fn, CONFIG)
  trainable = adapted.init(KEY, params, jnp.ones((1, 9)))
  trainable = {
    name: node.replace(lora_a=arrays[f"0/{name}/lora_A"].T, lora_b=arrays[f"0/{name}/lora_B"].T)
    for name, node in trainable.items()
  }
  inner = optax.adam(golden.LEARNING_RATE, eps=1e-12)
  optimizer = lj.lora_fa_optimizer(inner, CONFIG, trainable, params)
  tree = {"base": None, "adapter": trainable}
  optimizer = lj.freeze(optimizer, lj.trainable_mask(tree))
  part, frozen = lj.partition(tree, lj.trainable_mask(tree))
  state = optimizer.init(part)
  step = jax.jit(optimizer.update)
  for i in range(1, golden.LORA_FA_STEPS + 1):
    grads = {
      name: node.replace(lora_b=arrays[f"{i}/{name}/lora_B/gradient"].T)
      for name, node in part["adapter"].items()
    }
    updates, state = step({"base": None, "adapter": grads}, state, part)
    part = optax.apply_updates(part, updates)
    for name, node in lj.combine(part, frozen)["adapter"].items():
      np.testing.assert_allclose(node.lora_b.T, arrays[f"{i}/{name}/lora_B"], rtol=1e-4, atol=1e-5)
      np.testing.assert_array_equal(node.lora_a.T, arrays[f"0/{name}/lora_A"])


def test_the_step_is_the_nearest_to_the_weights_gradient():
  """Of a stack of layers, for each: with SGD, the change of W is a projection of its gradient."""
  draw = np.random.default_rng(0).standard_normal
  params = {"w": jnp.asarray(draw((3, 6, 5)), jnp.float32)}
  fn = lambda p, x: jnp.einsum("lbi,lio->lbo", x, p["w"])  # noqa: E731
  x = jnp.asarray(draw((3, 4, 6)), jnp.float32)
  config = dataclasses.replace(CONFIG, rank=2, target="w")
  adapted = lj.lora(fn, config)
  trainable = adapted.init(KEY, params, x)
  part, frozen = parts(trainable)
  gradient = jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(params)["w"]
  grads = jax.grad(lambda b: jnp.sum(adapted.apply(params, lj.combine(b, frozen), x) ** 2))(part)
  optimizer = lj.lora_fa_optimizer(optax.sgd(1.0), config, trainable, params)
  updates, _ = optimizer.update(grads, optimizer.init(part), part)
  a, b = trainable["w"].lora_a, updates["w"].lora_b
  projected = a @ np.linalg.pinv(a) @ gradient
  scaling = golden.ALPHA / 2
  np.testing.assert_allclose(scaling * a @ b, -projected, rtol=1e-3, atol=1e-4)


def test_other_leaves_keep_their_gradients_and_other_adapters_are_refused():
  params, x = example()
  config = dataclasses.replace(CONFIG, target="up", extra="down")
  trainable = lj.lora(mlp, config).init(KEY, params, x)
  optimizer = lj.lora_fa_optimizer(optax.sgd(1.0), config, trainable, params)
  part, _ = parts(trainable)
  updates, _ = optimizer.update(part, optimizer.init(part), part)
  np.testing.assert_array_equal(updates["down"], -params["down"])
  plain = dataclasses.replace(CONFIG, variant=None)
  trainable = lj.lora(mlp, plain).init(KEY, params, x)
  with pytest.raises(ValueError, match="an adapter without a weight of LoRA-FA"):
    lj.lora_fa_optimizer(optax.sgd(1.0), plain, trainable, params)
