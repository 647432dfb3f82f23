"""EVA, LoRA-GA and CorDA: the adapters that PEFT makes from the same data, and their purpose."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.models.zoo import load_causal_lm
from lora_jax.variants.eva import Directions, redistributed

from tests.layer_kinds import normal
from tests.make_starts_golden import DIRECTIONS, EVA_RANK, GOLDEN, MODEL, tokens
from tests.paths import ROOT

MODULES = {
  f"layers_{i}/{path}": f"layers.{i}.{module}"
  for i in range(2)
  for path, module in (
    ("attn/out/kernel", "self_attn.o_proj"),
    ("mlp/down/kernel", "mlp.down_proj"),
  )
}
CONFIG = lj.LoraConfig(8, 16.0, target=list(MODULES))


@functools.cache
def model():
  return load_causal_lm(ROOT / "tests" / "golden" / MODEL)


def loss(params, batch):
  """Of every token but the first, as in transformers."""
  log_probs = jax.nn.log_softmax(model().call(params, batch)[:, :-1])
  return -jnp.mean(jnp.take_along_axis(log_probs, batch[:, 1:, None], axis=-1))


def golden(start, path):
  arrays, module = load_file(GOLDEN), MODULES[path]
  return tuple(arrays[f"{start}/{module}/{name}"] for name in ("a", "b", "scaling"))


def initial(config):
  shapes = jnp.asarray(tokens()[:1])
  return lj.lora(loss, config).init(jax.random.key(0), model().params, shapes)


def weights_of(trainable):
  for path in MODULES:
    node = functools.reduce(lambda tree, key: tree[key], path.split("/"), trainable)
    yield path, np.asarray(node.lora_a), np.asarray(node.lora_b)


def assert_near(got, expected, tolerance):
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.long
def test_eva_has_the_ranks_and_the_directions_of_peft():
  mean_rank = dataclasses.replace(CONFIG, rank=EVA_RANK)
  config = lj.eva_config(model().call, mean_rank, model().params, [jnp.asarray(tokens())])
  ranks = []
  for (path, a, b), rule in zip(weights_of(initial(config)), config.rules, strict=True):
    expected, _, scaling = golden("eva", path)
    assert rule.pattern == re.escape(path)
    assert a.shape == expected.shape[::-1]
    assert rule.rank == a.shape[1]
    assert rule.alpha == pytest.approx(scaling * a.shape[1])
    assert_near(a @ a.T, expected.T @ expected, 1e-3)
    assert not b.any()
    ranks.append(a.shape[1])
  assert len(set(ranks)) > 1  # they were redistributed
  assert sum(ranks) == len(ranks) * EVA_RANK


@pytest.mark.long
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora_ga_has_the_directions_of_peft(direction):
  config = lj.lora_ga_config(
    loss,
    CONFIG,
    model().params,
    [jnp.asarray(tokens())],
    direction=direction,
    by_singular_values=True,
    weights_at_once=None,
  )
  for path, a, b in weights_of(initial(config)):
    expected_a, expected_b, _ = golden(f"lora_ga_{direction}", path)
    assert_near(a @ a.T, expected_a.T @ expected_a, 1e-3)  # the signs of vectors are free
    assert_near(b.T @ b, expected_b @ expected_b.T, 1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
  ("name", "mode"),
  [
    ("corda_ipm", "instruction_previewed"),
    ("corda_kpm", "knowledge_preserved"),
  ],
)
def test_corda_has_the_terms_of_peft(name, mode):
  batch = jnp.asarray(tokens()[:1])
  config = lj.corda_config(model().call, CONFIG, model().params, [batch], mode=mode)
  for path, a, b in weights_of(initial(config)):
    expected_a, expected_b, _ = golden(name, path)
    assert_near(a @ b, (expected_b @ expected_a).T, 1e-3)


def tiny():
  """A loss whose gradient has a rank above twice the adapter's, and its params and batches."""
  params = {"w": normal(8, 6, seed=1, scale=0.3)}
  fn = lambda params, batch: jnp.mean(jnp.square(batch[0] @ params["w"] - batch[1]))  # noqa: E731
  batches = [(normal(20, 8, seed=s), normal(20, 6, seed=9 + s)) for s in (2, 3)]
  return fn, params, batches


def cosine(x, y):
  return float(jnp.sum(x * y) / jnp.linalg.norm(x) / jnp.linalg.norm(y))


def first_change(adaptation, params, trainable, batch):
  """Returns the direction in which a small step of gradient descent moves the merged weight."""
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  part, frozen = lj.partition(trainable, mask)

  def merged(part):
    return adaptation.merge(params, lj.combine(part, frozen))["w"]

  def value(part):
    return adaptation.apply(params, lj.combine(part, frozen), batch)

  return jax.jvp(merged, (part,), (jax.tree.map(jnp.negative, jax.grad(value)(part)),))[1]


def test_the_first_step_of_lora_ga_is_nearer_to_full_finetuning():
  fn, params, batches = tiny()
  plain = lj.LoraConfig(2, 2.0, "w")
  gradient = jax.grad(fn)(params, batches[0])["w"]
  cosines = {}
  for name, config in {
    "lora": plain,
    "lora_ga": lj.lora_ga_config(fn, plain, params, batches[:1]),
  }.items():
    adaptation = lj.lora(fn, config)
    trainable = adaptation.init(jax.random.key(0), params, batches[0])
    change = first_change(adaptation, params, trainable, batches[0])
    cosines[name] = cosine(change, -gradient)
  values = jnp.linalg.svd(gradient)[1]
  best = jnp.linalg.norm(values[:4]) / jnp.linalg.norm(values)  # of any change of rank 4
  np.testing.assert_allclose(cosines["lora_ga"], best, rtol=1e-3)
  assert cosines["lora"] < 0.8 * cosines["lora_ga"]


@pytest.mark.parametrize(
  "make", [lj.lora_ga_config, pytest.param(lj.corda_config, marks=pytest.mark.long)]
)
def test_step_zero_is_the_base_and_it_converts_to_lora(make):
  fn, params, batches = tiny()
  config = make(fn, lj.LoraConfig(2, 6.0, "w"), params, batches)
  adaptation = lj.lora(fn, config)
  trainable = adaptation.init(jax.random.key(0), params, batches[0])
  both = jax.jit(lambda: (adaptation.apply(params, trainable, batches[0]), fn(params, batches[0])))
  step_zero, base = both()
  assert step_zero == base
  np.testing.assert_array_equal(adaptation.merge(params, trainable)["w"], params["w"])
  node = trainable["w"]
  moved = {"w": node.replace(lora_b=node.lora_b + normal(*node.lora_b.shape, seed=7))}
  plain, low_rank = lj.to_lora(config, moved, params)
  assert low_rank["w"].lora_a.shape == (8, 4)
  np.testing.assert_allclose(
    lj.lora(fn, plain).merge(params, low_rank)["w"],
    adaptation.merge(params, moved)["w"],
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.long
def test_corda_of_white_inputs_is_pissa_and_milora():
  params = {"w": normal(6, 5, seed=1)}
  fn = lambda params, x: jnp.sum(jnp.square(x @ params["w"]))  # noqa: E731
  plain, x = lj.LoraConfig(2, 4.0, "w"), jnp.eye(6)
  configs = {
    "PiSSA": lj.corda_config(fn, plain, params, [x]),
    "MiLoRA": lj.corda_config(fn, plain, params, [x], mode="knowledge_preserved"),
  }
  for variant in (lj.PISSA, lj.MILORA):
    config = configs[variant.name]
    nodes = [
      lj.lora(fn, c).init(jax.random.key(0), params, x)["w"]
      for c in (config, dataclasses.replace(plain, variant=variant))
    ]
    products = [node.lora_a @ node.lora_b for node in nodes]
    np.testing.assert_allclose(products[0], products[1], atol=1e-4)


def directions(shares):
  shares = jnp.asarray(shares)
  return Directions(jnp.zeros((*shares.shape, 9)), shares)


def test_ranks_are_redistributed_with_the_budget_kept():
  found = {"a": directions([0.9, 0.05]), "b": directions([0.4, 0.3])}
  assert redistributed({"a": 1, "b": 1}, found) == {"a": 1, "b": 1}
  found = {"a": directions([0.1, 0.05]), "b": directions([0.4, 0.3])}
  assert redistributed({"a": 1, "b": 1}, found) == {"a": 0, "b": 2}
  # a stack of two layers counts twice: 1 + 2 * 1 ranks
  found["a"] = directions([[0.5, 0.1], [0.7, 0.1]])
  assert redistributed({"a": 1, "b": 1}, found) == {"a": 1, "b": 1}


def test_eva_adapts_only_weights_that_get_a_rank_and_keeps_their_rules():
  params = {"narrow": normal(6, 6, seed=1), "wide": normal(6, 6, seed=2)}

  def fn(params, x):
    return jnp.sum(jnp.square(x[0] @ params["narrow"]) + jnp.square(x[1] @ params["wide"]))

  rules = [lj.LoraRule("narrow", dropout=0.25)]
  config = lj.LoraConfig(1, 3.0, "narrow|wide", rules=rules, variant=lj.DORA)
  batch = jnp.pad(normal(40, 2, seed=3), ((0, 0), (0, 4))), normal(40, 6, seed=4)
  whole = lj.eva_config(fn, config, params, [batch], rho=1.0)
  assert [(r.rank, r.alpha, r.dropout) for r in whole.rules] == [(1, 3.0, 0.25), (1, 3.0, 0.0)]
  assert whole.variant == lj.DORA
  # the inputs of `narrow` vary in two directions, those of `wide` in all six
  (rule,) = lj.eva_config(fn, config, params, [batch]).rules
  assert (rule.pattern, rule.rank, rule.alpha, rule.dropout) == ("narrow", 2, 6.0, 0.25)


@pytest.mark.long
def test_eva_of_a_stack_keeps_one_rank():
  params = {"w": normal(3, 6, 6, seed=1)}

  def fn(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

  config = lj.eva_config(fn, lj.LoraConfig(2, 2.0, "w"), params, [normal(9, 6)])
  (rule,) = config.rules
  assert rule.rank == 2
  a = lj.lora(fn, config).init(jax.random.key(0), params, normal(9, 6))["w"].lora_a
  np.testing.assert_allclose(a.mT @ a, jnp.broadcast_to(jnp.eye(2), (3, 2, 2)), atol=1e-5)


def test_what_has_no_start_is_refused():
  fn, params, batches = tiny()
  plain = lj.LoraConfig(2, 2.0, "w")
  adaptation = lj.lora(fn, dataclasses.replace(plain, variant=lj.LORA_GA))
  with pytest.raises(ValueError, match=r"w: this variant is initialized from data.*lora_ga_config"):
    adaptation.init(jax.random.key(0), params, batches[0])
  with pytest.raises(ValueError, match=r"2 \* rank = 8 singular vectors.*8 inputs by 6 outputs"):
    lj.lora_ga_config(fn, dataclasses.replace(plain, rank=4), params, batches)
  with pytest.raises(ValueError, match="it got one with DoRA"):
    lj.corda_config(fn, dataclasses.replace(plain, variant=lj.DORA), params, batches)
  with pytest.raises(ValueError, match=r"w: EVA initializes A and B of LoRA or DoRA, .* has PiSSA"):
    lj.eva_config(fn, dataclasses.replace(plain, variant=lj.PISSA), params, batches)
  with pytest.raises(ValueError, match=r"rho must be 1 or more, got 0\.5"):
    lj.eva_config(fn, plain, params, batches, rho=0.5)
  with pytest.raises(ValueError, match="direction"):
    lj.lora_ga_config(fn, plain, params, batches, direction="random")  # pyright: ignore
  with pytest.raises(ValueError, match="num_iterations must be"):
    lj.lora_ga_config(fn, plain, params, batches, num_iterations=0)
  with pytest.raises(ValueError, match="by_singular_values must be"):
    lj.lora_ga_config(fn, plain, params, batches, by_singular_values="yes")  # pyright: ignore
  with pytest.raises(ValueError, match="mode"):
    lj.corda_config(fn, plain, params, batches, mode="ipm")  # pyright: ignore
