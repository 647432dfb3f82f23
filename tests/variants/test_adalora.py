"""AdaLoRA: its equation, and PEFT's allocation of ranks on the same gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import lora_jax as lj

from tests import make_optimizers_golden as golden
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(golden.RANK, golden.ALPHA, ".*", variant=lj.ADALORA)
NAMES = {"lora_a": "lora_A", "lora_e": "lora_E", "lora_b": "lora_B"}
BUDGET = lj.AdaLoraBudget(
  target_rank=golden.ADALORA["target_r"],
  num_train_steps=golden.ADALORA["total_step"],
  initial_steps=golden.ADALORA["tinit"],
  final_steps=golden.ADALORA["tfinal"],
  interval=golden.ADALORA["deltaT"],
)


def fn(params, x):
  return jnp.concatenate([x[:, : len(w)] @ w for _, w in sorted(params.items())], axis=1)


def example():
  draw = np.random.default_rng(0).standard_normal
  params = {n: jnp.asarray(draw(shape), jnp.float32) for n, shape in golden.SHAPES.items()}
  return params, jnp.asarray(draw((3, 9)), jnp.float32)


def from_peft(node, arrays, step, name, end=""):
  """Returns a node with PEFT's arrays, each transposed."""
  loaded = {
    ours: arrays[f"{step}/{name}/{theirs}{end}"].T.reshape(node.arrays[ours].shape)
    for ours, theirs in NAMES.items()
  }
  return node.replace(**loaded)


def test_the_weight_is_the_papers_and_starts_as_the_base():
  params, x = example()
  adalora = lj.adalora(fn, dataclasses.replace(CONFIG, variant=None))
  initial = adalora.init(KEY, params, x)
  np.testing.assert_array_equal(jax.jit(adalora.apply)(params, initial, x), fn(params, x))
  trainable = randomized(initial)
  sizes = {n: 4 * (i + o + 1) for n, (i, o) in golden.SHAPES.items()}
  assert {n: sum(x.size for x in node.arrays.values()) for n, node in trainable.items()} == sizes

  def paper(trainable):
    weights = {
      n: w + golden.ALPHA / 4 * (p.lora_a @ jnp.diag(p.lora_e) @ p.lora_b)
      for (n, w), p in zip(params.items(), (trainable[n] for n in params), strict=True)
    }
    return jnp.sum(fn(weights, x) ** 2)

  def loss(trainable):
    return jnp.sum(adalora.apply(params, trainable, x) ** 2)

  assert relative_difference(*(jax.jit(jax.grad(f))(trainable) for f in (loss, paper))) < 1e-5


def trained_by_the_golden():
  """Yields step, state and trainable tree after each of the golden's steps, and its arrays."""
  arrays = load_file(golden.GOLDEN / "adalora.safetensors")
  params, x = example()
  nodes = lj.lora(fn, CONFIG).init(KEY, params, x)
  trainable = {name: from_peft(node, arrays, 0, name) for name, node in nodes.items()}
  optimizer = lj.adalora_optimizer(optax.sgd(golden.LEARNING_RATE), BUDGET)
  state = optimizer.init(trainable)
  step = jax.jit(optimizer.update)
  for i in range(1, BUDGET.num_train_steps + 1):
    grads = {n: from_peft(node, arrays, i, n, "/gradient") for n, node in trainable.items()}
    updates, state = step(grads, state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    yield i, state, trainable, arrays


def test_importances_and_ranks_are_pefts():
  counts = []
  for step, state, trainable, arrays in trained_by_the_golden():
    for name, node in trainable.items():
      expected = from_peft(node, arrays, step, name)
      assert relative_difference(node.arrays, expected.arrays) < 1e-4
      np.testing.assert_array_equal(node.lora_e == 0, expected.lora_e == 0)
      if step < BUDGET.last_choice:
        score = state.sensitivity[name].lora_e * state.uncertainty[name].lora_e
        importance = arrays[f"{step}/{name}/importance_of_E"][:, 0]
        np.testing.assert_allclose(score, importance, rtol=1e-4)
    ranks = lj.adalora_ranks(trainable)
    counts.append(int(sum(ranks.values())))
  # Two steps without a reduction, a choice at every second step, the last at step 10.
  assert counts == [12, 12, 12, 8, 12, 6, 12, 6, 12, 6, 6, 6, 6, 6]
  assert len({int(rank) for rank in ranks.values()}) > 1


def test_the_result_is_plain_lora_of_each_weights_rank():
  params, x = example()
  *_, (_, _, trainable, _) = trained_by_the_golden()
  plain, low_rank = lj.drop_zero_ranks(*lj.to_lora(CONFIG, trainable, params), params)
  ranks = {name: int(rank) for name, rank in lj.adalora_ranks(trainable).items()}
  assert {name: node.rank for name, node in low_rank.items()} == {
    name: rank for name, rank in ranks.items() if rank
  }
  got = lj.lora(fn, plain).apply(params, low_rank, x)
  assert relative_difference(got, lj.lora(fn, CONFIG).apply(params, trainable, x)) < 1e-5


def test_a_stack_counts_each_of_its_layers():
  """Stacked and separate layers get the same updates: each layer is a matrix."""
  draw = np.random.default_rng(1).standard_normal
  arrays = {"lora_a": (2, 6, 3), "lora_e": (2, 3), "lora_b": (2, 3, 5)}
  values, grads = (
    {n: jnp.asarray(draw(shape), jnp.float32) for n, shape in arrays.items()} for _ in range(2)
  )
  table = lj.ADALORA.table
  one, many = lj.LoraAxes((), (0,), (1,)), lj.LoraAxes((0,), (1,), (2,))

  def stacked(arrays):
    return {"w": lj.LoraWeight.from_arrays(arrays, table, many, None)}

  def separate(arrays):
    nodes = [{n: x[i] for n, x in arrays.items()} for i in range(2)]
    return [lj.LoraWeight.from_arrays(node, table, one, None) for node in nodes]

  budget = lj.AdaLoraBudget(target_rank=1, num_train_steps=2)

  def run(tree, grads):
    optimizer = lj.adalora_optimizer(optax.sgd(0.1), budget)
    state, step = optimizer.init(tree), jax.jit(optimizer.update)
    for _ in range(2):
      updates, state = step(grads, state, tree)
      tree = optax.apply_updates(tree, updates)
    return tree

  together, apart = run(stacked(values), stacked(grads)), run(separate(values), separate(grads))
  for name in arrays:
    expected = np.stack([node.arrays[name] for node in apart])
    np.testing.assert_allclose(together["w"].arrays[name], expected, rtol=1e-5, atol=1e-6)
  assert int(jnp.sum(lj.adalora_ranks(together)["w"])) == 2


@pytest.mark.long
def test_no_reduction_without_room_for_one_and_orthonormal_factors():
  """A budget of all triplets keeps all; orthonormal columns have no penalty, and no NaN."""
  eye = jnp.eye(4, 2)
  node = lj.LoraWeight.from_arrays(
    {"lora_a": eye, "lora_e": jnp.zeros(2), "lora_b": eye.T},
    *(lj.ADALORA.table, lj.LoraAxes((), (0,), (1,)), None),
  )
  optimizer = lj.adalora_optimizer(
    optax.sgd(0.1), lj.AdaLoraBudget(target_rank=2, num_train_steps=1)
  )
  updates, state = optimizer.update(
    [jax.tree.map(jnp.ones_like, node)], optimizer.init([node]), [node]
  )
  np.testing.assert_allclose(updates[0].lora_a, -0.1)
  np.testing.assert_allclose(updates[0].lora_e, -0.1)
  assert bool(state.kept[0].lora_e.all())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"target_rank": 0}, "target_rank must be"),
    ({"beta1": 1.0}, "beta1 must be"),
    ({"final_steps": 12}, "initial_steps=2 and final_steps=12 leave none of the 14 steps"),
    ({"target_rank": 5}, "target_rank=5 is above the mean initial rank 4"),
  ],
)
def test_bad_settings(changes, message):
  params, x = example()
  trainable = lj.lora(fn, CONFIG).init(KEY, params, x)
  with pytest.raises(ValueError, match=message):
    lj.adalora_optimizer(optax.sgd(1.0), dataclasses.replace(BUDGET, **changes)).init(trainable)


def test_an_adapter_of_another_variant_is_refused():
  params, x = example()
  trainable = lj.lora(fn, dataclasses.replace(CONFIG, variant=None)).init(KEY, params, x)
  optimizer = lj.adalora_optimizer(optax.sgd(1.0), BUDGET)
  with pytest.raises(ValueError, match="an adapter without a weight of AdaLoRA"):
    optimizer.init(trainable)
