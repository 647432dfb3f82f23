"""Rows of one batch that belong to different adapters: losses and gradients of each alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

from tests.toy_models import make_params, randomized, scanned, tokens, unrolled

SLOTS = [3, 0, 3, 1, 0]
TOKENS = tokens(batch=5)


def loss_of_row(fn, params, row):
  """Returns the sum of next-token losses of one row."""
  logits = jax.nn.log_softmax(fn(params, row[None])[0, :-1])
  return -jnp.take_along_axis(logits, row[1:, None], axis=-1).sum()


@functools.cache
def case(stacked):
  """Returns params, a bank of four slots with ranks 2, 5, 3 and an empty one, and the method."""
  params, fn = make_params(stacked), scanned if stacked else unrolled
  loss = functools.partial(loss_of_row, fn)
  adapters = []
  for seed, (rank, target) in enumerate(
    [(2, ".*/kernel"), (5, ".*/query/kernel"), (3, ".*(kernel|embedding)")]
  ):
    config = lj.LoraConfig(rank, 4.0, target)
    shapes = jax.eval_shape(lj.lora(loss, config).init, jax.random.key(0), params, TOKENS[0])
    adapters.append((config, randomized(shapes, seed=seed)))
  bank = lj.bank(adapters, params, slots=4)
  return params, bank, lj.lora(loss, bank.config)


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.long), True])
def test_losses_and_gradients_are_those_of_each_adapter_alone(stacked):
  params, bank, method = case(stacked)
  rows = lj.by_row(method.apply)

  def total(trainable):
    losses = rows(params, trainable, SLOTS, TOKENS)
    return losses.sum(), losses

  (_, losses), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(bank.trainable)

  def total_alone(trainable, row_tokens, is_used):
    losses = jax.vmap(lambda row: method.apply(params, trainable, row))(row_tokens)
    return (losses * is_used).sum(), losses

  alone = jax.jit(jax.value_and_grad(total_alone, has_aux=True))
  for slot in range(4):
    used = np.equal(SLOTS, slot)
    (_, expected), gradient = alone(bank.adapter(slot)[1], TOKENS, jnp.asarray(used, jnp.float32))
    np.testing.assert_allclose(losses[used], expected[used], rtol=1e-5)
    for mixed, single in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
      np.testing.assert_allclose(mixed[slot], single, rtol=1e-4, atol=1e-5 * np.abs(single).max())
  assert len(set(np.asarray(losses).tolist())) == 5


def test_traced_slots_outside_the_bank_yield_nan():
  config = lj.LoraConfig(2, 4.0, "w")
  params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
  method = lj.lora(lambda params, row: row @ params["w"], config)
  bank = lj.bank([(config, method.init(jax.random.key(0), params, x[0]))], params, slots=2)
  apply = jax.jit(lj.by_row(lj.lora(lambda params, row: row @ params["w"], bank.config).apply))
  for dtype in ("int32", "int8"):
    out = apply(params, bank.trainable, jnp.asarray([1, -1, 2, 0], dtype), x)
    np.testing.assert_array_equal(np.isnan(out).all(axis=1), [False, True, True, False])
