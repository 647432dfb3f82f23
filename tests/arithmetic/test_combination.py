"""Adapters summed, truncated and padded to one shape: exact, for every kind of weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights

from tests.toy_models import (
  make_params,
  randomized,
  relative_difference,
  scanned,
  tokens,
  unrolled,
)

QV, MLP = r"h_\d/attn/(query|value)/kernel", r"h_\d/mlp/.*/kernel"
STACK = r"blocks/attn/(query|value)/kernel"


def many(params, x):
  """A multi-head projection, experts with a batch axis, and a table that is looked up."""
  x = jnp.take(params["table"], x, axis=0)
  heads = jnp.einsum("btd,dnh->btnh", x, params["heads"])
  x = jnp.einsum("btnh,nhd->btd", heads, params["out"])
  return jnp.einsum("ebtd,edf->ebtf", jnp.stack([x, 2 * x, -x]), params["experts"])


def many_params():
  draw = np.random.default_rng(5)
  shapes = {"table": (50, 12), "heads": (12, 3, 4), "out": (3, 4, 12), "experts": (3, 12, 7)}
  return {
    name: jnp.asarray(draw.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
  }


MODELS = {
  "unrolled": (unrolled, make_params, [{"target": QV}, {"target": [QV, MLP], "rank": 5}]),
  "other targets": (unrolled, make_params, [{"target": QV}, {"target": MLP, "alpha": 3.0}]),
  "rules": (
    *(unrolled, make_params),
    [{"target": QV, "rules": [lj.LoraRule("h_1/.*", rank=4, alpha=1.0)]}, {"target": QV}],
  ),
  "stack": (
    *(scanned, functools.partial(make_params, stacked=True)),
    [{"target": STACK}, {"target": STACK, "rank": 3, "alpha": 1.0}],
  ),
  "parts of a stack": (
    *(scanned, functools.partial(make_params, stacked=True)),
    [{"target": STACK, "stacked_layers": [0]}, {"target": STACK, "stacked_layers": [1, 2]}],
  ),
  "a part and all of a stack": (
    *(scanned, functools.partial(make_params, stacked=True)),
    [{"target": STACK, "stacked_layers": [2]}, {"target": STACK}],
  ),
  "many axes": (many, many_params, [{"target": ".*"}, {"target": ".*", "rank": 3}]),
}

SHORT = {"other targets", "parts of a stack", "many axes"}
NAMES = [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in MODELS]


def adapter(fn, params, seed, **settings):
  config = lj.LoraConfig(**{"rank": 2, "alpha": 6.0} | settings)
  shapes = jax.eval_shape(lj.lora(fn, config).init, jax.random.key(0), params, tokens())
  return config, randomized(shapes, seed=seed)


def delta(fn, params, config, trainable):
  """Returns an adapter's delta of each leaf."""
  merged = jax.jit(lj.lora(fn, config).merge)(params, trainable)
  return jax.tree.map(jnp.subtract, merged, params)


@functools.cache
def case(name):
  fn, make, settings = MODELS[name]
  params = jax.tree.map(jnp.zeros_like, make())  # so that merged weights are deltas
  adapters = [adapter(fn, params, seed, **options) for seed, options in enumerate(settings)]
  return fn, make(), params, adapters, [delta(fn, params, *pair) for pair in adapters]


@pytest.mark.parametrize("name", NAMES)
def test_the_weighted_sum_is_exact(name):
  fn, params, zeros, adapters, deltas = case(name)
  config, trainable = lj.weighted_sum(adapters, [0.7, -2.0], params)
  expected = jax.tree.map(lambda x, y: 0.7 * x - 2.0 * y, *deltas)
  assert relative_difference(delta(fn, zeros, config, trainable), expected) < 1e-6
  ranks = [{p: w.rank for p, w in adapter_weights(t).items()} for _, t in adapters]
  for path, weight in adapter_weights(trainable).items():
    assert (weight.axes.batch == (0,)) == (path == "experts" or path.startswith("blocks"))
    assert weight.rank == sum(by_path.get(path, 0) for by_path in ranks)
  out = jax.jit(lj.lora(fn, config).apply)(params, trainable, tokens())
  merged = jax.tree.map(jnp.add, params, expected)
  assert relative_difference(out, jax.jit(fn)(merged, tokens())) < 1e-5
  fresh = jax.eval_shape(lj.lora(fn, config).init, jax.random.key(0), params, tokens())
  assert jax.tree.structure(fresh) == jax.tree.structure(trainable)
  assert [x.shape for x in jax.tree.leaves(fresh)] == [x.shape for x in jax.tree.leaves(trainable)]


@pytest.mark.parametrize(
  "name",
  [
    "many axes",
    "a part and all of a stack",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("unrolled", "stack")),
  ],
)
def test_truncation_is_the_best_and_returns_its_error(name):
  """Compared with the singular values of each weight's whole delta."""
  fn, params, zeros, adapters, _ = case(name)
  summed = lj.weighted_sum(adapters, [1.0, 1.0], params)
  before = delta(fn, zeros, *summed)
  config, trainable, errors = lj.truncate_rank(*summed, params, 3)
  after = delta(fn, zeros, config, trainable)
  weights, leaves = adapter_weights(trainable), dict(lj.trees.leaves_with_path(before))
  others = dict(lj.trees.leaves_with_path(after))
  for path, weight in weights.items():
    axes = weight.axes
    full = np.asarray(leaves[path], np.float64).transpose(*axes.batch, *axes.inputs, *axes.outputs)
    batch = full.shape[: len(axes.batch)]
    values = np.linalg.svd(full.reshape(*batch, axes.counts(leaves[path].shape)[0], -1))[1]
    best = np.sqrt((values[..., 3:] ** 2).sum() / (values**2).sum())
    got = np.linalg.norm(others[path] - leaves[path]) / np.linalg.norm(leaves[path])
    assert weight.rank == 3
    assert float(errors[path]) == pytest.approx(best, rel=1e-4)
    assert got == pytest.approx(best, rel=1e-4)
    assert best > 0.01


def test_a_rank_that_is_enough_loses_nothing():
  fn, params, zeros, adapters, deltas = case("unrolled")
  doubled = lj.weighted_sum([adapters[0], adapters[0]], [0.25, 0.75], params)
  config, trainable, errors = lj.truncate_rank(*doubled, params, 2)
  assert config.rank == 2
  assert relative_difference(delta(fn, zeros, config, trainable), deltas[0]) < 1e-5
  assert max(map(float, errors.values())) < 1e-6
  none = jax.tree.map(jnp.zeros_like, doubled[1])
  _, trainable, errors = lj.truncate_rank(doubled[0], none, params, 2)
  assert set(map(float, errors.values())) == {0.0}
  assert not any(np.isnan(x).any() for x in jax.tree.leaves(trainable))
  same = lj.truncate_rank(*adapters[0], params, 2)
  assert relative_difference(delta(fn, zeros, *same[:2]), deltas[0]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_aligned_adapters_keep_their_deltas(name):
  fn, params, zeros, adapters, deltas = case(name)
  config, trees = lj.align(adapters, params)
  assert len({jax.tree.structure(tree) for tree in trees}) == 1
  assert len({tuple(x.shape for x in jax.tree.leaves(tree)) for tree in trees}) == 1
  for trainable, expected in zip(trees, deltas, strict=True):
    assert relative_difference(delta(fn, zeros, config, trainable), expected) < 1e-6


def test_a_weight_that_another_adapter_fully_trains():
  fn, params, x = lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(8)}, jnp.ones((1, 8))
  factors = lj.LoraConfig(2, 4.0, "kernel")
  factored = lj.lora(fn, factors).init(jax.random.key(0), params, x)
  both = {"kernel": jnp.eye(8), "other": jnp.eye(8)}
  extra = lj.LoraConfig(2, 4.0, "other", extra="kernel")
  fully_trained = lj.lora(lambda p, x: x @ p["kernel"] @ p["other"], extra)
  adapters = [(factors, factored), (extra, fully_trained.init(jax.random.key(1), both, x))]
  for join in (lambda: lj.align(adapters, both), lambda: lj.weighted_sum(adapters, [1, 1], both)):
    with pytest.raises(ValueError, match="kernel is adapted by factors in one adapter and fully"):
      join()


def test_tasks_are_switched_without_compiling_or_copying():
  fn, params, _, adapters, _ = case("other targets")
  traced = []

  def counted(params, x):
    traced.append(1)
    return fn(params, x)

  config, trees = lj.align(adapters, params)
  apply = jax.jit(lj.lora(counted, config).apply)
  compiled = apply.lower(params, trees[0], tokens()).compile().memory_analysis()
  before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]
  traced.clear()
  outputs = [apply(params, trees[i], tokens()) for i in (0, 1, 0, 1)]
  assert len(traced) <= 1
  assert apply._cache_size() == 1
  assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)] == before
  allocated = compiled.temp_size_in_bytes + compiled.output_size_in_bytes
  assert allocated < sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  for i, out in enumerate(outputs):
    own_config, trainable = adapters[i % 2]
    expected = jax.jit(lj.lora(fn, own_config).apply)(params, trainable, tokens())
    assert relative_difference(out, expected) < 1e-5
  assert relative_difference(outputs[0], outputs[1]) > 1e-2


def test_fully_trained_leaves():
  fn, params, _, _, _ = case("unrolled")
  settings = {"target": QV, "extra": "h_0/mlp/up/bias"}
  first, second = (adapter(fn, params, seed, **settings) for seed in (0, 1))
  plain = adapter(fn, params, 2, target=QV)
  path = "h_0/mlp/up/bias"
  for adapters in ([first, plain], [plain, first], [first, first]):
    config, trainable = lj.weighted_sum(adapters, [0.5, 0.5], params)
    bias = trainable["h_0"]["mlp"]["up"]["bias"]
    np.testing.assert_array_equal(bias, first[1]["h_0"]["mlp"]["up"]["bias"])
    lj.lora(fn, config).merge(params, trainable)
  with pytest.raises(ValueError, match=rf"{path} is fully trained in several .* no sum"):
    lj.weighted_sum([first, second], [0.5, 0.5], params)
  _, trees = lj.align([first, plain, second], params)
  biases = [tree["h_0"]["mlp"]["up"]["bias"] for tree in trees]
  assert biases[1] is params["h_0"]["mlp"]["up"]["bias"]
  assert not np.array_equal(biases[0], biases[2])
  shapes = jax.eval_shape(lambda: params)
  with pytest.raises(ValueError, match=rf"{path} is fully trained in some .* base model's params"):
    lj.align([first, plain], shapes)
  lj.align([first, second], shapes)


def test_adapters_that_cannot_be_added_are_refused():
  _, params, _, adapters, _ = case("unrolled")
  swapped = jax.tree.map(
    lambda w: lj.LoraWeight(w.lora_a, w.lora_b, lj.LoraAxes((), (1,), (0,))),
    adapters[0][1],
    is_leaf=lambda x: isinstance(x, lj.LoraWeight),
  )
  with pytest.raises(ValueError, match=r"h_0/attn/query/kernel is factored along .* and along"):
    lj.weighted_sum([adapters[0], (adapters[0][0], swapped)], [1.0, 1.0], params)
  other = adapter(many, many_params(), 0, target=".*")
  with pytest.raises(ValueError, match="not for these params"):
    lj.align([adapters[0], (adapters[0][0], other[1])], params)


def test_on_unhandled_is_kept():
  fn, params, _, _, _ = case("unrolled")
  rule = lj.LoraRule("h_0/.*", on_unhandled="materialize")
  first, plain = adapter(fn, params, 0, target=QV, rules=[rule]), adapter(fn, params, 1, target=QV)
  config, _ = lj.weighted_sum([plain, first], [1.0, 1.0], params)
  behaviours = {rule.pattern: rule.on_unhandled for rule in config.rules}
  assert set(behaviours) == {"h_0/attn/query/kernel", "h_0/attn/value/kernel"}
  assert set(behaviours.values()) == {"materialize"}
