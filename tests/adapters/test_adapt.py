"""The semantics of lora(): scaling, inits, rules, layers, extras, dropout, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import LoraWeight
from lora_jax.axes import LoraAxes

from tests.toy_models import (
  LAYERS,
  make_params,
  randomized,
  relative_difference,
  scanned,
  tokens,
  unrolled,
)

KEY = jax.random.key(0)
QV = r"h_\d/attn/(query|value)/kernel"
CONFIG = lj.LoraConfig(rank=4, alpha=32.0, target=QV)


def dense(params, x):
  return x @ params["kernel"]


def dense_case(d_in=12, d_out=10, **options):
  params = {
    "kernel": jnp.asarray(np.random.default_rng(0).standard_normal((d_in, d_out)), jnp.float32)
  }
  options = {"rank": 2, "alpha": 6.0, "target": "kernel"} | options
  lora = lj.lora(dense, lj.LoraConfig(**options))
  x = jnp.asarray(np.random.default_rng(1).standard_normal((5, d_in)), jnp.float32)
  return lora, params, randomized(lora.init(KEY, params, x)), x


# ---- the trainable tree ----------------------------------------------------------------


def test_trainable_tree_mirrors_params_and_holds_only_a_and_b():
  params = make_params()
  trainable = lj.lora(unrolled, CONFIG).init(KEY, params, tokens())
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), trainable)
  axes = LoraAxes(batch=(), inputs=(0,), outputs=(1,))
  weight = LoraWeight(((24, 4), "float32"), ((4, 24), "float32"), axes)
  attn = {"attn": {"query": {"kernel": weight}, "value": {"kernel": weight}}}
  assert shapes == {"h_0": attn, "h_1": attn, "h_2": attn}


def test_stacked_layers_are_one_leaf_with_a_layer_axis():
  config = lj.LoraConfig(rank=4, alpha=32.0, target=r"blocks/attn/query/kernel")
  trainable = lj.lora(scanned, config).init(KEY, make_params(stacked=True), tokens())
  weight = trainable["blocks"]["attn"]["query"]["kernel"]
  assert weight.lora_a.shape == (LAYERS, 24, 4)
  assert weight.lora_b.shape == (LAYERS, 4, 24)
  assert weight.axes == LoraAxes(batch=(0,), inputs=(1,), outputs=(2,))


def test_init_takes_shapes_in_place_of_arrays():
  params, ids = make_params(), tokens()
  lora = lj.lora(unrolled, CONFIG)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, ids))
  jax.tree.map(np.testing.assert_array_equal, lora.init(KEY, *shapes), lora.init(KEY, params, ids))


def test_init_does_not_depend_on_the_other_targets():
  params, ids = make_params(), tokens()
  single = lj.LoraConfig(rank=4, alpha=32.0, target="h_1/attn/value/kernel")
  several = lj.lora(unrolled, CONFIG).init(KEY, params, ids)["h_1"]["attn"]["value"]
  alone = lj.lora(unrolled, single).init(KEY, params, ids)["h_1"]["attn"]["value"]
  np.testing.assert_array_equal(several["kernel"].lora_a, alone["kernel"].lora_a)


def test_init_and_apply_under_jit_and_eval_shape():
  params, ids = make_params(), tokens()
  lora = lj.lora(unrolled, CONFIG)
  trainable = jax.jit(lora.init)(KEY, params, ids)
  jax.tree.map(np.testing.assert_array_equal, trainable, lora.init(KEY, params, ids))
  shapes = jax.eval_shape(lora.init, KEY, params, ids)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, trainable)


# ---- scaling ---------------------------------------------------------------------------


def test_scaling_is_alpha_over_rank():
  lora, params, trainable, x = dense_case(rank=2, alpha=6.0)
  w = trainable["kernel"]
  expected = x @ params["kernel"] + 3.0 * (x @ w.lora_a @ w.lora_b)
  assert relative_difference(lora.apply(params, trainable, x), expected) < 1e-6


def test_changing_alpha_does_not_recompile():
  lora, params, trainable, x = dense_case(rank=2, alpha=6.0)
  compiled = jax.jit(lambda t, scaling: lora.apply(params, t, x, scaling=scaling))
  for scaling in (3.0, 1.0, 0.25):
    config = lj.LoraConfig(rank=2, alpha=2 * scaling, target="kernel")
    expected = lj.lora(dense, config).apply(params, trainable, x)
    assert relative_difference(compiled(trainable, scaling), expected) < 1e-6
  assert compiled._cache_size() == 1


def test_scaling_and_dropout_rate_by_path():
  params, ids = make_params(), tokens()
  lora = lj.lora(unrolled, CONFIG)
  trainable = randomized(lora.init(KEY, params, ids))
  path = "h_1/attn/query/kernel"
  apply = jax.jit(lora.apply)
  off = apply(params, trainable, ids, scaling={path: 0.0})
  node = trainable["h_1"]["attn"]["query"]["kernel"]
  trainable["h_1"]["attn"]["query"]["kernel"] = jax.tree.map(jnp.zeros_like, node)
  assert relative_difference(off, apply(params, trainable, ids)) < 1e-6
  with pytest.raises(ValueError, match=r"not adapted\. Did you mean h_1/attn/query/kernel"):
    lora.apply(params, trainable, ids, scaling={"h_1/attn/query/kernl": 0.0})


# ---- merge -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [QV, r"h_\d/.*kernel", r"(h_\d/.*kernel|embed/embedding)"])
def test_merged_and_unmerged_outputs_agree_to_1e5(target):
  params, ids = make_params(), tokens()
  lora = lj.lora(unrolled, lj.LoraConfig(rank=4, alpha=8.0, target=target))
  trainable = randomized(lora.init(KEY, params, ids))
  merged = unrolled(lora.merge(params, trainable), ids)
  assert relative_difference(merged, unrolled(params, ids)) > 1e-2
  assert relative_difference(lora.apply(params, trainable, ids), merged) < 1e-5


def test_merge_computes_in_float32_keeps_the_dtype_and_reports_its_error():
  lora, params, trainable, _ = dense_case()
  low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  merged = lora.merge(low, trainable)["kernel"]
  assert merged.dtype == jnp.bfloat16
  w = trainable["kernel"]
  exact = low["kernel"].astype(jnp.float32) + 3.0 * w.lora_a @ w.lora_b
  np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))
  error = lj.merge_error(lora, low, trainable)["kernel"]
  expected = jnp.abs(merged.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
  assert float(error) == pytest.approx(float(expected), rel=1e-5)
  assert 0 < float(error) < 2**-8
  assert float(lj.merge_error(lora, params, trainable)["kernel"]) == 0


def test_merge_leaves_frozen_leaves_as_they_are():
  params = make_params()
  lora = lj.lora(unrolled, CONFIG)
  merged = lora.merge(params, lora.init(KEY, params, tokens()))
  assert merged["h_0"]["mlp"]["up"]["kernel"] is params["h_0"]["mlp"]["up"]["kernel"]


# ---- initialization --------------------------------------------------------------------


def big_init(init):
  lora, params, _, x = dense_case(400, 300, rank=64, init=init)
  return lora.init(KEY, params, x)["kernel"]


def test_kaiming_uniform_has_pytorchs_bound():
  w = big_init("kaiming_uniform")
  bound = 400**-0.5
  assert float(jnp.abs(w.lora_a).max()) == pytest.approx(bound, rel=1e-3)
  assert float(jnp.abs(w.lora_a).max()) <= bound
  assert float(w.lora_a.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
  assert not w.lora_b.any()


def test_gaussian_and_original_code():
  gaussian, original = big_init("gaussian"), big_init("original_code")
  assert float(gaussian.lora_a.std()) == pytest.approx(0.02, rel=0.02)
  assert not gaussian.lora_b.any()
  assert float(original.lora_a.std()) == pytest.approx(0.02, rel=0.02)
  assert float(original.lora_b.std()) == pytest.approx(0.02, rel=0.02)


def test_embeddings_have_a_zero_and_b_normal():
  params = {"embedding": jnp.ones((300, 200))}
  lora = lj.lora(lambda p, i: p["embedding"][i], lj.LoraConfig(rank=32, alpha=1.0, target=".*"))
  w = lora.init(KEY, params, jnp.arange(3))["embedding"]
  assert not w.lora_a.any()
  assert w.lora_a.shape == (300, 32)
  assert float(w.lora_b.std()) == pytest.approx(1.0, rel=0.03)


def test_init_by_a_function():
  def ones(key, a_shape, b_shape, fan_in):
    return jnp.full(a_shape, float(fan_in)), jnp.ones(b_shape)

  lora, params, _, x = dense_case(init=ones)
  w = lora.init(KEY, params, x)["kernel"]
  assert (w.lora_a == 12).all()
  assert (w.lora_b == 1).all()


# ---- rules, layers, extras -------------------------------------------------------------


def test_rules_change_rank_alpha_and_init_of_some_weights():
  rules = (
    lj.LoraRule(r"h_0/.*", rank=2, alpha=2.0),
    lj.LoraRule(r".*/value/kernel", init="original_code"),
  )
  config = lj.LoraConfig(rank=4, alpha=32.0, target=QV, rules=rules)
  params, ids = make_params(), tokens()
  trainable = lj.lora(unrolled, config).init(KEY, params, ids)
  assert trainable["h_0"]["attn"]["value"]["kernel"].rank == 2  # the first rule counts
  assert not trainable["h_0"]["attn"]["value"]["kernel"].lora_b.any()
  assert trainable["h_1"]["attn"]["value"]["kernel"].lora_b.any()
  assert trainable["h_1"]["attn"]["query"]["kernel"].rank == 4


def test_axes_given_by_a_rule_replace_the_inferred_ones():
  axes = LoraAxes(batch=(), inputs=(1,), outputs=(0,))
  lora, params, trainable, x = dense_case(rules=(lj.LoraRule("kernel", axes=axes),))
  assert trainable["kernel"].lora_a.shape == (10, 2)
  assert (
    relative_difference(lora.apply(params, trainable, x), dense(lora.merge(params, trainable), x))
    < 1e-5
  )


@pytest.mark.parametrize("layers", [pytest.param((1,), marks=pytest.mark.long), (0, 2)])
def test_layers_of_a_stack_equal_those_layers_unrolled(layers):
  config = functools.partial(lj.LoraConfig, rank=4, alpha=8.0)
  params, stacked, ids = make_params(), make_params(stacked=True), tokens()
  unstacked = lj.lora(unrolled, config(target=r"h_\d/.*kernel", layers=layers))
  stacked_lora = lj.lora(scanned, config(target=r"blocks/.*kernel", stacked_layers=layers))
  trainable = randomized(unstacked.init(KEY, params, ids))
  assert sorted(trainable) == [f"h_{i}" for i in layers]
  nodes = [trainable[f"h_{i}"] for i in layers]
  joined = jax.tree.map(lambda *x: jnp.stack(x), *nodes)
  like = stacked_lora.init(KEY, stacked, ids)["blocks"]
  joined = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(joined))
  got = jax.jit(stacked_lora.apply)(stacked, {"blocks": joined}, ids)
  assert like["attn"]["query"]["kernel"].lora_a.shape == (len(layers), 24, 4)
  expected = jax.jit(unstacked.apply)(params, trainable, ids)
  assert relative_difference(got, expected) < 1e-5


def test_extra_leaves_are_copied_and_fully_trained():
  config = lj.LoraConfig(rank=4, alpha=8.0, target=QV, extra=r".*/bias")
  params, ids = make_params(), tokens()
  lora = lj.lora(unrolled, config)
  trainable = lora.init(KEY, params, ids)
  bias = trainable["h_2"]["mlp"]["up"]["bias"]
  assert bias is not params["h_2"]["mlp"]["up"]["bias"]
  np.testing.assert_array_equal(lora.apply(params, trainable, ids), unrolled(params, ids))
  trainable = randomized(trainable)
  merged = lora.merge(params, trainable)
  np.testing.assert_array_equal(
    merged["h_2"]["mlp"]["up"]["bias"], trainable["h_2"]["mlp"]["up"]["bias"]
  )
  assert relative_difference(lora.apply(params, trainable, ids), unrolled(merged, ids)) < 1e-5


# ---- dropout ---------------------------------------------------------------------------


def test_dropout_scales_what_it_keeps_and_keeps_the_expectation():
  size = 200
  params = {"kernel": jnp.zeros((size, size))}
  lora = lj.lora(dense, lj.LoraConfig(rank=size, alpha=size, target="kernel", dropout=0.25))
  x = jnp.ones((50, size))
  trainable = lora.init(KEY, params, x)
  w = trainable["kernel"]
  trainable = {"kernel": LoraWeight(jnp.eye(size), jnp.eye(size), w.axes)}
  out = lora.apply(params, trainable, x, lora_key=KEY)
  assert set(np.unique(np.round(out, 4)).tolist()) == {0.0, np.float32(round(1 / 0.75, 4)).item()}
  assert float((out != 0).mean()) == pytest.approx(0.75, abs=0.02)
  np.testing.assert_array_equal(lora.apply(params, trainable, x, lora_key=None), x)
  more = lora.apply(params, trainable, x, lora_key=KEY, dropout_rate=jnp.float32(0.9))
  assert float((more != 0).mean()) == pytest.approx(0.1, abs=0.02)


def test_every_use_and_every_path_has_its_own_mask():
  size = 64

  def fn(params, x):
    return {"first": x @ params["a"], "second": x @ params["a"], "other": x @ params["b"]}

  params = {"a": jnp.zeros((size, size)), "b": jnp.zeros((size, size))}
  lora = lj.lora(fn, lj.LoraConfig(rank=size, alpha=size, target=".", dropout=0.5))
  x = jnp.ones((8, size))
  trainable = lora.init(KEY, params, x)
  node = LoraWeight(jnp.eye(size), jnp.eye(size), trainable["a"].axes)
  out = lora.apply(params, {"a": node, "b": node}, x, lora_key=KEY)
  masks = [np.asarray(value) != 0 for value in out.values()]
  for i, mask in enumerate(masks):
    for later_mask in masks[i + 1 :]:
      assert 0.3 < (mask == later_mask).mean() < 0.7  # independent: equal half of the time
  repeated = lora.apply(params, {"a": node, "b": node}, x, lora_key=KEY)
  jax.tree.map(np.testing.assert_array_equal, out, repeated)


@pytest.mark.parametrize("loop", ["scan", "scan_shared", "fori", "while", "remat"])
def test_every_iteration_of_a_loop_has_its_own_mask(loop):
  size, count = 64, 3
  stacked = loop in ("scan", "remat")

  def fn(params, x):
    def step(outs, i, w):
      return outs.at[i].set(x @ w)

    outs, w = jnp.zeros((count, *x.shape)), params["w"]
    if stacked:
      body = lambda c, iw: (step(c, *iw), None)  # noqa: E731
      body = jax.checkpoint(body) if loop == "remat" else body
      return jax.lax.scan(body, outs, (jnp.arange(count), w))[0]
    if loop == "scan_shared":
      return jax.lax.scan(lambda c, i: (step(c, i, w), None), outs, jnp.arange(count))[0]
    if loop == "fori":
      return jax.lax.fori_loop(0, count, lambda i, c: step(c, i, w), outs)
    return jax.lax.while_loop(
      lambda s: s[0] < count, lambda s: (s[0] + 1, step(s[1], s[0], w)), (0, outs)
    )[1]

  shape = (count, size, size) if stacked else (size, size)
  params = {"w": jnp.zeros(shape)}
  lora = lj.lora(fn, lj.LoraConfig(rank=size, alpha=size, target="w", dropout=0.5))
  x = jnp.ones((8, size))
  node = lora.init(KEY, params, x)["w"]
  eye = jnp.broadcast_to(jnp.eye(size), shape)
  out = np.asarray(lora.apply(params, {"w": LoraWeight(eye, eye, node.axes)}, x, lora_key=KEY))
  assert 0.4 < (out != 0).mean() < 0.6
  for i in range(count):
    for j in range(i):
      assert 0.3 < ((out[i] != 0) == (out[j] != 0)).mean() < 0.7


def test_the_gradient_uses_the_forward_passs_mask_under_remat():
  def fn(params, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(params["kernel"], x)

  _, params, trainable, x = dense_case(dropout=0.5)
  remat = lj.lora(fn, lj.LoraConfig(rank=2, alpha=6.0, target="kernel", dropout=0.5))

  def loss(t):
    return jnp.sum(remat.apply(params, t, x, lora_key=KEY) ** 2)

  grads = jax.grad(loss)(trainable)
  step = 1e-3
  shifted = jax.tree.map(lambda a, g: a + step * g, trainable, grads)
  expected = step * sum(float((g**2).sum()) for g in jax.tree.leaves(grads))
  assert float(loss(shifted) - loss(trainable)) == pytest.approx(expected, rel=0.2)


def test_vmapped_examples_with_their_own_keys():
  lora, params, trainable, x = dense_case(dropout=0.5)
  keys = jax.random.split(KEY, 5)
  out = jax.vmap(lambda x, k: lora.apply(params, trainable, x[None], lora_key=k)[0])(x, keys)
  single = lora.apply(params, trainable, x[3][None], lora_key=keys[3])[0]
  np.testing.assert_allclose(out[3], single, rtol=1e-5)


# ---- arguments and transformations -----------------------------------------------------


def test_arguments_that_are_not_arrays_are_static():
  def fn(params, x, activation, mode="plain", deterministic=True, mask=None, shift=0):
    assert isinstance(deterministic, bool)
    assert isinstance(shift, int)
    h = activation(x @ params["kernel"])
    if mode == "double" and deterministic:
      h = 2 * h
    return (h if mask is None else h * mask) + shift

  params, x = {"kernel": jnp.eye(6)}, jnp.ones((2, 6))
  lora = lj.lora(fn, lj.LoraConfig(rank=2, alpha=2.0, target="kernel"))
  trainable = lora.init(KEY, params, x, jnp.tanh)
  arguments = {"mode": "double", "deterministic": True, "mask": None, "shift": 3}
  got = lora.apply(params, trainable, x, jnp.tanh, **arguments)
  np.testing.assert_array_equal(got, fn(params, x, jnp.tanh, **arguments))
  masked = lora.apply(params, trainable, x, jnp.tanh, mask=jnp.zeros((2, 6)))
  assert not masked.any()


def test_outputs_keep_their_structure():
  def fn(params, x):
    return {"h": (x @ params["kernel"], None), "n": 3}

  params, x = {"kernel": jnp.eye(6)}, jnp.ones((2, 6))
  lora = lj.lora(fn, lj.LoraConfig(rank=2, alpha=2.0, target="kernel"))
  out = lora.apply(params, lora.init(KEY, params, x), x)
  assert out["h"][1] is None
  assert int(out["n"]) == 3


def test_vmap_over_inputs_and_over_adapters():
  lora, params, trainable, x = dense_case()
  over_inputs = jax.vmap(lambda row: lora.apply(params, trainable, row[None])[0])(x)
  assert relative_difference(over_inputs, lora.apply(params, trainable, x)) < 1e-6
  adapters = [randomized(trainable, seed=i) for i in range(3)]
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *adapters)
  over_adapters = jax.vmap(lambda t: lora.apply(params, t, x))(stacked)
  for got, adapter in zip(over_adapters, adapters, strict=True):
    assert relative_difference(got, lora.apply(params, adapter, x)) < 1e-6


def test_jvp_checkpoint_and_grad_of_grad_agree_with_the_merged_model():
  params, ids = make_params(), tokens()
  lora = lj.lora(unrolled, CONFIG)
  trainable = randomized(lora.init(KEY, params, ids))
  direction = randomized(trainable, seed=5)

  def factored(t):
    return jnp.mean(jax.checkpoint(lambda t: lora.apply(params, t, ids))(t) ** 2)

  def merged(t):
    return jnp.mean(unrolled(lora.merge(params, t), ids) ** 2)

  @functools.partial(jax.jit, static_argnums=0)
  def derivatives(loss, t):
    """Returns the loss, its derivative along the direction, and that of its gradient."""
    first = jax.jvp(loss, (t,), (direction,))
    return first, jax.jvp(jax.grad(loss), (t,), (direction,))[1]

  got, expected = derivatives(factored, trainable), derivatives(merged, trainable)
  assert relative_difference(got[0], expected[0]) < 1e-5
  assert relative_difference(got[1], expected[1]) < 1e-4


def test_the_trainable_tree_survives_donation():
  _, _, trainable, _ = dense_case()
  expected = jax.tree.map(lambda a: 2 * a, trainable)
  step = jax.jit(lambda t: jax.tree.map(lambda a: 2 * a, t), donate_argnums=0)
  doubled = step(trainable)
  assert jax.tree.leaves(trainable)[0].is_deleted()
  jax.tree.map(np.testing.assert_array_equal, doubled, expected)
  assert doubled["kernel"].axes == LoraAxes((), (0,), (1,))


def test_several_functions_of_a_model_share_one_adapter():
  def hidden(params, ids):
    return unrolled(params, ids)[..., :5]

  params, ids = make_params(), tokens()
  trainable = randomized(lj.lora(unrolled, CONFIG).init(KEY, params, ids))
  got = lj.lora(hidden, CONFIG).apply(params, trainable, ids)
  expected = lj.lora(unrolled, CONFIG).apply(params, trainable, ids)[..., :5]
  assert relative_difference(got, expected) < 1e-6


def test_a_function_that_uses_some_of_the_weights_takes_the_whole_adapter():
  params, ids = make_params(), tokens()
  trainable = lj.lora(unrolled, CONFIG).init(KEY, params, ids)

  def first(params, ids):
    return params["embed"]["embedding"][ids] @ params["h_0"]["attn"]["query"]["kernel"]

  out = lj.lora(first, CONFIG).apply(params, trainable, ids)
  np.testing.assert_array_equal(out, first(params, ids))


def test_full_finetuning_is_the_same_triple():
  params, ids = make_params(), tokens()
  full = lj.full_finetuning(unrolled)
  trainable = full.init(KEY, params, ids)
  assert trainable is params
  np.testing.assert_array_equal(
    full.apply(params, trainable, ids, lora_key=KEY), unrolled(params, ids)
  )
  assert full.merge(None, trainable) is params
