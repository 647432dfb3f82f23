"""`on_unhandled="materialize"`, the remedy that errors name: equal to the merged model, always."""

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
from tests.layer_kinds import kernel_dot, normal
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
W, X = normal(4, 4, seed=1), normal(3, 4, seed=2)
STACK = normal(3, 4, 4, seed=3)
ALLOWED = "on_unhandled='materialize'"


class Use(NamedTuple):
  """A use of the weights `p` on the input `x` that no rule can push through A and B."""

  call: Callable[[Any, Any], Any]
  params: Any = {"w": W}  # noqa: RUF012


def noisy(w):
  return w + 0.1 * jnp.eye(4)


@jax.custom_jvp
def doubled(w):
  return 2 * w


doubled.defjvp(lambda primals, tangents: (2 * primals[0], 2 * tangents[0]))


def in_shards(p, x):
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = {"in_specs": (P(None, "tensor"), P("tensor", None)), "out_specs": P()}
  local = lambda x, w: lax.psum(x @ jnp.abs(w), "tensor")  # noqa: E731
  return jax.shard_map(local, mesh=mesh, **specs)(x, p["w"])


TWO = {"a": W, "b": 2 * W}
USES = {
  "elementwise": Use(lambda p, x: x @ jnp.abs(p["w"])),
  "masked": Use(lambda p, x: x @ jnp.tril(p["w"])),
  "added": Use(lambda p, x: x @ noisy(p["w"])),
  "normalized": Use(lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))),
  "sorted": Use(lambda p, x: x @ jnp.sort(p["w"], axis=0)),
  "repeated": Use(lambda p, x: jnp.repeat(x, 2, axis=1) @ jnp.repeat(p["w"], 2, axis=0)),
  "tiled": Use(lambda p, x: x @ jnp.tile(p["w"], (1, 2))),
  "flattened": Use(lambda p, x: x * p["w"].reshape(-1)[3:7][None]),
  "transposed, then masked": Use(lambda p, x: x @ jnp.triu(p["w"].T)),
  "a penalty, in addition to its layer": Use(lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2)),
  "fully contracted": Use(lambda p, x: jnp.einsum("bi,ij->b", x, p["w"])),
  "multiplied by itself": Use(lambda p, x: x @ (p["w"] @ p["w"])),
  "two weights multiplied": Use(lambda p, x: x @ (p["a"] * p["b"]), TWO),
  "divided by": Use(lambda p, x: x[:1] / (3 + p["w"])),
  "sliced and added": Use(lambda p, x: x + p["w"][:3]),
  "returned": Use(lambda p, x: p["w"]),
  "returned with its use": Use(lambda p, x: (x @ p["w"], p["w"].T)),
  "a linear system": Use(lambda p, x: jnp.linalg.solve(p["w"] + 5 * jnp.eye(4), x.T)),
  "the input of a convolution": Use(
    lambda p, x: lax.conv_general_dilated(p["w"][None], x[:, :, None], (1,), "SAME")
  ),
  "in a scan": Use(
    lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ noisy(w)), None), x, p["w"])[0], {"w": STACK}
  ),
  "stacked by a scan": Use(
    lambda p, x: lax.scan(lambda x, w: (x @ w, w.T), x, p["w"])[1], {"w": STACK}
  ),
  "changed by a loop": Use(
    lambda p, x: x @ lax.fori_loop(0, 2, lambda i, w: w * 0.5 + 0.1, p["w"])
  ),
  "in a branch": Use(lambda p, x: lax.cond(x[0, 0] > 9, jnp.tanh, lambda w: w + 1, p["w"]) @ x.T),
  "chosen by a branch": Use(
    lambda p, x: x @ lax.cond(x[0, 0] > 9, lambda a, b: a, lambda a, b: b, p["a"], p["b"]), TWO
  ),
  "chosen by platform": Use(
    lambda p, x: lax.platform_dependent(p["w"], cpu=lambda w: x @ w, default=lambda w: 2 * x @ w)
  ),
  "chosen under vmap": Use(
    lambda p, x: jax.vmap(lambda r: lax.cond(r[0] > 0, lambda w: r @ w, lambda w: r, p["w"]))(x)
  ),
  "mapped over examples": Use(lambda p, x: jax.vmap(lambda row: row @ noisy(p["w"]))(x)),
  "in jit and checkpoint": Use(
    lambda p, x: jax.checkpoint(jax.jit(lambda w, x: x @ noisy(w)))(p["w"], x)
  ),
  "in a custom_vjp": Use(lambda p, x: kernel_dot(x, p["w"])),
  "in a custom_jvp": Use(lambda p, x: x @ doubled(p["w"])),
  "in grad": Use(lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ noisy(p["w"]))))(x)),
  "in shard_map": Use(in_shards),
}
QUICK = (
  "masked",
  "transposed, then masked",
  "flattened",
  "a penalty, in addition to its layer",
  "two weights multiplied",
  "returned with its use",
  "in a scan",
  "stacked by a scan",
  "changed by a loop",
  "chosen by a branch",
  "chosen under vmap",
  "in a custom_vjp",
  "in shard_map",
)
ALL = [
  pytest.param(name, marks=() if name in QUICK else pytest.mark.long, id=name) for name in USES
]


def adapted(use: Use, on_unhandled: Any = "materialize", axes=None, **options):
  rules = [lj.LoraRule(".*", on_unhandled=on_unhandled, axes=axes)]
  return lj.lora(use.call, lj.LoraConfig(2, 4.0, ".*", rules=rules, **options))


def start(lora, params):
  """Returns the trainable tree at step 0, without the warning that a weight is materialized."""
  with warnings.catch_warnings(action="ignore"):
    return lora.init(KEY, params, X)


def summed(out):
  """Returns a number that depends on every element of every output."""
  leaves = jax.tree.leaves(out)
  return sum(jnp.vdot(jnp.sin(leaf), normal(*leaf.shape, seed=5)) for leaf in leaves)


def assert_equals_the_merged_model(lora, use: Use, tolerance=1e-5):
  trainable = randomized(start(lora, use.params))
  factored = lambda t: summed(lora.apply(use.params, t, X))  # noqa: E731
  merged = lambda t: summed(use.call(lora.merge(use.params, t), X))  # noqa: E731
  both = jax.jit(lambda t: [jax.value_and_grad(fn)(t) for fn in (factored, merged)])
  (out, grads), (expected, expected_grads) = both(trainable)
  np.testing.assert_allclose(out, expected, rtol=tolerance)
  assert relative_difference(grads, expected_grads) < tolerance


@pytest.mark.parametrize("name", ALL)
def test_the_remedy_of_a_refused_use_works(name):
  use = USES[name]
  with pytest.raises(lj.UnsupportedOperation, match=re.escape(ALLOWED)):
    adapted(use, "raise").init(KEY, use.params, X)
  assert_equals_the_merged_model(adapted(use), use)


def test_the_axes_of_a_matrix_are_those_of_its_view():
  """The first is the input, the last the output; another use of the weight tells more."""
  expected = {
    "masked": lj.LoraAxes((), (0,), (1,)),
    "transposed, then masked": lj.LoraAxes((), (1,), (0,)),
    "in a scan": lj.LoraAxes((0,), (1,), (2,)),
  }
  for name, axes in expected.items():
    assert start(adapted(USES[name]), USES[name].params)["w"].axes == axes, name
  both = Use(lambda p, x: x @ p["w"].T + jnp.sum(p["w"] ** 2))
  assert start(adapted(both), both.params)["w"].axes == lj.LoraAxes((), (1,), (0,))


@pytest.mark.parametrize(
  ("call", "axes"),
  [
    (lambda p, x: jax.vmap(lambda w: x @ noisy(w))(p["w"]), ((0,), (1,), (2,))),
    (
      lambda p, x: lax.conv_general_dilated(
        x[:2, :, None], p["w"], (1,), "SAME", batch_group_count=2
      ),
      ((), (1, 2), (0,)),
    ),
  ],
)
def test_the_axes_of_more_than_a_matrix_are_asked_for_by_name(call, axes):
  use = Use(call, {"w": STACK[:2]})
  with pytest.raises(
    ValueError, match=r"w is only used where.*axes=LoraAxes\(batch, inputs, outpu"
  ):
    start(adapted(use), use.params)
  assert_equals_the_merged_model(adapted(use, axes=lj.LoraAxes(*axes)), use)


@pytest.mark.parametrize(
  "options",
  [{"variant": lj.DORA}, {"variant": toys.GAIN_IN}, {"stacked_layers": (0, 2)}],
  ids=["DoRA", "gain", "some layers"],
)
def test_variants_and_layers_are_materialized_too(options):
  use = USES["in a scan"]
  assert_equals_the_merged_model(adapted(use, **options), use)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.bfloat16, jnp.float16])
def test_a_narrow_weight_is_rounded_once_as_by_merge(dtype):
  use = Use(lambda p, x: jnp.tril(p["w"]), {"w": W.astype(dtype)})
  lora = adapted(use)
  trainable = randomized(start(lora, use.params))
  out = lora.apply(use.params, trainable, X)
  np.testing.assert_array_equal(out, jnp.tril(lora.merge(use.params, trainable)["w"]))


def test_a_sharded_weight_is_materialized_where_it_is():
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))
  with jax.set_mesh(mesh):
    params = {"w": jax.device_put(W, P(None, "tensor"))}
    use = Use(lambda p, x: jnp.abs(p["w"]), params)
    lora = adapted(use)
    trainable = randomized(start(lora, params))
    out = lora.apply(params, trainable, X)
    assert out.sharding.spec == P(None, "tensor")
    np.testing.assert_allclose(out, jnp.abs(lora.merge(params, trainable)["w"]), rtol=1e-6)


def test_dropout_is_refused_by_init():
  """It acts on a layer's input; a materialized weight has none."""
  use = USES["masked"]
  with pytest.raises(ValueError, match=r"w: LoRA dropout.*Give LoraRule\(pattern, dropout=0\.0"):
    start(adapted(use, dropout=0.1), use.params)
  lora = adapted(use)
  trainable = start(lora, use.params)
  with pytest.raises(ValueError, match="w: LoRA dropout acts on the input of a layer"):
    lora.apply(use.params, trainable, X, lora_key=KEY, dropout_rate=0.1)
