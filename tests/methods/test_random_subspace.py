"""Random subspaces: the projection, its gradient, its seed, and the errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import lora_jax as lj
from lora_jax.methods.random_subspace import fastfood, hadamard

KEY = jax.random.key(0)
DIM, NAME = 5, "random subspace of 5"
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


def fn(params, x):
  """Two scanned layers with biases, a head, and a gain that is a vector."""

  def layer(x, p):
    return jnp.tanh(x @ p["kernel"] + p["bias"][None]), None

  x, _ = jax.lax.scan(layer, x, params["layers"])
  return (x @ params["head"]) * params["gain"][None]


def make_params():
  draw = np.random.default_rng(0).standard_normal
  shapes = {"layers": {"kernel": (2, 4, 4), "bias": (2, 4)}, "head": (4, 3), "gain": (3,)}
  is_leaf = lambda node: isinstance(node, tuple)  # noqa: E731
  return jax.tree.map(lambda s: jnp.asarray(draw(s), jnp.float32), shapes, is_leaf=is_leaf)


PARAMS = make_params()
METHOD = lj.random_subspace(fn, DIM)
SAID = lj.random_subspace(fn, DIM, layer_scales=True)
START = METHOD.init(KEY, PARAMS, X)
SCALED_START = SAID.init(KEY, PARAMS, X)
merge = jax.jit(METHOD.merge)  # compiled once for all tests


def moved(trainable, **arrays):
  node = trainable["lora_shared"][NAME].replace(**arrays)
  return trainable | {"lora_shared": {NAME: node}}


@pytest.fixture(scope="module")
def projection():
  """P, (D, dim), by merging the basis vectors."""
  moves = [merge(PARAMS, moved(START, z=z)) for z in jnp.eye(DIM)]
  return np.stack([ravel_pytree(params)[0] - ravel_pytree(PARAMS)[0] for params in moves], 1)


def test_the_transform_is_hadamards():
  matrix = np.asarray(hadamard(jnp.eye(128)))
  assert {*np.unique(matrix)} == {-1.0, 1.0}
  np.testing.assert_array_equal(matrix @ matrix, 128 * np.eye(128))
  np.testing.assert_array_equal(np.asarray(hadamard(jnp.eye(2))), [[1, 1], [1, -1]])


def test_columns_are_orthonormal():
  rows, dim = 10_000, 20
  order = jax.random.permutation(jax.random.key(1), 32)

  @jax.jit
  def draw(key):
    return jax.vmap(lambda z: fastfood(key, order, z, rows))(jnp.eye(dim)).T

  columns = np.asarray(draw(KEY))
  gram = columns.T @ columns / rows
  assert np.abs(np.diag(gram) - 1).max() < 0.01  # exact but for the last block, which is cut
  outside = gram[~np.eye(dim, dtype=bool)]
  assert np.abs(outside).max() < 5 / rows**0.5
  assert abs(columns.mean()) < 5 / columns.size**0.5
  other = np.asarray(draw(jax.random.key(3)))
  assert abs((columns[:, 0] * other[:, 0]).mean()) < 5 / rows**0.5


def test_step_0_is_the_base_model_and_apply_is_the_merged_model(projection):
  apply = jax.jit(METHOD.apply)
  np.testing.assert_allclose(apply(PARAMS, START, X), fn(PARAMS, X), rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, merge(PARAMS, START), PARAMS)
  z = jnp.arange(1.0, DIM + 1)
  trainable = moved(START, z=z)
  merged = merge(PARAMS, trainable)
  expected = ravel_pytree(PARAMS)[0] + projection @ z
  np.testing.assert_allclose(ravel_pytree(merged)[0], expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(apply(PARAMS, trainable, X), fn(merged, X), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.diag(projection.T @ projection), 1, atol=0.5)  # of 55 rows


def test_the_gradient_is_p_transposed_times_the_weights(projection):
  z = jnp.linspace(0.5, 1.0, DIM)

  def loss(z):
    return jnp.sum(METHOD.apply(PARAMS, moved(START, z=z), X) ** 2)

  merged = merge(PARAMS, moved(START, z=z))
  whole = ravel_pytree(jax.jit(jax.grad(lambda params: jnp.sum(fn(params, X) ** 2)))(merged))[0]
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(z), projection.T @ whole, rtol=1e-4)


def test_scales_multiply_each_weight_and_each_layer_of_a_stack(projection):
  """The paths, in order: gain, head, layers/bias, layers/kernel, the last with two layers."""
  node = SCALED_START["lora_shared"][NAME]
  np.testing.assert_array_equal(node.layer_scales, np.ones(5))
  z, scales = jnp.ones(DIM), jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
  merged = jax.jit(SAID.merge)(PARAMS, moved(SCALED_START, z=z, layer_scales=scales))
  sizes = [3, 12, 8, 16, 16]
  expected = ravel_pytree(PARAMS)[0] + np.repeat(scales, sizes) * (projection @ z)
  np.testing.assert_allclose(ravel_pytree(merged)[0], expected, rtol=1e-5, atol=1e-5)


def test_only_z_and_the_scales_are_trained_and_the_seed_is_stored():
  mask = lj.trainable_mask({"base": None, "adapter": SCALED_START})["adapter"]
  trained, _ = lj.partition(SCALED_START, mask)
  assert sorted(leaf.shape for leaf in jax.tree.leaves(trained)) == [(DIM,), (5,)]
  trainable = moved(START, z=jnp.ones(DIM))
  restored = lj.unpack(*lj.pack(trainable), like=START)
  assert restored["lora_shared"][NAME].seed.tolist() == START["lora_shared"][NAME].seed.tolist()
  other = METHOD.init(jax.random.key(1), PARAMS, X)
  assert START["lora_shared"][NAME].seed.tolist() != other["lora_shared"][NAME].seed.tolist()


@pytest.mark.long
def test_a_target_a_head_and_a_quantized_or_bfloat16_base():
  def plain(params, x):
    return x @ params["w"] @ params["head"]

  params = {"w": jnp.ones((64, 4)), "head": jnp.ones((4, 2))}
  method = lj.random_subspace(plain, 3, target="w", extra="head")
  x = jnp.ones((1, 64))
  trainable = method.init(KEY, params, x)
  assert trainable["head"].shape == (4, 2)
  node = trainable["lora_shared"]["random subspace of 3"].replace(z=jnp.ones(3))
  trainable = trainable | {"lora_shared": {"random subspace of 3": node}}
  merged = method.merge(params, trainable)
  change = plain(merged, x) - plain(params, x)
  assert float(jnp.abs(change).max()) > 0.1
  quantized = lj.quantize(params, "int8", "w")
  out = method.apply(quantized, trainable, x) - plain(lj.dequantize(quantized), x)
  np.testing.assert_allclose(out, change, rtol=1e-4)
  narrow = {"w": params["w"].astype(jnp.bfloat16), "head": params["head"]}
  small = jax.tree.map(lambda leaf: leaf, trainable)
  small["lora_shared"]["random subspace of 3"] = node.replace(z=jnp.full(3, 1e-3))
  out = method.apply(narrow, small, x) - plain(params, x)  # a sum in bfloat16 would lose it
  np.testing.assert_allclose(out, 1e-3 * change, rtol=0.2)


def test_with_64_bits_it_is_the_same_subspace():
  """Its signs and normal numbers take 32 random bits, of which 64 would give NaN."""
  z = jnp.ones(DIM)
  with jax.enable_x64(True):
    start = jax.eval_shape(SAID.init, KEY, PARAMS, X)
    jaxpr = jax.make_jaxpr(lambda z: fastfood(KEY, jnp.arange(8, dtype=jnp.int32), z, 100))(z)
  assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype("float32")}
  (drawn,) = [e for e in jaxpr.eqns if e.primitive.name == "random_bits"]
  assert drawn.outvars[0].aval.dtype == jnp.uint32


def test_it_does_not_depend_on_how_jax_draws_numbers():
  """An adapter may be merged elsewhere than it was trained."""
  trainable = moved(START, z=jnp.ones(DIM))
  expected = merge(PARAMS, trainable)
  with jax.threefry_partitionable(False):
    got = merge(PARAMS, trainable)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_wrong_settings_and_trees_are_refused():
  with pytest.raises(ValueError, match=r"dim must be an integer in \[1, 16777216\], got 0"):
    lj.random_subspace(fn, 0)
  with pytest.raises(ValueError, match=r"layer_scales must be true or false, got 1"):
    lj.random_subspace(fn, 3, layer_scales=1)
  with pytest.raises(ValueError, match=r"target 'w' matches none of the 4 leaves"):
    lj.random_subspace(fn, 3, target="w").init(KEY, PARAMS, X)
  with pytest.raises(ValueError, match="target and extra match the same leaves"):
    lj.random_subspace(fn, 3, target="head", extra="head").init(KEY, PARAMS, X)
  with pytest.raises(ValueError, match=r"ids is int32 of shape \(2,\); expected real floating"):
    METHOD.init(KEY, {"ids": jnp.arange(2)}, X)
  with pytest.raises(ValueError, match=r"is not of this method: lora_shared holds random subspace"):
    lj.random_subspace(fn, 3).merge(PARAMS, START)
  with pytest.raises(ValueError, match=r"is not of this method: lora_shared holds nothing"):
    METHOD.merge(PARAMS, {})
  with pytest.raises(ValueError, match=r"has \{'z': \(3,\), 'seed': \(2,\)\}, expected"):
    METHOD.merge(PARAMS, moved(START, z=jnp.ones(3)))
  with pytest.raises(ValueError, match="unexpected: head"):
    METHOD.merge(PARAMS, START | {"head": PARAMS["head"]})


@pytest.mark.long
def test_neither_pass_keeps_the_projection_of_a_layer():
  """Temporaries do not grow by a weight with each further layer of a scanned stack."""

  def deep(params, x):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
    return jnp.sum(jax.lax.scan(body, x, params["w"])[0])

  method, x, size = lj.random_subspace(deep, 100), jnp.ones((1, 256)), 4 * 256**2

  def temporaries(num_layers):
    params = {"w": jax.ShapeDtypeStruct((num_layers, 256, 256), jnp.float32)}
    start = jax.eval_shape(method.init, KEY, params, x)

    def loss(node, params):
      return method.apply(params, {"lora_shared": {node.table.variant: node}}, x)

    (node,) = start["lora_shared"].values()
    compiled = jax.jit(jax.grad(loss, allow_int=True)).lower(node, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = temporaries(4), temporaries(12)
  assert many - few < size, (few, many, size)
