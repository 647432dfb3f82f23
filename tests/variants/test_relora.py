"""ReLoRA and Chain of LoRA: equal to merging and starting again, at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from experiments.harness.methods import METHODS
from lora_jax.variants.relora import CyclesState

from tests.toy_models import relative_difference

KEY = jax.random.key(0)
CYCLES, CYCLE_STEPS, STEPS, SHARE, RANK, ALPHA = 3, 3, 11, 0.25, 2, 3.0
CONFIG = lj.relora_config(lj.LoraConfig(RANK, ALPHA, "w", extra="bias"), CYCLES)
INNER = optax.adam(0.1)


def fn(params, x):
  return jnp.tanh(x @ params["w"] + params["bias"][None])


def example():
  draw = np.random.default_rng(0).standard_normal
  arrays = {"w": draw((7, 6)), "bias": draw(6), "x": draw((STEPS, 4, 7)), "y": draw((4, 6))}
  arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
  return {name: arrays.pop(name) for name in ("w", "bias")}, arrays["x"], arrays["y"]


def train(optimizer):
  """Yields the trainable tree and the optimizer's state before the first and after each step."""
  params, xs, y = example()
  adapted = lj.lora(fn, CONFIG)
  trainable = adapted.init(KEY, params, xs[0])
  state = optimizer.init(trainable)
  yield trainable, state

  @jax.jit
  def step(trainable, state, x):
    loss = lambda t: jnp.sum((adapted.apply(params, t, x) - y) ** 2)  # noqa: E731
    updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
    return optax.apply_updates(trainable, updates), state

  for x in xs:
    trainable, state = step(trainable, state, x)
    yield trainable, state


def pruned(moments):
  """Returns a step's moments of A and B with all but the largest set to 0, and the bias's."""
  keeps = {
    name: np.abs(array) > np.quantile(np.abs(array), 1 - SHARE) if name != "bias" else True
    for name, array in moments.items()
  }
  return {name: jnp.where(keeps[name], array, 0) for name, array in moments.items()}


def restarted(name, state, part):
  if name == "chain_of_lora":
    return INNER.init(part)
  adam, *rest = state
  return (adam._replace(mu=pruned(adam.mu), nu=pruned(adam.nu)), *rest)


def reference(name, initial):
  """Yields the weight and the bias after each step, merged at the end of each cycle."""
  params, xs, y = example()
  w, scaling = params["w"], ALPHA / RANK
  blocks = [initial["w"].lora_a[:, RANK * i : RANK * (i + 1)] for i in range(CYCLES)]
  part = {"a": blocks[0], "b": jnp.zeros((RANK, 6)), "bias": params["bias"]}
  state = INNER.init(part)

  @jax.jit
  def step(w, part, state, x):
    def loss(part):
      weights = {"w": w + scaling * part["a"] @ part["b"], "bias": part["bias"]}
      return jnp.sum((fn(weights, x) - y) ** 2)

    updates, state = INNER.update(jax.grad(loss)(part), state, part)
    return optax.apply_updates(part, updates), state

  for i, x in enumerate(xs):
    if i and i % CYCLE_STEPS == 0 and i // CYCLE_STEPS < CYCLES:
      w = w + scaling * part["a"] @ part["b"]
      part |= {"a": blocks[i // CYCLE_STEPS], "b": jnp.zeros((RANK, 6))}
      state = restarted(name, state, part)
    part, state = step(w, part, state, x)
    yield {"w": w + scaling * part["a"] @ part["b"], "bias": part["bias"]}


def optimizer_of(name):
  if name == "chain_of_lora":
    return lj.chain_of_lora_optimizer(INNER, num_cycles=CYCLES, cycle_steps=CYCLE_STEPS)
  settings = {"num_cycles": CYCLES, "cycle_steps": CYCLE_STEPS, "kept_share": SHARE}
  return lj.relora_optimizer(INNER, **settings)


@pytest.mark.parametrize("name", ["relora", "chain_of_lora"])
def test_every_step_is_that_of_merging_and_starting_again(name):
  params, _, _ = example()
  merge = lj.lora(fn, CONFIG).merge
  steps = list(train(optimizer_of(name)))
  initial = steps[0][0]
  for (trainable, _), expected in zip(steps[1:], reference(name, initial), strict=True):
    assert relative_difference(merge(params, trainable), expected) < 1e-4
  for i, (trainable, state) in enumerate(steps):  # only one block is trained, with moments
    assert sum(x.size for x in jax.tree.leaves(state.inner[0].mu)) == RANK * (7 + 6) + 6
    cycle = min(i // CYCLE_STEPS, CYCLES - 1)
    later = slice(RANK * (cycle + 1), None)
    np.testing.assert_array_equal(trainable["w"].lora_a[:, later], initial["w"].lora_a[:, later])
    assert not trainable["w"].lora_b[later].any()
    finished = slice(RANK * cycle)
    end = steps[cycle * CYCLE_STEPS][0]
    np.testing.assert_array_equal(trainable["w"].lora_a[:, finished], end["w"].lora_a[:, finished])


def test_a_new_cycle_keeps_or_drops_moments_of_the_block_alone():
  """Of a stack, the same share of each layer; the bias's moments stay."""
  axes = lj.LoraAxes((0,), (1,), (2,))
  draw = np.random.default_rng(0).standard_normal
  a, b = draw((2, 5, 4)), draw((2, 4, 5))
  a[1] *= 100
  tree = {"w": lj.LoraWeight(*(jnp.asarray(x, jnp.float32) for x in (a, b)), axes), "bias": b[0]}

  def moments(kept_share):
    settings = {"num_cycles": 2, "cycle_steps": 1, "kept_share": kept_share}
    optimizer = lj.relora_optimizer(optax.trace(0.5), **settings)
    state = CyclesState(jnp.ones((), jnp.int32), optimizer.init(tree).inner)
    state = state._replace(inner=jax.tree.map(jnp.ones_like, state.inner))
    ordered = jnp.arange(20.0).reshape(2, 5, 2)
    trace = state.inner.trace | {"w": state.inner.trace["w"].replace(lora_a=ordered)}
    state = state._replace(inner=state.inner._replace(trace=trace))
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return jax.jit(optimizer.update)(zeros, state, tree)[1].inner.trace

  some = moments(0.2)
  np.testing.assert_array_equal(np.count_nonzero(some["w"].lora_a, axis=(1, 2)), [2, 2])
  assert float(some["w"].lora_a[0].max()) == 4.5  # the largest of layer 0, decayed once
  np.testing.assert_array_equal(some["bias"], 0.5)
  assert not moments(0.0)["w"].lora_a.any()
  np.testing.assert_array_equal(moments(1.0)["w"].lora_a, jnp.arange(20.0).reshape(2, 5, 2) / 2)


def test_configs_and_settings():
  rules = [lj.LoraRule("a", rank=1), lj.LoraRule("b", alpha=2.0)]
  config = lj.relora_config(lj.LoraConfig(2, 8.0, ".*", rules=rules), 3)
  assert (config.rank, config.alpha) == (6, 24.0)
  assert [(rule.rank, rule.alpha) for rule in config.rules] == [(3, None), (None, 6.0)]
  with pytest.raises(ValueError, match="whose input has no dropout"):
    lj.relora_config(lj.LoraConfig(2, 8.0, ".*", dropout=0.1), 3)
  for changes in ({"variant": lj.DORA}, {"rules": [lj.LoraRule("a", variant=lj.DORA)]}):
    with pytest.raises(ValueError, match="cycles of plain LoRA, and the config has DoRA"):
      lj.relora_config(lj.LoraConfig(2, 8.0, ".*", **changes), 3)
  assert lj.relora_config(lj.LoraConfig(2, 8.0, ".*", variant=lj.LORA), 3).rank == 6
  with pytest.raises(ValueError, match="num_cycles must be"):
    lj.relora_config(lj.LoraConfig(2, 8.0, ".*"), 0)
  with pytest.raises(ValueError, match="kept_share must be"):
    lj.relora_optimizer(INNER, num_cycles=2, cycle_steps=2, kept_share=1.5)
  with pytest.raises(ValueError, match="cycle_steps must be"):
    lj.chain_of_lora_optimizer(INNER, num_cycles=2, cycle_steps=0)
  with pytest.raises(ValueError, match=r"warmup_steps=4 is not shorter than a cycle, .*=4"):
    lj.relora_schedule(lambda step: 1.0, cycle_steps=4, warmup_steps=4)


@pytest.mark.parametrize(("num_steps", "rates"), [(4, [1, 1, 1, 1]), (8, [1, 1, 0, 1, 0, 1, 0, 1])])
def test_a_run_of_few_steps_trains_all_cycles(num_steps, rates):
  schedule = METHODS["relora"].schedule(lambda steps: lambda step: 1.0, num_steps)
  assert [float(schedule(step)) for step in range(num_steps)] == rates


@pytest.mark.parametrize(("variant", "rank"), [(None, 3), (lj.DORA, 4)])
def test_adapters_without_blocks_are_refused(variant, rank):
  params, xs, _ = example()
  config = lj.LoraConfig(rank, 1.0, "w", variant=variant)
  trainable = lj.lora(fn, config).init(KEY, params, xs[0])
  optimizer = lj.chain_of_lora_optimizer(INNER, num_cycles=2, cycle_steps=2)
  with pytest.raises(
    ValueError, match="in 2 cycles is for plain LoRA with a multiple of 2 as rank"
  ):
    optimizer.init(trainable)
