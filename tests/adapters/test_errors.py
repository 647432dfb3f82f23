"""Every mistake has its message: the expected value, the actual one, and the fix."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.adapters.delta import LoraWeight
from lora_jax.axes import LoraAxes

from tests.layer_kinds import kernel_dot
from tests.toy_models import make_params, tokens, unrolled
from tests.toy_variants import GAIN_OUT

KEY = jax.random.key(0)
X = jnp.ones((3, 8))


def init(fn, params, *args, **options):
  options = {"rank": 2, "alpha": 4.0, "target": ".*"} | options
  opaque = options.pop("opaque", None)
  return lj.lora(fn, lj.LoraConfig(**options), opaque).init(KEY, params, *args)


def square(params, x):
  return x @ params["kernel"]


SQUARE = {"kernel": jnp.ones((8, 6))}


# ---- the configuration -----------------------------------------------------------------


def test_an_unknown_field_is_refused():
  with pytest.raises(TypeError, match="aplha"):
    lj.LoraConfig(rank=2, aplha=4.0, target=".*")


# ---- the weights -----------------------------------------------------------------------


def test_no_match_lists_similar_names():
  message = (
    r"target 'h_0/attn/querry/kernel' matches none of the 22 leaves \(patterns must match whole "
    r"paths\); did you mean h_0/attn/query/kernel"
  )
  with pytest.raises(ValueError, match=message):
    init(unrolled, make_params(), tokens(), target="h_0/attn/querry/kernel")


@pytest.mark.parametrize("setting", ["rules", "extra"])
def test_a_rule_or_an_extra_that_matches_nothing(setting):
  value = (lj.LoraRule("kernle", rank=1),) if setting == "rules" else "kernle"
  with pytest.raises(ValueError, match=r"'kernle' matches none.*did you mean kernel"):
    init(square, SQUARE, X, **{setting: value})


def test_a_leaf_both_adapted_and_fully_trained():
  with pytest.raises(ValueError, match="both target and extra match kernel"):
    init(square, SQUARE, X, extra="kernel")


def test_rank_too_large():
  message = (
    r"kernel: rank 7 is larger than the smaller dimension of the weight, 8 inputs by 6 outputs"
  )
  with pytest.raises(ValueError, match=message):
    init(square, SQUARE, X, rank=7)


def test_a_vector_or_an_integer_weight():
  with pytest.raises(ValueError, match=r"bias cannot be adapted.*float32 of shape \(6,\)"):
    init(lambda p, x: x + p["bias"], {"bias": jnp.ones(6)}, X)
  with pytest.raises(ValueError, match=r"kernel cannot be adapted.*got int8 of shape \(8, 6\)"):
    init(square, {"kernel": jnp.ones((8, 6), jnp.int8)}, X)


def test_unused_weight():
  params = SQUARE | {"other": jnp.ones((8, 6))}
  with pytest.raises(ValueError, match="never used by the function: other"):
    init(square, params, X)


def test_conflicting_uses():
  def fn(params, x):
    return (
      jnp.einsum("bi,ijk->bjk", x, params["w"]).sum()
      + jnp.einsum("bj,ijk->bik", x[:, :6], params["w"]).sum()
    )

  message = (
    r"conflicting uses of w: first one contracts axes \(0,\) into \(1, 2\), later one contracts "
    r"axes \(1,\) into \(0, 2\)"
  )
  with pytest.raises(ValueError, match=message):
    init(fn, {"w": jnp.ones((8, 6, 4))}, X)


def test_two_leaves_of_one_path():
  with pytest.raises(ValueError, match="two leaves of params have the path 'a/b'"):
    init(square, {"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))}, X)


def stacked(params, x):
  return lax.scan(lambda x, w: (x @ w, None), x, params["stack_0"])[0]


def test_layers_that_do_not_exist():
  with pytest.raises(ValueError, match=r"layers=\[0\] needs a layer's number in the path"):
    init(square, SQUARE, X, layers=[0])
  with pytest.raises(
    ValueError, match=r"layers=\[7\]: no targeted weight is in layer 7; they are in 0 to 2"
  ):
    init(unrolled, make_params(), tokens(), target="h_.*kernel", layers=[7])
  with pytest.raises(ValueError, match=r"stacked_layers=\[0\] needs a stacked axis"):
    init(square, SQUARE, X, stacked_layers=[0])
  stack = {"stack_0": jnp.ones((3, 8, 8))}
  with pytest.raises(ValueError, match=r"stacked_layers=\[2, 3\], but it stacks 3 layers"):
    init(stacked, stack, X, stacked_layers=[2, 3])
  with pytest.raises(ValueError, match=r"the weight is itself a stack.*Give stacked_layers="):
    init(stacked, stack, X, layers=[0])  # a name that Flax numbered, not a layer's number


def test_params_that_are_not_a_tree():
  with pytest.raises(ValueError, match="params are a single array; expected a tree"):
    init(lambda w, x: x @ w, jnp.ones((8, 8)), X)


def test_axes_that_do_not_fit():
  rule = lj.LoraRule("kernel", axes=LoraAxes((), (0,), ()))
  with pytest.raises(ValueError, match="each of the 2 axes of the weight one role"):
    init(square, SQUARE, X, rules=(rule,))


# ---- the trainable tree ----------------------------------------------------------------


def test_a_trainable_tree_from_another_model_lists_everything():
  params, ids = make_params(), tokens()
  config = lj.LoraConfig(rank=2, alpha=4.0, target="h_./attn/(query|value)/kernel", extra=".*bias")
  lora = lj.lora(unrolled, config)
  trainable = lora.init(KEY, params, ids)
  query = trainable["h_0"]["attn"].pop("query")
  trainable["h_9"] = {"attn": {"query": query}}
  axes = LoraAxes((), (0,), (1,))
  wrong = LoraWeight(jnp.ones((24, 2)), jnp.ones((3, 24)), axes)
  trainable["h_1"]["attn"]["value"]["kernel"] = wrong
  trainable["h_1"]["mlp"]["up"]["bias"] = jnp.ones(5)
  del trainable["h_2"]["mlp"]
  expected = [
    "the trainable tree is not for these params and this config:",
    "missing: h_0/attn/query/kernel",
    "missing: h_2/mlp/up/bias",
    "unexpected: h_9/attn/query/kernel",
    r"mis-shaped: h_1/attn/value/kernel/lora_b is \(3, 24\), expected \(2, 24\)",
    r"mis-shaped: h_1/mlp/up/bias is \(5,\), expected \(96,\)",
  ]
  for function in (
    lambda: lora.apply(params, trainable, ids),
    lambda: lora.merge(params, trainable),
  ):
    with pytest.raises(ValueError, match="\n  ".join(expected)):
      function()


def test_dropout_without_a_key():
  lora = lj.lora(square, lj.LoraConfig(rank=2, alpha=4.0, target="kernel", dropout=0.1))
  trainable = lora.init(KEY, SQUARE, X)
  with pytest.raises(ValueError, match="needs lora_key: a key to train, None to evaluate"):
    lora.apply(SQUARE, trainable, X)
  lora.apply(SQUARE, trainable, X, lora_key=None)
  lora.apply(SQUARE, trainable, X, dropout_rate=0.0)
  plain = lj.lora(square, lj.LoraConfig(rank=2, alpha=4.0, target="kernel"))
  with pytest.raises(ValueError, match="needs lora_key"):
    plain.apply(SQUARE, trainable, X, dropout_rate=jnp.float32(0.5))


@pytest.mark.parametrize("variant", [GAIN_OUT, lj.HIRA], ids=["gain", "HiRA"])
def test_dropout_of_a_variant_without_a_low_rank_branch(variant):
  message = rf"kernel: LoRA dropout \(.*\) acts on the input .*, and {variant.name} has none .*=0.0"
  with pytest.raises(ValueError, match=message.replace(".*", "0.1", 1)):
    init(square, SQUARE, X, dropout=0.1, variant=variant)
  rules = [lj.LoraRule("kernel", dropout=0.0)]
  config = lj.LoraConfig(2, 4.0, "kernel", dropout=0.1, rules=rules, variant=variant)
  lora = lj.lora(square, config)
  trainable = lora.init(KEY, SQUARE, X)
  lora.apply(SQUARE, trainable, X, lora_key=None, dropout_rate=0.5)  # evaluates
  for rate in (0.5, {"kernel": 0.5}, jnp.float32(0.5)):
    with pytest.raises(ValueError, match=message):
      jax.jit(lora.apply)(SQUARE, trainable, X, lora_key=KEY, dropout_rate=rate)


def test_an_extra_needs_a_real_array():
  shapes = {"kernel": jax.ShapeDtypeStruct((8, 6), "float32")} | {
    "b": jax.ShapeDtypeStruct((6,), "float32")
  }
  with pytest.raises(ValueError, match="extra b is copied by init and needs a real array"):
    init(lambda p, x: square(p, x) + p["b"][None], shapes, X, target="kernel", extra="b")


# ---- operations that cannot be applied to the factors ----------------------------------


def scan_carry(w, x):
  return lax.scan(lambda w, _: (2 * w, None), w, None, length=2)[0]


REFUSALS = [
  ("abs", lambda w, x: x @ jnp.abs(w)),
  ("exp", lambda w, x: x @ jnp.exp(w)),
  ("add", lambda w, x: x @ (w + 1.0)),
  ("reduce_sum", lambda w, x: x + w.sum()),
  ("mul", lambda w, x: x @ (w * jnp.arange(64.0).reshape(8, 8))),
  ("mul", lambda w, x: x @ (w * w)),
  ("div", lambda w, x: x @ (1 / w)),
  ("dot_general", lambda w, x: x @ (w @ w)),
  ("dot_general", lambda w, x: jnp.tile(x, (1, 2)) @ w.reshape(16, 4)),
  ("dot_general", lambda w, x: jnp.einsum("ab,ab->", jnp.ones_like(w), w) + x),
  ("select_n", lambda w, x: x @ jnp.where(x[0, 0] > 0, w, 0.0)),
  ("gt", lambda w, x: x * (w > 0).any()),
  ("sort", lambda w, x: x @ jnp.sort(w, axis=0)),
  ("convert_element_type", lambda w, x: x @ w.astype(jnp.int8).astype(jnp.float32)),
  ("custom_vjp_call", lambda w, x: kernel_dot(x, w)),
  ("scan", lambda w, x: x @ scan_carry(w, x)),
  ("dynamic_update_slice", lambda w, x: x @ lax.dynamic_update_slice(w, x[:1, :1], (0, 0))),
]


@pytest.mark.parametrize(("primitive", "fn"), REFUSALS)
def test_refusals_name_path_primitive_and_source_line(primitive, fn):
  here = re.escape(__file__)
  message = rf"cannot adapt layer/w: '{primitive}' is applied to it at {here}:\d+"
  with pytest.raises(lj.UnsupportedOperation, match=message) as caught:
    init(lambda p, x: fn(p["layer"]["w"], x), {"layer": {"w": jnp.ones((8, 8))}}, X)
  assert "Leave it out of `target`, or give LoraRule(" in str(caught.value)


def test_an_opaque_function_is_named():
  with pytest.raises(lj.UnsupportedOperation, match=r"opaque=\{'kernel_dot': rule\}"):
    init(lambda p, x: kernel_dot(x, p["w"]), {"w": jnp.ones((8, 8))}, X)


def test_a_weight_that_the_function_returns():
  with pytest.raises(lj.UnsupportedOperation, match=r"cannot adapt w.*returned by the function"):
    init(lambda p, x: (x @ p["w"], p["w"]), {"w": jnp.ones((8, 8))}, X)


def test_materialize_is_the_way_out_and_says_so_once():
  def fn(params, x):
    return x @ jnp.abs(params["w"]) + x @ jnp.abs(params["w"]) @ params["w"]

  params = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8)}
  rules = (lj.LoraRule("w", on_unhandled="materialize"),)
  lora = lj.lora(fn, lj.LoraConfig(rank=2, alpha=4.0, target="w", rules=rules))
  with pytest.warns(
    UserWarning, match=r"w: W \+ scaling \* AB is materialized for 'abs'"
  ) as caught:
    trainable = lora.init(KEY, params, X)
  assert len(caught) == 1
  trainable = jax.tree.map(lambda a: a + 0.1, trainable)
  got = lora.apply(params, trainable, X)
  np.testing.assert_allclose(got, fn(lora.merge(params, trainable), X), rtol=1e-5)


def test_two_opaque_functions_of_one_name():
  def make(factor):
    @jax.custom_vjp
    def twin(x, w):
      return factor * x @ w

    twin.defvjp(lambda x, w: (twin(x, w), None), lambda kept, g: (g, g))
    return twin

  def other():
    @jax.custom_vjp
    def twin(x, w):
      return x @ w

    twin.defvjp(lambda x, w: (twin(x, w), None), lambda kept, g: (g, g))
    return twin

  first, second = make(1.0), other()
  with pytest.raises(ValueError, match="two functions are traced under the name 'twin'"):
    init(
      lambda p, x: first(x, p["w"]) + second(x, p["w"]),
      {"w": jnp.ones((8, 8))},
      X,
      opaque={"twin": lambda call, x, w: call(x, w.base)},
    )


def test_dropout_inside_shard_map():
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec

  def fn(params, x):
    local = lambda x, w: lax.psum(x @ w, "tensor")  # noqa: E731
    specs = {"in_specs": (spec(None, "tensor"), spec("tensor")), "out_specs": spec()}
    return jax.shard_map(local, mesh=mesh, **specs)(x, params["w"])

  params = {"w": jnp.ones((8, 8))}
  lora = lj.lora(fn, lj.LoraConfig(rank=2, alpha=4.0, target="w", dropout=0.5))
  with pytest.raises(ValueError, match=r"w: LoRA dropout inside shard_map.*dropout=0\.0"):
    lora.init(KEY, params, X)
