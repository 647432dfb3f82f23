"""Several methods at once: their outputs, gradients, trees and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import lora_jax as lj
from lora_jax import marks

PARAMS = {
  "body": jax.random.normal(jax.random.key(0), (6, 5)),
  "head": jax.random.normal(jax.random.key(1), (5, 3)),
}
X = jax.random.normal(jax.random.key(2), (4, 6))


def fn(params, x):
  return jnp.tanh(x @ params["body"]) @ params["head"]


def lora(dropout=0.0, target="body"):
  return functools.partial(lj.lora, config=lj.LoraConfig(2, 4.0, target=target, dropout=dropout))


PREFIXES = lj.prefix_embedding, lj.prefix_layer
HEAD = functools.partial(lj.partial_finetuning, train="head")
DORA = functools.partial(lj.dora, config=lj.LoraConfig(2, 4.0, target="body"))


def trained(method, params=PARAMS):
  """Returns a trainable tree that is not that of step 0."""
  tree = method.init(jax.random.key(3), params, X)
  return jax.tree.map(lambda leaf: leaf + 0.1, tree)


@pytest.mark.parametrize(
  "methods",
  [(HEAD, lora()), (lora(), HEAD, lora()), pytest.param((DORA, lora()), marks=pytest.mark.long)],
  ids=["head+lora", "three", "dora+lora"],
)
def test_the_merged_model_is_that_of_all_parts(methods):
  method = lj.compose(fn, *methods)
  tune = trained(method)
  apply = jax.jit(functools.partial(method.apply, PARAMS))
  merged = jax.jit(lambda tune: fn(method.merge(PARAMS, tune), X))(tune)
  np.testing.assert_allclose(apply(tune, X), merged, rtol=1e-5, atol=1e-6)
  for i in range(len(methods)):  # each part has an effect
    others = tune | {f"part_{i}": jax.tree.map(lambda leaf: leaf + 0.1, tune[f"part_{i}"])}
    assert np.abs(apply(others, X) - merged).max() > 1e-3


def test_the_parts_are_those_of_the_methods_alone():
  tune = lj.compose(fn, lora(), HEAD).init(jax.random.key(3), PARAMS, X)
  shapes = jax.tree.map(jnp.shape, tune)
  assert shapes["part_0"]["body"].lora_a == (6, 2)
  assert shapes["part_1"] == {"head": (5, 3)}
  assert {"part_0", "part_1"} == set(tune)


def test_gradients_are_those_of_the_nested_function():
  method, first = lj.compose(fn, lora(), HEAD), lj.lora(fn, lora().keywords["config"])
  tune = trained(method)

  def nested(tune):
    whole = PARAMS | tune["part_1"]
    return jnp.sum(first.apply(whole, tune["part_0"], X) ** 2)

  def composed(tune):
    return jnp.sum(method.apply(PARAMS, tune, X) ** 2)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    jax.jit(jax.grad(composed))(tune),
    jax.jit(jax.grad(nested))(tune),
  )


def test_each_part_has_a_key_of_its_own():
  keys = []

  def keyed(fn):
    def apply(params, trainable, *args, lora_key, **kwargs):
      del trainable
      keys.append(lora_key)
      return fn(params, *args, **kwargs)

    return lj.full_finetuning(fn)._replace(apply=apply)

  parts = {"part_0": {}, "part_1": {}}
  lj.compose(fn, keyed, keyed).apply(PARAMS, parts, X, lora_key=jax.random.key(4))
  data = [jax.random.key_data(key).tolist() for key in (*keys, jax.random.key(4))]
  assert len({str(words) for words in data}) == 3
  lj.compose(fn, keyed, keyed).apply(PARAMS, parts, X, lora_key=None)
  assert keys[2:] == [None, None]
  drops = lj.compose(fn, lora(0.5), HEAD)
  with pytest.raises(ValueError, match="lora_key"):
    drops.apply(PARAMS, trained(drops), X)


def test_scaling_goes_to_every_part():
  method = lj.compose(fn, lora(), lora())
  tune = trained(method)
  np.testing.assert_allclose(method.apply(PARAMS, tune, X, scaling=0.0), fn(PARAMS, X), rtol=1e-6)


def test_a_quantized_base_is_adapted():
  params = PARAMS | {"body": lj.quantize({"body": jnp.ones((64, 5))}, "int8", "body")["body"]}
  method, x = lj.compose(fn, lora(), HEAD), jnp.ones((2, 64))
  tune = method.init(jax.random.key(0), params, x)
  out = method.apply(params, tune, x)
  np.testing.assert_allclose(out, fn(lj.dequantize(params), x), rtol=1e-5)


def test_each_part_is_sharded_like_its_weights():
  tune = lj.compose(fn, lora(), HEAD).init(jax.random.key(3), PARAMS, X)
  specs = {"body": PartitionSpec("fsdp", "tensor"), "head": PartitionSpec("tensor")}
  parts = lj.shardings(tune, specs)
  assert parts["part_0"]["body"].lora_a == PartitionSpec("fsdp", None)
  assert parts["part_0"]["body"].lora_b == PartitionSpec(None, "tensor")
  assert parts["part_1"]["head"] == PartitionSpec("tensor")


def test_the_summary_has_a_table_for_each_part():
  method = lj.compose(fn, lora(), HEAD)
  tune = trained(method)
  first, second = lj.summary(PARAMS, tune, lora().keywords["config"]).split("\n\n")
  assert [line.split()[0] for line in first.splitlines()] == ["path", "body", "adapter", "base"]
  assert [line.split()[0] for line in second.splitlines()] == ["path", "head", "fully", "base"]
  assert set(lj.merge_error(method, PARAMS, tune)) == {"body"}


def test_parts_are_stored_and_read():
  tune = trained(lj.compose(fn, lora(), HEAD))
  for like in (tune, None):
    read = lj.unpack(*lj.pack(tune), like)
    assert jax.tree.structure(read) == jax.tree.structure(tune)
    jax.tree.map(np.testing.assert_array_equal, read, tune)


def nested(fn):
  return lj.compose(fn, lora(), HEAD)


@pytest.mark.parametrize(
  ("methods", "message"),
  [
    ((lora(),), "two or more methods, got 1"),
    ((lora(), lj.full_finetuning), "method 1 of compose fully trains the base model"),
    ((HEAD, lora(), HEAD), "methods 0 and 2 of compose both train 'head'"),
    ((nested, HEAD), "0 and 1 of compose both train 'head'"),
    ((functools.partial(lj.partial_finetuning, train="body"), lora()), "never used"),
  ],
  ids=["one", "full", "same leaf", "same leaf in parts", "weight replaced"],
)
def test_methods_that_do_not_compose_are_refused(methods, message):
  with pytest.raises(ValueError, match=message):
    lj.compose(fn, *methods).init(jax.random.key(0), PARAMS, X)


def test_two_prefixes_are_refused():
  """The first one replaces the ids of slots, so that the other would find none."""

  def marking(params, tokens):
    x = params["table"][checkpoint_name(tokens, marks.TOKENS)]
    return checkpoint_name(checkpoint_name(x, marks.TOKEN_EMBEDDINGS), marks.LAYER_INPUT)

  methods = [functools.partial(f, num_slots=1, std=1.0) for f in PREFIXES]
  args = {"table": jnp.ones((3, 2))}, jnp.array([lj.Slots(1).around([1])])
  with pytest.raises(ValueError, match="methods 0 and 1 of compose both train the vectors of slo"):
    lj.compose(marking, *methods).init(jax.random.key(0), *args)


def test_the_tree_of_other_methods_is_refused():
  method = lj.compose(fn, lora(), HEAD)
  with pytest.raises(ValueError, match="trainable tree of 2 methods, part_0 to part_1, got "):
    method.apply(PARAMS, trained(lj.lora(fn, lora().keywords["config"])), X)
