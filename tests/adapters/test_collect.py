"""Statistics of data: moments of the inputs of layers, and gradients, of every kind of layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.adapters.collect import collect

from tests.layer_kinds import KINDS, normal

REFUSED = {
  "Flax Linen: Conv, grouped": "in groups",
  "Flax Linen: Conv, depthwise": "in groups",
  "plain: grad inside the function": "here its outputs are contracted",
  "mesh: shard_map, weight split over its inputs": "each device has a part of them",
}
LOOKED_UP = {
  *("Flax Linen: Embed", "Flax Linen: Embed, tied to the head by attend"),
  *("Flax NNX: Embed, tied by attend", "Equinox: Embedding, under vmap", "plain: w[ids]"),
  "plain: w[ids], out of bounds filled, clipped, promised",
  *("plain: w[ids] along the second axis, scaled", "plain: vmap over scalar ids"),
  "plain: single rows, added, broadcast and stacked",
  "plain: rows taken one by one in a scan",
}
REFUSED |= dict.fromkeys(LOOKED_UP, "its rows are looked up")
SHORT = {"plain: w[ids]", "mesh: shard_map, weight split over its inputs"}


def moments_of(fn, params, *batches, target="w", stacked_layers=None):
  config = lj.LoraConfig(1, 1.0, target, stacked_layers=stacked_layers)
  return collect(fn, config, params, batches, "activations")


def expect(moments, x, atol=1e-4):
  """Compares moments with those of rows."""
  x = np.asarray(x, np.float64)
  np.testing.assert_allclose(moments.second, x.T @ x, atol=atol)
  np.testing.assert_allclose(moments.first, x.sum(0), atol=atol)
  assert moments.num_tokens == len(x)


def layer(moments, i):
  return type(moments)(*(array[i] for array in moments))


X, IDS = normal(5, 6), jnp.array([1, 0, 1, 1, 1])


def test_the_inputs_of_layers_that_are_scanned():
  params = {"w": normal(3, 6, 6, seed=1)}

  def fn(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

  found = moments_of(fn, params, X)["w"]
  chosen = moments_of(fn, params, X, stacked_layers=[2])["w"]
  x = X
  for i in range(3):
    expect(layer(found, i), x)
    if i == 2:
      expect(layer(chosen, 0), x)
    x = jnp.tanh(x @ params["w"][i])
  assert chosen.num_tokens.shape == (1,)


@pytest.mark.parametrize("experts", ["ragged_dot", pytest.param("indexed", marks=pytest.mark.long)])
def test_the_inputs_of_experts(experts):
  params = {"w": normal(3, 6, 4, seed=1)}
  if experts == "ragged_dot":
    expected = X[:1], X[1:], X[:0]
    fn = lambda params, x: lax.ragged_dot(x, params["w"], jnp.array([1, 4, 0]))  # noqa: E731
  else:
    expected = X[1:2], jnp.concatenate([X[:1], X[2:]]), X[:0]
    fn = lambda params, x: jnp.einsum("bi,bio->bo", x, params["w"][IDS])  # noqa: E731
  found = moments_of(fn, params, X)["w"]
  for i in range(3):
    expect(layer(found, i), expected[i])
  np.testing.assert_array_equal(layer(found, 2).covariance(), 0)


@pytest.mark.long
def test_inputs_in_the_axes_of_the_weight():
  """Of several axes, scaled per channel, transposed, joined with another weight."""
  x, scale = normal(4, 2, 3), jnp.arange(1.0, 4)
  params = {"w": normal(5, 3, 2, seed=1), "v": normal(2, 3, 4, seed=2)}

  def fn(params, x):
    w = jnp.transpose(params["w"], (2, 1, 0)) * scale[None, :, None]
    return jnp.einsum("bhd,hdo->bo", x, jnp.concatenate([w, params["v"]], axis=-1))

  found = moments_of(fn, params, x, target="[wv]")
  expect(found["v"], x.reshape(4, 6))
  expect(
    found["w"], jnp.transpose(x * scale[None, None], (0, 2, 1)).reshape(4, 6)
  )  # the axes of w, in order


@pytest.mark.long
def test_the_inputs_of_a_convolution_are_its_windows():
  x, params = normal(2, 6, 3), {"w": normal(2, 3, 4, seed=1)}

  def fn(params, x):
    return lax.conv_general_dilated(
      x, params["w"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )

  expect(moments_of(fn, params, x)["w"], x.reshape(2, 3, 2, 3).reshape(6, 6))


def test_tokens_without_a_gradient_do_not_count():
  """Padding, and in the last layer the tokens without a target."""
  params = {"first": normal(6, 6, seed=1), "last": normal(6, 4, seed=2)}
  mask = jnp.tril(jnp.ones((5, 5))) * (jnp.arange(5) < 4)[None]  # the fifth token is padding

  def fn(params, batch):
    x = batch["mask"] @ jnp.tanh(batch["x"] @ params["first"]) / 5
    return jnp.sum(jnp.square(x[2:4] @ params["last"]))

  found = moments_of(fn, params, {"x": X, "mask": mask}, target="first|last")
  expect(found["first"], X[:4])
  expect(found["last"], (mask @ jnp.tanh(X @ params["first"]) / 5)[2:4])


@pytest.mark.long
def test_uses_and_batches_are_added_in_float32():
  params = {"w": normal(6, 6, seed=1, dtype=jnp.bfloat16)}
  fn = lambda params, x: x @ params["w"] + (2 * x) @ params["w"]  # noqa: E731
  xs = [normal(n, 6, seed=n, dtype=jnp.bfloat16) for n in (300, 200)]
  rows = np.concatenate([np.asarray(x, np.float32) for x in xs])
  found = moments_of(fn, params, *xs)["w"]
  assert found.second.dtype == jnp.float32
  expect(found, np.concatenate([rows, 2 * rows]), atol=2e-3)  # bfloat16 would be off by 4


@pytest.mark.long
def test_a_quantized_weight():
  params = {"w": normal(64, 8, seed=1)}
  quantized = lj.quantize(params, "int8", "w")
  x = normal(7, 64)
  fn = lambda params, x: jnp.sum(jnp.square(x @ params["w"]))  # noqa: E731
  expect(moments_of(fn, quantized, x)["w"], x, atol=1e-3)
  config = lj.LoraConfig(1, 1.0, "w")
  found = collect(fn, config, quantized, [x], "gradients")["w"]
  exact = jax.grad(fn)(lj.dequantize(quantized), x)["w"]
  np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-3)


def test_the_gradient_is_the_mean_over_batches_a_few_weights_at_a_time():
  params = {"v": normal(6, 4, seed=1), "w": normal(4, 3, seed=2)}
  loss = lambda params, x: jnp.mean(jnp.square(x @ params["v"] @ params["w"]))  # noqa: E731
  batches = [X, normal(2, 6, seed=3)]
  seen = []

  def summarize(site, gradient):
    seen.append(site.path)
    return gradient

  found = collect(
    loss,
    lj.LoraConfig(1, 1.0, "[vw]"),
    params,
    batches,
    "gradients",
    weights_at_once=1,
    summarize=summarize,
  )
  exact = [jax.grad(loss)(params, batch) for batch in batches]
  for path in ("v", "w"):
    np.testing.assert_allclose(found[path], sum(g[path] for g in exact) / 2, rtol=1e-5)
  assert seen == ["v", "w"]


@pytest.mark.long
def test_sharded_statistics_are_sharded_as_the_weight():
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.PartitionSpec
  put = lambda x, *names: jax.device_put(x, jax.NamedSharding(mesh, spec(*names)))  # noqa: E731
  params, x = {"w": normal(6, 4, seed=1)}, normal(8, 6)
  fn = lambda params, x: jnp.sum(jnp.square(x @ params["w"]))  # noqa: E731
  sharded = {"w": put(params["w"], "tensor", None)}, [put(x, "data")]
  config = lj.LoraConfig(1, 1.0, "w")
  found = collect(fn, config, *sharded, "activations")["w"]
  expect(found, x)
  gradient = collect(fn, config, *sharded, "gradients")["w"]
  assert gradient.sharding.is_equivalent_to(sharded[0]["w"].sharding, 2)
  np.testing.assert_allclose(gradient, jax.grad(fn)(params, x)["w"], rtol=1e-5)


def cases():
  for kind in KINDS:
    marks = () if str(kind) in SHORT else pytest.mark.long
    yield pytest.param(kind, id=str(kind), marks=marks)


@pytest.mark.parametrize("kind", list(cases()))
def test_every_layer_kind_has_moments_or_is_refused(kind):
  case = kind.build()
  fn = lambda params, args: case.fn(params, *args)  # noqa: E731
  config = lj.LoraConfig(case.rank, 3.0, case.target, rules=case.rules)
  run = functools.partial(
    collect, fn, config, case.params, [case.args], "activations", opaque=case.opaque
  )
  if reason := REFUSED.get(str(kind)):
    with pytest.raises((ValueError, lj.UnsupportedOperation), match=reason):
      run()
    return
  for second, first, count in run().values():
    np.testing.assert_allclose(second, second.mT, rtol=1e-5, atol=1e-5)
    assert np.linalg.eigvalsh(second).min() > -1e-4
    diagonal = np.diagonal(second, axis1=-2, axis2=-1)
    assert (diagonal * np.maximum(count, 1)[..., None] >= first**2 - 1e-3).all()
    assert (count >= 0).all()
    assert count.max() > 0


def test_bad_arguments_are_refused():
  fn, params = lambda params, x: x @ params["w"], {"w": normal(6, 4)}
  config = lj.LoraConfig(1, 1.0, "w")
  with pytest.raises(ValueError, match="kind must be 'activations' or 'gradients', got 'input'"):
    collect(fn, config, params, [X], "input")  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match="batches are empty"):
    collect(fn, config, params, [], "gradients")
  with pytest.raises(ValueError, match=r"weights_at_once must be an integer in \[1, inf\), got 0"):
    collect(fn, config, params, [X], "gradients", weights_at_once=0)
  with pytest.raises(ValueError, match="fn must return one number"):
    collect(fn, config, params, [X], "gradients")
  held = lambda params, x: lax.stop_gradient(x @ params["w"])  # noqa: E731
  with pytest.raises(ValueError, match="w: no token counts, since the value of `fn` does not dep"):
    collect(held, config, params, [X], "activations")
