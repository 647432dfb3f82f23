"""The adapted model keeps the base model's names, source lines, derivatives and inner functions."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.transform import rules
from lora_jax.transform.factored import Factored

from tests.jaxprs import equations
from tests.toy_models import make_params, randomized, relative_difference, tokens, unrolled

KEY = jax.random.key(0)
X = jnp.ones((3, 8))


def adapt(fn, params, *args, **options):
  opaque = options.pop("opaque", None)
  config = lj.LoraConfig(**({"rank": 2, "alpha": 4.0, "target": ".*w"} | options))
  lora = lj.lora(fn, config, opaque)
  return lora, randomized(lora.init(KEY, params, *args))


def test_name_stacks_and_source_lines_are_the_base_models():
  def fn(params, x):
    with jax.named_scope("layer"), jax.named_scope("dense"):
      return jnp.tanh(x @ params["w"])

  params = {"w": jnp.ones((8, 8))}
  lora, trainable = adapt(fn, params, X)
  jaxpr = jax.make_jaxpr(lora.apply)(params, trainable, X)
  dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert len(dots) == 3  # W, A, B
  for equation in dots:
    assert str(equation.source_info.name_stack) == "layer/dense"
    summary = jax.extend.source_info_util.summarize(equation.source_info)
    assert "test_interpreter.py" in summary
    assert "fn" in summary
  text = jax.jit(lora.apply).lower(params, trainable, X).compile().as_text()
  assert "layer/dense/dot_general" in text


def test_inner_functions_keep_their_names_and_are_processed_once(monkeypatch):
  calls = []
  rule = rules.CONSUMERS["dot_general"]

  def counted(*args, **params):
    calls.append(1)
    return rule(*args, **params)

  monkeypatch.setattr(rules, "CONSUMERS", rules.CONSUMERS | {"dot_general": counted})

  @jax.jit
  def block(w, x):
    return jnp.tanh(x @ w)

  def fn(params, x):
    for i in range(12):
      x = block(params[f"{i}_w"], x)
    return x

  params = {f"{i}_w": jnp.eye(8) for i in range(12)}
  lora, trainable = adapt(fn, params, X)
  calls.clear()
  jaxpr = jax.make_jaxpr(lora.apply)(params, trainable, X)
  assert len(calls) == 1
  blocks = [e for e in equations(jaxpr) if e.params.get("name") == "block"]
  assert len(blocks) == 12
  assert len({id(e.params["jaxpr"]) for e in blocks}) == 1
  assert (
    relative_difference(lora.apply(params, trainable, X), fn(lora.merge(params, trainable), X))
    < 1e-5
  )


def test_custom_derivatives_of_the_model_survive():
  @jax.custom_vjp
  def tripled(x):
    return x

  tripled.defvjp(lambda x: (x, None), lambda _, g: (3 * g,))

  @jax.custom_jvp
  def doubled(x):
    return x

  doubled.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))

  def plain(params, x):
    return x @ params["w"]

  params = {"w": jnp.ones((8, 8))}
  lora, trainable = adapt(lambda p, x: tripled(doubled(plain(p, x))), params, X)
  reference, _ = adapt(plain, params, X)
  grad = jax.grad(lambda t: lora.apply(params, t, X).sum())(trainable)
  expected = jax.grad(lambda t: 6 * reference.apply(params, t, X).sum())(trainable)
  assert relative_difference(grad, expected) < 1e-6


def test_remat_policies_and_prevent_cse_survive():
  policy = jax.checkpoint_policies.dots_saveable

  def fn(params, x):
    body = jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=policy, prevent_cse=False)
    return body(params["w"], x)

  params = {"w": jnp.ones((8, 8))}
  lora, trainable = adapt(fn, params, X)
  expected = next(e for e in equations(jax.make_jaxpr(fn)(params, X)) if "policy" in e.params)
  adapted_equation = next(
    e for e in equations(jax.make_jaxpr(lora.apply)(params, trainable, X)) if "policy" in e.params
  )
  assert adapted_equation.params["policy"] == expected.params["policy"]
  assert adapted_equation.params["prevent_cse"] == expected.params["prevent_cse"]


def test_the_base_is_never_restacked_in_a_scan():
  def fn(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

  params = {"w": jnp.ones((5, 8, 8))}
  lora, trainable = adapt(fn, params, X)
  jaxpr = jax.make_jaxpr(lora.apply)(params, trainable, X).jaxpr
  scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
  assert any(variable is jaxpr.invars[0] for variable in scan.invars)


def test_an_opaque_quantized_matmul_by_its_rule():
  @jax.custom_vjp
  def int8_dot(x, w):
    scale = jnp.abs(w).max() / 127
    return x @ jnp.round(w / scale) * scale

  int8_dot.defvjp(
    lambda x, w: (int8_dot(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, jnp.zeros_like(kept[1]))
  )

  def rule(call, x, w):
    assert isinstance(w, Factored)
    return call(x, w.base) + w.dot(x, ((1,), (0,)))

  def fn(params, x):
    return int8_dot(x, params["w"])

  w = jax.random.normal(KEY, (8, 8))
  x = jax.random.normal(jax.random.key(1), (3, 8))
  lora, trainable = adapt(fn, {"w": w}, x, opaque={"int8_dot": rule})
  a, b = trainable["w"].lora_a, trainable["w"].lora_b
  expected = int8_dot(x, w) + 2.0 * x @ a @ b
  assert relative_difference(lora.apply({"w": w}, trainable, x), expected) < 1e-6
  grads = jax.grad(lambda t: lora.apply({"w": w}, t, x).sum())(trainable)
  assert relative_difference(grads["w"].lora_b, 2.0 * (x @ a).T @ jnp.ones((3, 8))) < 1e-5


def test_a_loop_in_a_condition_uses_the_weight():
  def fn(params, x):
    def cond(state):
      return (jnp.abs(state[1] @ params["w"]).max() < 50.0) & (state[0] < 9)

    return lax.while_loop(cond, lambda s: (s[0] + 1, s[1] @ params["w"]), (0, x))[1]

  params = {"w": 1.5 * jnp.eye(8)}
  lora, trainable = adapt(fn, params, X)
  expected = fn(lora.merge(params, trainable), X)
  assert relative_difference(lora.apply(params, trainable, X), expected) < 1e-5


def test_weights_returned_by_control_flow_are_the_weights_themselves():
  def fn(params, x):
    w = params["w"]
    w, x = jax.jit(lambda w, x: (w, x + 1))(w, x)
    w, x = lax.cond(x[0, 0] > 0, lambda w, x: (w, 2 * x), lambda w, x: (w, x), w, x)
    w, x = jax.checkpoint(lambda w, x: (w, jnp.tanh(x)))(w, x)
    stack = jnp.broadcast_to(w, (2, 8, 8))
    x, stack = lax.scan(lambda x, w: (x @ w, w), x, stack)
    return x @ stack[0]

  params = {"w": jnp.eye(8)}
  lora, trainable = adapt(fn, params, X)
  expected = fn(lora.merge(params, trainable), X)
  assert relative_difference(lora.apply(params, trainable, X), expected) < 1e-5


def test_branches_that_return_different_weights_are_refused():
  def fn(params, x):
    w = lax.cond(x[0, 0] > 0, lambda a, b: a, lambda a, b: b, params["a_w"], params["b_w"])
    return x @ w

  params = {"a_w": jnp.eye(8), "b_w": jnp.eye(8)}
  with pytest.raises(
    lj.UnsupportedOperation, match=r"'cond'.*its branches return different weights"
  ):
    adapt(fn, params, X)


def test_closed_over_tracers_and_outer_transformations():
  params, ids = make_params(), tokens()
  config = {"target": r"h_\d/attn/value/kernel"}

  @jax.jit
  def outer(shift, params, trainable):
    def fn(params, ids):
      return unrolled(params, ids) + shift  # a tracer of the outer function

    lora = lj.lora(fn, lj.LoraConfig(rank=2, alpha=4.0, **config))
    return lora.apply(params, trainable, ids)

  lora, trainable = adapt(unrolled, params, ids, **config)
  expected = lora.apply(params, trainable, ids) + 2.0
  assert relative_difference(outer(2.0, params, trainable), expected) < 1e-6
