"""Eight emulated devices give the results of one; arrays that cannot be split are refused."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from experiments.plan.models import make_plan
from lora_jax.marks import (
  HEAD_INPUT,
  LAYER_INPUT,
  LAYER_OUTPUT,
  MLP_OUTPUT,
  TOKEN_EMBEDDINGS,
)
from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.models.deberta.model import Deberta, DebertaConfig
from lora_jax.models.llama.model import Llama, LlamaConfig, MixtureConfig
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.sharding import sharding_of
from lora_jax.placement import params_shardings
from lora_jax.quantization.leaf import Quantized
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.loss import language_model_loss, mean
from lora_jax.training.mesh import make_mesh, place_batch, shard_activations
from lora_jax.training.step import make_train_step, start

from tests.tiny_training import batches, fresh_params, method, model
from tests.toy_models import randomized, relative_difference


def trained(name, scan_layers, parts, **axes):
  """Returns the losses of three steps on one batch, and the state after them."""
  mesh, shape = make_mesh(**axes), {"scan_layers": scan_layers, "num_layers": 1 + scan_layers}
  params = fresh_params(**shape)
  params = jax.device_put(params, sharding_of(mesh)(params))
  loss = method(name, dropout=0.0)(language_model_loss(model(**shape)[0], 0.1))
  batch = batches(batch_size=8)[0]  # the same in each step, so that its loss falls
  trainable = loss.init(jax.random.key(1), params, batch)
  state, frozen, optimizer = start(
    params, trainable, optax.adamw(1e-2, eps=1e-4), jax.random.key(0), mesh
  )
  step = make_train_step(loss, optimizer, state, parts)
  losses = []
  for _ in range(3):
    state, metrics = step(state, frozen, place_batch(mesh, batch, parts))
    losses.append(metrics.loss)
  return np.array(losses), state


single = cache(trained)


@pytest.mark.parametrize(
  ("name", "scan_layers", "parts", "axes"),
  [
    pytest.param("lora", False, 1, {"data": 4, "fsdp": 2}, marks=pytest.mark.long),
    ("lora", True, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    pytest.param(
      *("full_finetuning", False, 2, {"data": 2, "fsdp": 2, "tensor": 2}), marks=pytest.mark.long
    ),
    pytest.param("full_finetuning", True, 1, {"data": 4, "fsdp": 2}, marks=pytest.mark.long),
    pytest.param("lora", False, 2, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.long),
    pytest.param("lora", True, 1, {"data": 4, "fsdp": 2}, marks=pytest.mark.long),
  ],
)
def test_eight_devices_equal_one(name, scan_layers, parts, axes):
  expected, alone = single(name, scan_layers, 1)
  losses, state = trained(name, scan_layers, parts, **axes)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert losses[0] > losses[-1]
  got, expected_part = jax.device_get((state.part, alone.part))
  assert relative_difference(got, expected_part) < 1e-5
  arrays = jax.tree.leaves((state.part, state.opt_state))
  split = [x for x in arrays if x.addressable_shards[0].data.size < x.size]
  if name == "lora":  # of A and B, one side of each weight is split, or both
    assert len(split) >= len(arrays) // 4
  else:
    assert sum(x.size for x in split) > 0.9 * sum(x.size for x in arrays)
  moments = [leaf.sharding for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert moments == [leaf.sharding for leaf in jax.tree.leaves(state.part)] * 2


ROWS, TOKENS = 8, 12
MIXTURE = MixtureConfig(num_experts=4, experts_per_token=2, shared_dim=16)
SHAPE: dict[str, Any] = {
  **{"vocab_size": 48, "num_positions": TOKENS, "embed_dim": 32, "num_layers": 2, "num_heads": 4},
  **{"mlp_dim": 48, "scan_layers": True},
}
FAMILIES = {
  "llama": lambda: Llama(LlamaConfig(**SHAPE, num_kv_heads=2)),
  "mixture": lambda: Llama(LlamaConfig(**SHAPE, num_kv_heads=2, mixture=MIXTURE)),
  "bert": lambda: Bert(BertConfig(**SHAPE, num_labels=3)),
  "deberta": lambda: Deberta(DebertaConfig(**SHAPE, num_labels=3)),
}
ATTENTION = r".*/(query|value)/kernel"
TARGETS = dict.fromkeys(FAMILIES, ATTENTION) | {
  "mixture": rf"{ATTENTION}|.*/experts/(gate|up|down)"
}
MESHES: list[dict[str, int]] = [
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"fsdp": 8},
  {"data": 2, "tensor": 4},
]


@pytest.mark.long  # compiles several programs of seconds
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_devices_equal_one_for_another_family(family):
  module, draw = FAMILIES[family](), np.random.default_rng(0)
  planned = make_plan(module, lambda dtype: shapes_of(module))
  tokens = draw.integers(1, 48, (ROWS, TOKENS), np.int32)
  index = np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1))
  ones, labels = np.ones_like(tokens), draw.integers(0, 3, ROWS, np.int32)
  arrays = {
    **{"tokens": tokens, "positions": index, "segment_ids": ones, "target_index": index},
    **{"targets": np.roll(tokens, -1, axis=1), "target_weights": np.float32(ones)},
    **{"token_types": 0 * ones, "labels": labels, "weights": np.ones(ROWS, np.float32)},
  }
  batch = {name: arrays[name] for name in (*planned.rows, *planned.labels)}
  base = jax.tree.map(
    lambda leaf: np.float32(0.1 * draw.standard_normal(leaf.shape)), shapes_of(module)
  )
  loss = lj.lora(planned.loss, lj.LoraConfig(4, 8.0, TARGETS[family]))
  adapter = randomized(jax.eval_shape(loss.init, jax.random.key(0), base, batch))

  def loss_and_gradient(**axes):
    mesh = make_mesh(**axes)
    params = jax.device_put(base, sharding_of(mesh)(base))
    trainable = jax.device_put(adapter, lj.shardings(adapter, params))
    apply = shard_activations(loss.apply, mesh)

    def of_adapter(trainable, params, batch):
      return mean(apply(params, trainable, batch))

    gradient = jax.jit(jax.value_and_grad(of_adapter))
    return jax.device_get(gradient(trainable, params, place_batch(mesh, batch)))

  expected, expected_grads = loss_and_gradient()
  for axes in MESHES:
    got, grads = loss_and_gradient(**axes)
    np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=str(axes))
    assert relative_difference(grads, expected_grads) < 1e-5, axes


@pytest.mark.parametrize("name", ["lora", "full_finetuning"])
def test_shapes_and_arrays_have_the_same_initial_state(name):
  """The plan of a run has the same state and shardings, without arrays."""
  mesh = make_mesh(2, 2, 2)
  loss, params = method(name)(language_model_loss(model()[0])), fresh_params()
  params = jax.device_put(params, sharding_of(mesh)(params))
  trainable = loss.init(jax.random.key(1), params, batches()[0])
  params_shapes, trainable_shapes = (
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    for tree in (params, trainable)
  )
  if trainable is params:
    trainable_shapes = params_shapes

  def initial(params, trainable):
    return start(params, trainable, optax.adamw(1e-2), jax.random.key(0), mesh)[0]

  run, plan = initial(params, trainable), initial(params_shapes, trainable_shapes)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(plan))
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding == b.sharding, True), run, plan)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), run, plan)


def test_marked_activations_are_split_by_row_token_and_feature():
  def fn(params, x):
    for name in (TOKEN_EMBEDDINGS, LAYER_INPUT, MLP_OUTPUT, LAYER_OUTPUT, HEAD_INPUT):
      x = checkpoint_name(x * params, name)
    return x

  def specs(mesh, shape):
    sharded = shard_activations(fn, mesh)
    jaxpr = jax.make_jaxpr(sharded)(jnp.ones(()), jnp.ones(shape)).jaxpr
    constraints = [e for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    return [e.params["sharding"].spec for e in constraints]

  mesh, rows = make_mesh(2, 2, 2), ("data", "fsdp")
  by_row, by_token, by_feature = (
    P(rows, None, None),
    P(rows, "tensor", None),
    P(rows, None, "tensor"),
  )
  between = [by_token, by_row, by_row, by_row, by_token]
  assert specs(mesh, (4, 6, 2)) == [by_feature, *between, by_feature]
  assert specs(mesh, (4, 5, 3)) == [by_row] * 3  # tokens and features are not even
  assert specs(mesh, (3, 6, 2)) == specs(mesh, (4, 6)) == []
  assert shard_activations(fn, make_mesh()) is fn


@pytest.mark.parametrize(
  ("names", "kind"),
  [(("rows",), AxisType.Auto), (("data", "fsdp", "tensor"), AxisType.Explicit)],
)
def test_activations_on_a_mesh_of_your_own_are_left_to_xla(names, kind):
  shape = (2, *(1 for _ in names[1:]))
  mesh = jax.make_mesh(shape, names, (kind,) * len(names), devices=jax.devices()[:2])

  def fn(params, x):
    return x + checkpoint_name(x * params, LAYER_OUTPUT)

  x = jax.device_put(jnp.ones((4, 2, 2)), NamedSharding(mesh, P(names[0])))
  np.testing.assert_array_equal(shard_activations(fn, mesh)(jnp.full((), 2.0), x), 3 * x)


def test_losses_with_two_calls_of_a_model_or_derivatives_of_their_own_are_left_to_work():
  """As a distance between two batches' outputs, or a loss whose gradients are written by hand."""

  def layer(params, x):
    with jax.named_scope("h_0"):
      return checkpoint_name(x * params, MLP_OUTPUT)

  custom = jax.custom_vjp(layer)
  custom.defvjp(lambda params, x: (layer(params, x), None), lambda saved, g: (g.sum(), g))

  def fn(params, x):
    return layer(params, custom(params, layer(params, x)))

  sharded = shard_activations(fn, make_mesh(2))
  x = jnp.ones((2, 4, 2))
  jaxpr = jax.make_jaxpr(sharded)(jnp.ones(()), x).jaxpr
  assert [e.primitive.name for e in jaxpr.eqns].count("sharding_constraint") == 2
  np.testing.assert_array_equal(sharded(jnp.full((), 2.0), x), 8 * x)


def test_a_fingerprint_does_not_depend_on_the_mesh():
  params = fresh_params()
  expected = fingerprint(params)
  mesh = make_mesh(2, 2, 2)
  assert fingerprint(jax.device_put(params, sharding_of(mesh)(params))) == expected


def test_a_fingerprint_depends_on_every_bit_and_place():
  array = np.arange(12, dtype=np.float32).reshape(3, 4)
  flipped = array.copy()
  flipped.view(np.uint32)[1, 2] ^= 1
  swapped = array[[1, 0, 2]]
  trees = [{"a": x} for x in (array, flipped, swapped, array.T, array.astype(np.float16))]
  trees += [{"b": array}, {"a": array.astype(np.int32)}, {"a": array > 3}, {"a": array > 4}]
  trees += [{"a": jax.random.key(i)} for i in range(2)]
  assert len({fingerprint(jax.tree.map(jax.numpy.asarray, tree)) for tree in trees}) == len(trees)


def test_a_fingerprint_depends_on_what_codes_mean():
  codes = lj.quantize({"kernel": jnp.ones((64, 64))}, "Q4_1", "kernel")["kernel"]
  others = [
    Quantized(codes.arrays, "Q4_1", axis=-1),
    Quantized(codes.arrays, "Q4_1", dtype="bfloat16"),
  ]
  names = {fingerprint({"kernel": leaf}) for leaf in (codes, *others)}
  assert len(names) == 3


def test_a_fingerprint_takes_every_leaf_that_jax_computes_with():
  for dtype in ("int2", "int4", "float4_e2m1fn", "float8_e4m3fn", "bool", "complex64", "float64"):
    first, second = (np.asarray(row).astype(dtype) for row in ([0, 1, 1, 0], [0, 1, 0, 1]))
    assert fingerprint({"a": first}) == fingerprint({"a": jax.numpy.asarray(first)})
    assert fingerprint({"a": first}) != fingerprint({"a": second})
  assert len({fingerprint({"a": x}) for x in (1, 2, 1.0, True, 1j, np.float32(2))}) == 6


def test_arrays_that_cannot_be_split_are_refused():
  with pytest.raises(ValueError, match=r"data=4 x fsdp=4 x tensor=1 needs 16 devices; there are 8"):
    make_mesh(4, 4)
  with pytest.raises(ValueError, match=r"mesh.fsdp must be an integer in \[1, inf\), got 0"):
    make_mesh(fsdp=0)
  mesh = make_mesh(4, 2)
  with pytest.raises(ValueError, match=r"a batch of 12 rows cannot be split over 1 accum.* 8 dev"):
    place_batch(mesh, {"x": np.zeros((12, 2))})
  with pytest.raises(ValueError, match=r"over 2 accum.* 8 devices.* a multiple of 16"):
    place_batch(mesh, {"x": np.zeros((8, 2))}, 2)
  shapes = {"wide": {"kernel": jax.ShapeDtypeStruct((3, 6, 4), "float32")}}
  rules = [("wide/.*", P("fsdp", None))]
  assert params_shardings(mesh, shapes, rules)["wide"]["kernel"].spec == P(None, "fsdp", None)
  with pytest.raises(ValueError, match=r"wide/kernel \(3, 6, 4\): an axis of 6 .* over 4 devices"):
    params_shardings(make_mesh(fsdp=4), shapes, rules)
  with pytest.raises(ValueError, match="no sharding rule for wide/kernel; did you mean wide/bias"):
    params_shardings(mesh, shapes | {"wide/bias": shapes["wide"]["kernel"]}, [("wide/bias", P())])
