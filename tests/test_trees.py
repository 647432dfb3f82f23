"""Partitions, masks and labels of trees; an optimizer with state for the trainable leaves only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lj

from tests.toy_models import make_params, randomized, relative_difference, tokens, unrolled

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(
  rank=4, alpha=8.0, target=r"h_\d/attn/(query|value)/kernel", extra=r"h_2/mlp/up/bias"
)
LORA = lj.lora(unrolled, CONFIG)
IDS = tokens()


def combined_tree():
  params = make_params()
  return {"base": params, "adapter": LORA.init(KEY, params, IDS)}


def loss_of(tree, ids):
  logits = LORA.apply(tree["base"], tree["adapter"], ids)
  return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def loss_by_parts(trainable, frozen, ids):
  return loss_of(lj.combine(trainable, frozen), ids)


def test_combine_is_the_inverse_of_partition():
  tree = combined_tree()
  mask = lj.trainable_mask(tree)
  trainable, frozen = lj.partition(tree, mask)
  assert not jax.tree.leaves(trainable["base"])
  assert not jax.tree.leaves(frozen["adapter"])
  assert jax.tree.structure(trainable["adapter"]) == jax.tree.structure(tree["adapter"])
  joined = lj.combine(trainable, frozen)
  assert jax.tree.structure(joined) == jax.tree.structure(tree)
  assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True))
  assert jax.tree.structure(lj.combine(frozen, trainable)) == jax.tree.structure(tree)


def test_a_mask_has_extras_of_the_base_by_pattern():
  tree = combined_tree()
  mask = lj.trainable_mask(tree, extra=r"base/embed/.*")
  assert mask["base"]["embed"]["embedding"] is True
  assert mask["base"]["h_0"]["attn"]["query"]["kernel"] is False
  assert all(jax.tree.leaves(mask["adapter"]))


def test_wrong_trees_masks_and_labels_are_refused():
  tree = combined_tree()
  with pytest.raises(ValueError, match=r"expected a combined tree .*got \['embed', 'h_0'"):
    lj.trainable_mask(tree["base"])
  with pytest.raises(ValueError, match=r"extra 'base/embd' matches none.*base/embed/embedding"):
    lj.trainable_mask(tree, extra="base/embd")
  with pytest.raises(
    ValueError, match="'adapter/h_0/attn/query/kernel/lora_a' is in 2 of the parts"
  ):
    lj.combine(tree, tree)
  with pytest.raises(ValueError, match="paths in one of them only: base/embed/embedding"):
    lj.partition(tree, {"base": {}, "adapter": jax.tree.map(lambda _: True, tree["adapter"])})
  with pytest.raises(ValueError, match="no True leaf"):
    lj.freeze(optax.sgd(1.0), jax.tree.map(lambda _: False, tree))
  mask = lj.trainable_mask(tree)
  with pytest.raises(ValueError, match="expected a tree with the structure of the mask"):
    lj.freeze(optax.sgd(1.0), mask).init({"base": 1})
  with pytest.raises(ValueError, match="no label pattern matches 'base/embed/embedding'"):
    lj.label(tree, {"adapter/.*": "a"})


def test_freeze_takes_whatever_has_init_and_update():
  optimizer = lj.freeze(optax.MultiSteps(optax.sgd(1.0), 2), {"a": True, "b": False})
  params = {"a": jnp.ones(3), "b": jnp.ones(3)}
  _, state = optimizer.update(params, optimizer.init(params), params)
  updates, _ = optimizer.update(params, state, params)
  assert jax.tree.map(float, jax.tree.map(jnp.sum, updates)) == {"a": -3.0, "b": 0.0}


def state_shapes(state):
  return sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)


def test_optimizer_state_has_the_trainable_leaves_only():
  tree = combined_tree()
  optimizer = optax.adamw(1e-2)
  combined = lj.freeze(optimizer, lj.trainable_mask(tree))
  adapter = jax.tree.leaves(tree["adapter"])
  assert len(adapter) == 2 * 3 * 2 + 1  # A and B of two weights in three layers, and a bias
  expected = sorted(2 * [leaf.shape for leaf in adapter])  # mu and nu
  trainable, _ = lj.partition(tree, lj.trainable_mask(tree))
  for state in (combined.init(tree), combined.init(trainable), optimizer.init(tree["adapter"])):
    assert state_shapes(state) == expected


def step_function(optimizer):
  @jax.jit
  def step(trainable, frozen, state, ids):
    grads = jax.grad(loss_by_parts)(trainable, frozen, ids)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  return step


def test_ten_steps_change_no_frozen_leaf_and_equal_those_of_the_adapter_tree():
  tree = combined_tree()
  mask = lj.trainable_mask(tree)
  before = jax.tree.map(np.asarray, tree["base"])
  inner = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1))
  optimizer = lj.freeze(inner, mask)
  trainable, frozen = lj.partition(tree, mask)
  state, step = optimizer.init(trainable), step_function(optimizer)
  separate, separate_state = tree["adapter"], inner.init(tree["adapter"])
  first = float(loss_of(tree, IDS))

  @jax.jit
  def separate_step(adapter, state, base):
    grads = jax.grad(lambda a: loss_of({"base": base, "adapter": a}, IDS))(adapter)
    updates, state = inner.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state

  for _ in range(10):
    trainable, state = step(trainable, frozen, state, IDS)
    separate, separate_state = separate_step(separate, separate_state, tree["base"])
  after = lj.combine(trainable, frozen)
  assert float(loss_of(after, IDS)) < first - 0.1
  jax.tree.map(np.testing.assert_array_equal, before, after["base"])
  # clipping and decay saw A, B and the bias only
  assert relative_difference(after["adapter"], separate) < 1e-4


def test_gradients_of_frozen_leaves_are_ignored():
  tree = {"base": {"w": jnp.ones(3)}, "adapter": {"a": jnp.ones(2)}}
  mask = lj.trainable_mask(tree)
  optimizer = lj.freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), mask)
  state = optimizer.init(tree)
  grad = jnp.array([0.3, 0.4])
  for base in (None, jnp.full(3, 5.0), jnp.full(3, jnp.nan)):
    grads = {"base": {"w": base}, "adapter": {"a": grad}}
    updates, _ = optimizer.update(grads, state, tree)
    np.testing.assert_allclose(updates["adapter"]["a"], -grad)
    if base is None:
      assert updates["base"]["w"] is None
    else:
      np.testing.assert_array_equal(updates["base"]["w"], jnp.zeros(3))


def test_lora_plus_learning_rates_and_decay_by_pattern():
  tree = combined_tree()
  mask = lj.trainable_mask(tree)
  groups = {
    "fast": optax.sgd(1.6),
    "slow": optax.chain(
      optax.add_decayed_weights(1.0, mask=lambda t: lj.match(t, r".*/lora_a")), optax.sgd(0.1)
    ),
  }
  labels = lambda t: lj.label(t, {r".*/lora_b": "fast", r".*": "slow"})  # noqa: E731
  optimizer = lj.freeze(optax.partition(groups, labels), mask)
  trainable, _ = lj.partition(tree, mask)
  grads = jax.tree.map(jnp.ones_like, trainable)
  updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
  weight = updates["adapter"]["h_0"]["attn"]["query"]["kernel"]
  old = tree["adapter"]["h_0"]["attn"]["query"]["kernel"]
  np.testing.assert_allclose(weight.lora_b, -1.6 * jnp.ones_like(weight.lora_b), rtol=1e-6)
  np.testing.assert_allclose(weight.lora_a, -0.1 * (1 + old.lora_a), rtol=1e-5)
  bias = updates["adapter"]["h_2"]["mlp"]["up"]["bias"]
  np.testing.assert_allclose(bias, -0.1 * jnp.ones_like(bias), rtol=1e-6)


@pytest.mark.parametrize(
  "make",
  [
    lambda: optax.contrib.muon(1e-2),
    lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=optax.constant_schedule(1e-2)),
    lambda: optax.partition(
      {"a": optax.adam(1e-2), "b": optax.sgd(1e-1, momentum=0.9)},
      lambda tree: lj.label(tree, {r".*/lora_b": "b", r".*": "a"}),
    ),
  ],
  ids=["muon", "MultiSteps", "inject_hyperparams", "partition"],
)
def test_optimizers_of_other_structure_are_frozen_and_sharded_too(make):
  fn = lambda p, x: jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]  # noqa: E731
  params = {"up": jnp.ones((16, 8)) / 8, "bias": jnp.zeros(8), "down": jnp.ones((8, 16)) / 8}
  lora = lj.lora(fn, lj.LoraConfig(rank=4, alpha=8.0, target="up|down", extra="bias"))
  x = jnp.linspace(-1, 1, 32).reshape(2, 16)
  tree = {"base": params, "adapter": lora.init(KEY, params, x)}
  mask = lj.trainable_mask(tree)
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = {"up": P("fsdp", None), "bias": P(), "down": P()}
  places = {"base": {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}}
  places["adapter"] = lj.shardings(tree["adapter"], places["base"])
  optimizer = lj.freeze(make(), mask, places)
  part, frozen = lj.partition(tree, mask)
  state = jax.jit(optimizer.init)(part)

  @jax.jit
  def step(part, state):
    whole = lambda part: lj.combine(part, frozen)  # noqa: E731
    loss = lambda t: jnp.mean((lora.apply(t["base"], t["adapter"], x) - 1) ** 2)  # noqa: E731
    grads = jax.grad(lambda part: loss(whole(part)))(part)
    updates, state = optimizer.update(grads, state, part)
    return optax.apply_updates(part, updates), state

  updated, state = step(part, state)
  updated, state = step(updated, state)
  node = updated["adapter"]["up"]
  assert node.lora_a.sharding.spec[0] == "fsdp"
  shape = node.lora_a.shape
  placed = [x for x in jax.tree.leaves(state) if x.shape == shape and "fsdp" in x.sharding.spec]
  assert placed
  assert relative_difference(updated["adapter"], tree["adapter"]) > 0


def test_trees_of_lists_and_numbers_in_paths():
  def fn(params, x):
    for layer in params["layers"]:
      x = jnp.tanh(x @ layer["w"])
    return x

  params = {"layers": [{"w": jnp.eye(6)}, {"w": jnp.eye(6)}]}
  config = lj.LoraConfig(rank=2, alpha=2.0, target="layers/1/w")
  lora = lj.lora(fn, config)
  trainable = randomized(lora.init(KEY, params, jnp.ones((2, 6))))
  assert list(trainable["layers"]) == ["1"]
  merged = lora.merge(params, trainable)
  got = lora.apply(params, trainable, jnp.ones((2, 6)))
  assert relative_difference(got, fn(merged, jnp.ones((2, 6)))) < 1e-5
