"""Every remedy that an error of the transform names works: refused before, equal to merge after."""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj

from tests import toy_variants as toys
from tests.layer_kinds import dot_rule, kernel_dot, normal
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
X = normal(3, 4, seed=2)
PARAMS = {"w": normal(4, 4, seed=1), "v": normal(4, 4, seed=3), "cube": normal(4, 4, 4, seed=4)}
MATERIALIZE = lj.LoraRule("w", on_unhandled="materialize")


class Remedy(NamedTuple):
  """A call that is refused, and the remedy that the message names.

  Attributes:
    words: of the message.
    fn: the function.
    options: of the config, and `opaque`.
    change: the options that are different.
    fixed: the function after the remedy, if the remedy changes the function.
  """

  words: str
  fn: Callable[[Any, Any], Any]
  options: dict[str, Any] = {}  # noqa: RUF012
  change: dict[str, Any] = {}  # noqa: RUF012
  fixed: Callable[[Any, Any], Any] | None = None


def nonlinear(p, x):
  return x @ p["v"] @ jnp.abs(p["w"])


def conflicting(p, x):
  first = jnp.einsum("bi,ijk->bjk", x, p["cube"]).sum()
  return first + jnp.einsum("bj,ijk->bik", x, p["cube"]).sum() + x @ p["v"]


def opaque(p, x):
  return jnp.tanh(kernel_dot(x, p["w"]))


def by_hand(call, x, w):
  return call(x, w.base) + w.dot(x, ((1,), (0,)))


def in_shards(p, x):
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = {"in_specs": (P(None, "tensor"), P("tensor", None)), "out_specs": P()}
  local = lambda x, w: lax.psum(x @ w, "tensor")  # noqa: E731
  return jax.shard_map(local, mesh=mesh, **specs)(x, p["w"])


def named(name, fn):
  """Returns a matmul that cannot be looked into and is traced under this name."""
  fn.__name__ = name
  kernel = jax.custom_vjp(fn)
  kernel.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
  return kernel


FIRST = named("matmul", lambda x, w: x @ w)
SECOND = named("matmul", lambda x, w: jnp.dot(x, w))
RENAMED = named("another", lambda x, w: jnp.dot(x, w))
CUBE_AXES = lj.LoraAxes((), (0,), (1, 2))
REMEDIES = {
  "leave it out": Remedy(
    "Leave it out of `target`", nonlinear, {"target": "[wv]"}, {"target": "v"}
  ),
  "materialize": Remedy(
    "give LoraRule(pattern, on_unhandled='materialize')", nonlinear, {}, {"rules": [MATERIALIZE]}
  ),
  "materialize what is returned": Remedy(
    "give LoraRule(pattern, on_unhandled='materialize')",
    lambda p, x: p["w"],
    {},
    {"rules": [MATERIALIZE]},
  ),
  "leave out a conflict": Remedy(
    "Leave it out of `target`", conflicting, {"target": "cube|v"}, {"target": "v"}
  ),
  "choose the axes": Remedy(
    "LoraRule(pattern, axes=LoraAxes(batch, inputs, outputs))",
    conflicting,
    {"target": "cube"},
    {"rules": [lj.LoraRule("cube", axes=CUBE_AXES)]},
  ),
  "axes of what is materialized": Remedy(
    "Give LoraRule(pattern, on_unhandled='materialize', axes=LoraAxes(batch, inputs, outputs))",
    lambda p, x: jnp.einsum("bi,ijk->bk", x, jnp.abs(p["cube"])),
    {"target": "cube", "rules": [lj.LoraRule(".*", on_unhandled="materialize")]},
    {"rules": [lj.LoraRule("cube", on_unhandled="materialize", axes=CUBE_AXES)]},
  ),
  "a rule for an opaque function": Remedy(
    "or opaque={'kernel_dot': rule}", opaque, {}, {"opaque": {"kernel_dot": dot_rule}}
  ),
  "materialize for an opaque function": Remedy(
    "on_unhandled='materialize'", opaque, {}, {"rules": [MATERIALIZE]}
  ),
  "the whole output of an opaque function": Remedy(
    "Use w.dot(x, contracting, base=lambda x: ...)",
    opaque,
    {"opaque": {"kernel_dot": by_hand}, "variant": toys.GAIN_OUT},
    {"opaque": {"kernel_dot": dot_rule}},
  ),
  "rename one": Remedy(
    "two functions are traced under the name 'matmul'",
    lambda p, x: FIRST(x, p["w"]) + SECOND(x, p["v"]),
    {"target": "[wv]", "opaque": {"matmul": dot_rule, "another": dot_rule}},
    fixed=lambda p, x: FIRST(x, p["w"]) + RENAMED(x, p["v"]),
  ),
  "no dropout where it is materialized": Remedy(
    "Give LoraRule(pattern, dropout=0.0)",
    nonlinear,
    {"target": "[wv]", "dropout": 0.5, "rules": [MATERIALIZE]},
    {"rules": [lj.LoraRule("w", dropout=0.0, on_unhandled="materialize")]},
  ),
  "no dropout in shard_map": Remedy(
    "Give LoraRule(pattern, dropout=0.0)",
    in_shards,
    {"dropout": 0.5},
    {"rules": [lj.LoraRule("w", dropout=0.0)]},
  ),
  "narrow the target": Remedy(
    "Narrow `target`", lambda p, x: x @ p["w"], {"target": "[wv]"}, {"target": "w"}
  ),
  "trace a call that uses them": Remedy(
    "or trace a call that uses them",
    lambda p, x: x @ p["w"],
    {"target": "[wv]"},
    fixed=lambda p, x: x @ p["w"] @ p["v"],
  ),
  "narrow a target of integers": Remedy(
    "narrow `target`", lambda p, x: x @ p["w"], {"target": "w|order"}, {"target": "w"}
  ),
}


def adapted(fn, options):
  options = {"rank": 2, "alpha": 4.0, "target": "w"} | options
  return lj.lora(
    fn, lj.LoraConfig(**{k: v for k, v in options.items() if k != "opaque"}), options.get("opaque")
  )


@pytest.mark.parametrize("name", REMEDIES)
def test_the_named_remedy_works(name):
  remedy = REMEDIES[name]
  params = PARAMS | {"order": np.ones((4, 4), np.complex64)}
  with warnings.catch_warnings(action="ignore"):  # that a weight is materialized
    with pytest.raises((ValueError, lj.UnsupportedOperation), match=re.escape(remedy.words)):
      adapted(remedy.fn, remedy.options).init(KEY, params, X)
    fn = remedy.fixed or remedy.fn
    lora = adapted(fn, remedy.options | remedy.change)
    trainable = randomized(lora.init(KEY, params, X))

  @jax.jit
  def both(trainable):
    out = lora.apply(params, trainable, X, lora_key=None)
    return out, fn(lora.merge(params, trainable), X), fn(params, X)

  out, expected, base = both(trainable)
  assert relative_difference(out, expected) < 1e-5
  assert relative_difference(out, base) > 1e-3
