"""A factored weight keeps its gain, its source and the precision of its gain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.axes import RANK, RANK2
from lora_jax.transform.factored import Factored, Source
from lora_jax.transform.factors import Factor, Term

from tests import toy_variants as toys
from tests.layer_kinds import normal
from tests.toy_models import relative_difference

KEY = jax.random.key(0)


def gained(fn, params, *args, variant=toys.GAIN_OUT, rules=(), target="w"):
  """Returns the outputs of a weight with a gain and no term, and of the merged weight."""
  config = lj.LoraConfig(2, 2.0, target, variant=variant, rules=rules)
  adapted = lj.lora(fn, config)
  start = adapted.init(KEY, params, *args)
  trainable = jax.tree.map(lambda x: x + normal(*x.shape, seed=3, scale=0.5), start)
  out = jax.jit(adapted.apply)(params, trainable, *args)
  return out, fn(adapted.merge(params, trainable), *args), fn(params, *args)


W, X = normal(6, 4, seed=1), normal(3, 6, seed=2)


@pytest.mark.parametrize(
  "fn",
  [
    lambda p, x: x @ jnp.concatenate([p["w"], W], axis=1),
    lambda p, x: x @ jnp.concatenate([W, p["w"]], axis=1),
    lambda p, x: jnp.einsum("bi,eio->beo", x, jnp.stack([p["w"], W, p["w"]])),
    lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))),
    lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2)), constant_values=0.7),
    lambda p, x: jnp.pad(x, ((0, 0), (2, 0))) @ jnp.pad(p["w"], ((2, 0), (0, 0))),
    lambda p, x: lax.ragged_dot(x, jnp.stack([p["w"], 2 * p["w"]]), jnp.array([1, 2])),
    lambda p, x: x @ p["w"].reshape(6, 2, 2).transpose(0, 2, 1).reshape(6, 4)[:, ::-1],
    lambda p, x: jnp.take(p["w"], jnp.array([0, 9]), axis=0, mode="fill", fill_value=0.25),
  ],
)
def test_a_gain_moves_with_its_weight(fn):
  out, expected, base = gained(fn, {"w": W}, X)
  assert relative_difference(out, expected) < 1e-5
  assert relative_difference(out, base) > 1e-2


def test_two_joined_weights_keep_their_gains():
  fn = lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], axis=1)  # noqa: E731
  out, expected, _ = gained(fn, {"w": W, "v": 2 * W}, X, target=".*")
  assert relative_difference(out, expected) < 1e-5


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (  # joined along the inputs: a gain for each input and output
      lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p["w"], W], axis=0),
      "its gain is neither along the output's axes only nor along the input's",
    ),
    (
      lambda p, x: (
        jnp.concatenate([x, x], 1) @ jnp.pad(p["w"], ((6, 0), (0, 0)), constant_values=0.7)
      ),
      "padding with other values than 0, which its gain would multiply",
    ),
  ],
)
def test_an_operation_that_a_gain_cannot_pass_is_refused_by_name(fn, reason):
  with pytest.raises(lj.UnsupportedOperation, match=rf"cannot adapt w: .* is applied.*{reason}"):
    gained(fn, {"w": W}, X)


def test_a_gain_on_integer_inputs_is_refused():
  fn = lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))  # noqa: E731
  with pytest.raises(lj.UnsupportedOperation, match="along the input, which is of int32"):
    gained(fn, {"w": W}, jnp.ones((3, 6), jnp.int32), variant=toys.GAIN_IN)


def test_an_opaque_rule_that_adds_by_hand_is_refused_with_a_gain():
  @jax.custom_vjp
  def kernel(x, w):
    return x @ w

  kernel.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
  fn = lambda p, x: kernel(x, p["w"])  # noqa: E731
  by_hand = {"kernel": lambda call, x, w: call(x, w.base) + w.dot(x, ((1,), (0,)))}
  lora = lj.lora(fn, lj.LoraConfig(2, 2.0, "w"), opaque=by_hand)
  trainable = jax.tree.map(lambda x: x + 0.1, lora.init(KEY, {"w": W}, X))
  expected = fn(lora.merge({"w": W}, trainable), X)
  assert relative_difference(lora.apply({"w": W}, trainable, X), expected) < 1e-5
  with pytest.raises(lj.UnsupportedOperation, match=r"w\.dot\(x, contracting, base="):
    lj.dora(fn, lj.LoraConfig(2, 2.0, "w"), opaque=by_hand).init(KEY, {"w": W}, X)


def test_a_weight_without_terms_has_a_path():
  with pytest.raises(lj.UnsupportedOperation, match="cannot adapt w: 'abs' is applied"):
    gained(lambda p, x: x @ jnp.abs(p["w"]), {"w": W}, X)
  with pytest.raises(ValueError, match="a source has a path"):
    Source([])


@pytest.mark.filterwarnings("ignore:.*is materialized for 'abs':UserWarning")
def test_a_permission_to_materialize_is_for_one_weight():
  """Also inside one compiled inner function."""

  @jax.jit
  def layer(w, x):
    return x @ jnp.abs(w)

  fn = lambda p, x: layer(p["h_0"], x) + layer(p["h_1"], x)  # noqa: E731
  params = {"h_0": W, "h_1": 2 * W}
  axes = lj.LoraAxes((), (0,), (1,))
  allow = lj.LoraRule("h_0", on_unhandled="materialize", axes=axes)
  with pytest.raises(lj.UnsupportedOperation, match="cannot adapt h_1: 'abs' is applied"):
    gained(fn, params, X, target=".*", rules=[allow])
  both = lj.LoraRule(".*", on_unhandled="materialize", axes=axes)
  out, expected, _ = gained(fn, params, X, target=".*", rules=[both])
  assert relative_difference(out, expected) < 1e-5


def test_joined_weights_are_materialized_by_permission_of_all():
  fn = lambda p, x: x @ jnp.abs(jnp.concatenate([p["a"], p["b"]], axis=1))  # noqa: E731
  params = {"a": W, "b": 2 * W}
  allow = lj.LoraRule("a", on_unhandled="materialize")
  with pytest.raises(lj.UnsupportedOperation, match="cannot adapt a and b: 'abs' is applied"):
    gained(fn, params, X, target=".*", rules=[allow])


def test_a_gain_is_applied_in_float32():
  w = Factored(W.astype(jnp.bfloat16), Source(["w"])) * Factor(jnp.full(4, 1.003), (1,))
  x = X.astype(jnp.bfloat16)
  out = w.dot(x, ((1,), (0,)), base=lambda x: x @ w.base)
  expected = ((x @ w.base).astype(jnp.float32) * np.float32(1.003)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(out, expected)
  wide = w.base.astype(jnp.float32) * np.float32(1.003)
  np.testing.assert_array_equal(w.materialize(), wide.astype(jnp.bfloat16))


def test_frozen_terms_have_no_dropout():
  """The other terms have their own masks."""
  words = {"a": "batch in rank", "b": "batch rank out", "c": "batch rank out"}
  variant = lj.Variant(
    "one frozen term",
    words,
    lambda key, site: toys.draw(key, site, words),
    lambda w, p, s: w + s * (p.a @ p.b) + s * (p.a @ p.c),
    frozen=("a", "b"),
  )
  fn = lambda p, x: x @ p["w"]  # noqa: E731
  config = lj.LoraConfig(2, 2.0, "w", dropout=0.5, variant=variant)
  lora = lj.lora(fn, config)
  params, x = {"w": jnp.zeros((6, 4))}, jnp.ones((64, 6))
  trainable = lora.init(KEY, params, x)
  silent = {"w": trainable["w"].replace(c=jnp.zeros((2, 4)))}
  dropped = lora.apply(params, silent, x, lora_key=jax.random.key(1))
  np.testing.assert_array_equal(dropped, lora.apply(params, silent, x, lora_key=None))
  dropped = lora.apply(params, trainable, x, lora_key=jax.random.key(1))
  assert relative_difference(dropped, lora.apply(params, trainable, x, lora_key=None)) > 0.1


def test_a_number_times_factors_is_a_term():
  a, b = Factor(normal(6, 2), (0, RANK)), Factor(normal(2, 4), (RANK, 1))
  for scaling in (2.0, np.float32(2.0), jnp.float32(2.0)):
    term = scaling * (a @ b)
    assert isinstance(term, Term)
    expected = 2.0 * a.array @ b.array
    np.testing.assert_allclose(term.product((6, 4), jnp.float32), expected, rtol=1e-6)
  with pytest.raises(ValueError, match="a term needs factors with the same inner axes"):
    a @ Factor(normal(2, 4), (RANK2, 1))
  with pytest.raises(ValueError, match="a gain has no inner axes"):
    Factored(W, Source(["w"])) * a
