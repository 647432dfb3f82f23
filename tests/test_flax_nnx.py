"""Flax NNX models with other state than parameters: sown values are dropped, changes refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj

from tests.toy_models import randomized, relative_difference

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*Using 'Module:DeprecationWarning")

KEY = jax.random.key(0)
X = jnp.ones((3, 8))


class Counter(nnx.Variable):
  pass


class Layer(nnx.Module):
  """A linear layer with state of every kind; `uses` names those that its call touches."""

  def __init__(self, rngs, uses=()):
    self.uses = tuple(uses)
    self.dense = nnx.Linear(8, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.count = Counter(jnp.zeros(()))
    self.calls = nnx.Intermediate(jnp.zeros(()))

  def __call__(self, x, rngs=None):
    x = self.dense(x)
    if "sow" in self.uses:
      self.sow(nnx.Intermediate, "hidden", x)
    if "perturb" in self.uses:
      x = self.perturb("noise", x)
    if "intermediate" in self.uses:
      self.calls[...] += 1
    if "norm" in self.uses:
      x = self.norm(x)
    if "dropout" in self.uses:
      x = self.dropout(x, rngs=rngs)
    if "count" in self.uses:
      self.count[...] += 1
    return x


class Wrapped(nnx.Module):
  """A layer, or three of them, called through one of NNX's transformations."""

  def __init__(self, kind, uses, rngs):
    self.kind = kind
    self.layer = Layer(rngs, uses)
    if kind == "scan":
      make = nnx.vmap(lambda rngs: Layer(rngs, uses), in_axes=0, out_axes=0)
      self.layer = nnx.split_rngs(splits=3)(make)(rngs)

  def __call__(self, x):
    call = lambda layer, x: layer(x)  # noqa: E731
    if self.kind == "scan":
      step = lambda x, layer: layer(x)  # noqa: E731
      return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layer)
    if self.kind == "cond":
      return nnx.cond(x[0, 0] > 0, call, lambda layer, x: 2 * layer(x), self.layer, x)
    if self.kind == "loop":
      step = lambda i, state: (state[0], state[0](state[1]))  # noqa: E731
      return nnx.fori_loop(0, 2, step, (self.layer, x))[1]
    return {"jit": nnx.jit, "remat": nnx.remat}[self.kind](call)(self.layer, x)


def adapted(model):
  fn, params = lj.functional(model)
  lora = lj.lora(fn, lj.LoraConfig(2, 4.0, ".*dense/kernel"))
  return fn, params, lora, randomized(lora.init(KEY, params, X))


def assert_equals_the_merged_model(fn, params, lora, trainable):
  @jax.jit
  def both(trainable):
    adapted = lambda t: jnp.sum(jnp.sin(lora.apply(params, t, X)))  # noqa: E731
    merged = lambda t: jnp.sum(jnp.sin(fn(lora.merge(params, t), X)))  # noqa: E731
    return [jax.value_and_grad(f)(trainable) for f in (adapted, merged)]

  got, expected = both(trainable)
  assert relative_difference(got, expected) < 1e-5


@pytest.mark.parametrize("uses", ["sow", "perturb", "intermediate"])
def test_values_that_a_call_sows_are_dropped(uses):
  model = Layer(nnx.Rngs(0), [uses])
  expected = model(X)  # which also leaves sown values in the model
  fn, params, lora, trainable = adapted(model)
  np.testing.assert_allclose(fn(params, X), expected, rtol=1e-6)
  assert "hidden" not in params
  assert_equals_the_merged_model(fn, params, lora, trainable)


@pytest.mark.parametrize("kind", ["jit", "remat", "scan", "cond", "loop"])
def test_state_that_passes_through_a_transformation_is_not_changed(kind):
  uses = ["norm", "dropout"] if kind in ("cond", "loop") else ["norm", "dropout", "sow"]
  model = Wrapped(kind, uses, nnx.Rngs(0))
  model.eval()
  assert_equals_the_merged_model(*adapted(model))


@pytest.mark.parametrize("kind", ["jit", "remat", "cond", "loop"])
def test_a_change_inside_a_transformation_is_noticed(kind):
  with pytest.raises(ValueError, match=r"for layer/count \(Counter\): return the value"):
    adapted(Wrapped(kind, ["count"], nnx.Rngs(0)))


def eval_mode(model):
  model.eval()
  return {}


def own_stream(model):
  del model
  return {"rngs": nnx.Rngs(1)}


@pytest.mark.parametrize(
  ("uses", "message", "remedy"),
  [
    ("norm", "for norm/mean (BatchStat), norm/var (BatchStat): call model.eval()", eval_mode),
    ("dropout", "for dropout/rngs/count (RngCount): call model.eval()", eval_mode),
    ("dropout", "or pass what the call would draw: rngs=nnx.Rngs(...)", own_stream),
    ("count", "for count (Counter): return the value from the call, or make it an nnx.Inter", None),
  ],
)
def test_the_remedy_goes_by_the_kind_of_variable(uses, message, remedy):
  model = Layer(nnx.Rngs(0), [uses])
  fn, params = lj.functional(model)
  with pytest.raises(ValueError, match=re.escape(message)):
    fn(params, X)
  if remedy is None:
    model.count = nnx.Intermediate(jnp.zeros(()))
    options = {}
  else:
    options = remedy(model)
  fn, params = lj.functional(model)
  assert fn(params, X, **options).shape == X.shape


def test_each_kind_has_its_remedy_in_one_message():
  fn, params = lj.functional(Layer(nnx.Rngs(0), ["norm", "dropout", "count"]))
  with pytest.raises(
    ValueError, match=r"for count .*return.*; for dropout.*rngs=.*; for norm.*model\.eval"
  ):
    fn(params, X)


def test_a_cache_is_switched_off():
  model = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
  model.init_cache((3, 4, 8))
  fn, params = lj.functional(model)
  with pytest.raises(ValueError, match=r"cached_key \(Cache\).*set_attributes\(decode=False\)"):
    fn(params, X[:, None])
  model.set_attributes(decode=False)
  fn, params = lj.functional(model)
  assert fn(params, X[:, None]).shape == (3, 1, 8)


def test_an_rnn_takes_its_first_state():
  model = nnx.RNN(nnx.SimpleCell(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
  fn, params = lj.functional(model)
  with pytest.raises(ValueError, match=r"\(RngCount\).*or initial_carry= of an RNN"):
    fn(params, X[None])
  assert fn(params, X[None], initial_carry=jnp.zeros((1, 8))).shape == (1, 3, 8)


def test_other_models_are_refused():
  with pytest.raises(ValueError, match="takes a Flax NNX model, got dict"):
    lj.functional({})
