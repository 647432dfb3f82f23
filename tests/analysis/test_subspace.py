"""Similarity of subspaces: against dense singular vectors, known angles, and random ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.analysis import (
  adapted_matrices,
  directions,
  random_similarity,
  random_similarity_deviation,
  similarity,
  subspaces,
)
from lora_jax.models.zoo import plan_causal_lm

from tests import make_llama_golden

MISTRAL = make_llama_golden.GOLDEN / "mistral"
QUERY = r".*/attn/query/kernel"
CONFIG = lj.LoraConfig(4, 8.0, r".*/(attn/query|mlp/up)/kernel")
DIM, WIDE = 32, 128


def unrolled(params, x):
  for layer in params.values():
    x = x @ layer["attn"]["query"]["kernel"] @ layer["mlp"]["up"]["kernel"][:, :DIM]
  return x


def scanned(params, x):
  return jax.lax.scan(lambda x, layer: (unrolled({"h": layer}, x), None), x, params["h"])[0]


def random_adapter(scan_layers=False, config=CONFIG):
  """Returns the params of a model of two layers, and a random adapter as `init` shapes it."""
  draw = np.random.default_rng(0)

  def kernel(*shape):
    return {"kernel": draw.normal(size=(*shape,)).astype(np.float32)}

  def layer(*stack):
    return {"attn": {"query": kernel(*stack, DIM, DIM)}, "mlp": {"up": kernel(*stack, DIM, WIDE)}}

  params = {"h": layer(2)} if scan_layers else {"h_0": layer(), "h_1": layer()}
  init = lj.lora(scanned if scan_layers else unrolled, config).init
  x = jax.ShapeDtypeStruct((1, DIM), jnp.float32)
  shapes = jax.eval_shape(init, jax.random.key(0), params, x)
  return params, jax.tree.map(lambda s: draw.normal(size=s.shape).astype(s.dtype), shapes)


def orthonormal(dim, rank, seed=0, layers=()):
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(*layers, dim, rank)))[0]


def test_all_directions_are_those_of_dense_decompositions():
  params, adapter = random_adapter()
  result = subspaces(CONFIG, adapter, params, QUERY)
  assert result.names == ("h_0/attn/query/kernel", "h_1/attn/query/kernel")
  for i, layer in enumerate(("h_0", "h_1")):
    weight = adapter[layer]["attn"]["query"]["kernel"]
    a, b = (np.asarray(x, np.float64) for x in (weight.lora_a, weight.lora_b))
    u, values, v = np.linalg.svd(2 * a @ b)  # alpha / rank is 2
    assert result.values[i] == pytest.approx(values[:4], rel=1e-6)
    for actual, expected in (
      (result.a, np.linalg.svd(a).U),
      (result.b, np.linalg.svd(b.T).U),
      (result.inputs, u),
      (result.outputs, v.T),
    ):
      signs = np.sign((actual[i] * expected[:, :4]).sum(0))
      assert actual[i] * signs == pytest.approx(expected[:, :4], abs=1e-6)
  assert result.norm == pytest.approx(np.linalg.norm(result.values, axis=1))


def test_layers_are_in_the_order_of_their_numbers():
  params, adapter = random_adapter()
  params, adapter = (
    {f"h_{i}": tree[f"h_{i % 2}"] for i in (10, 1, 0, 2)} for tree in (params, adapter)
  )
  result = subspaces(CONFIG, adapter, params, QUERY)
  assert [name.partition("/")[0] for name in result.names] == ["h_0", "h_1", "h_2", "h_10"]
  expected = [params[name.partition("/")[0]]["attn"]["query"]["kernel"] for name in result.names]
  assert np.array_equal(adapted_matrices(params, adapter, QUERY), expected)


def test_a_scanned_model_gives_the_same_by_other_names():
  params, layerwise = random_adapter()
  stacked_params, stacked = random_adapter(scan_layers=True)
  layers = [layerwise[f"h_{i}"]["attn"]["query"]["kernel"] for i in range(2)]
  arrays = {
    name: np.stack([getattr(layer, name) for layer in layers]) for name in ("lora_a", "lora_b")
  }
  node = stacked["h"]["attn"]["query"]
  node["kernel"] = node["kernel"].replace(**arrays)
  result = subspaces(CONFIG, stacked, stacked_params, QUERY)
  assert result.names == ("h/attn/query/kernel[0]", "h/attn/query/kernel[1]")
  expected = subspaces(CONFIG, layerwise, params, QUERY)
  for actual, wanted in zip(result[1:], expected[1:], strict=True):
    assert actual == pytest.approx(wanted)


def test_the_weights_of_some_layers_of_a_stack_in_order():
  rule = lj.LoraRule(QUERY, stacked_layers=[1])
  config = lj.LoraConfig(4, 8.0, QUERY, rules=[rule])
  params, adapter = random_adapter(scan_layers=True, config=config)
  assert subspaces(config, adapter, params, QUERY).names == ("h/attn/query/kernel[1]",)
  (matrix,) = adapted_matrices(params, adapter, QUERY)
  assert matrix == pytest.approx(params["h"]["attn"]["query"]["kernel"][1])
  rounded = adapted_matrices(lj.quantize(params, "Q8_0", QUERY), adapter, QUERY)
  assert 0 < np.abs(rounded - matrix).max() < 0.02


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_model_of_the_zoo_with_narrow_keys_and_values(scan_layers):
  """By shapes: Mistral's query has 4 heads and its value 2."""
  model = plan_causal_lm(MISTRAL, scan_layers=scan_layers)
  target = r".*/attn/(query|value|out)/kernel"
  config = lj.LoraConfig(2, 4.0, target)
  lora = lj.lora(lambda p, x: model.module.apply({"params": p}, x), config)
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(lora.init, jax.random.key(0), model.params, tokens)
  draw = np.random.default_rng(0)
  params, adapter = (
    jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s.shape), jnp.float32), tree)
    for tree in (model.params, shapes)
  )
  merged = lora.merge(params, adapter)
  for kind in ("query", "value", "out"):
    pattern = rf".*/attn/{kind}/kernel"
    result = subspaces(config, adapter, params, pattern)
    change = adapted_matrices(merged, adapter, pattern) - adapted_matrices(params, adapter, pattern)
    inner = result.inputs.mT @ change @ result.outputs
    assert inner == pytest.approx(result.values[..., None] * np.eye(2), abs=1e-3)
    assert result.norm == pytest.approx(np.linalg.norm(change, axis=(1, 2)), rel=1e-5)
    assert len({*result.names}) == len(result.names) == 2
  with pytest.raises(ValueError, match="several shapes"):
    subspaces(config, adapter, params, r".*/attn/(query|value)/kernel")


def test_factors_of_another_basis_have_the_same_delta_and_only_rotations_keep_all_of_a():
  params, adapter = random_adapter(config=lj.LoraConfig(4, 8.0, QUERY))
  draw = np.random.default_rng(3)
  change, rotation = draw.normal(size=(4, 4)), orthonormal(4, 4, seed=4)

  def changed(matrix):
    inverse = np.linalg.inv(matrix)

    def change(weight):
      return weight.replace(lora_a=weight.lora_a @ matrix, lora_b=inverse @ weight.lora_b)

    nodes = jax.tree.map(change, adapter, is_leaf=lambda node: hasattr(node, "lora_a"))
    return subspaces(lj.LoraConfig(4, 8.0, QUERY), to_float32(nodes), params, QUERY)

  before, after, rotated = changed(np.eye(4)), changed(change), changed(rotation)
  diagonal = np.arange(4)
  for side in ("inputs", "outputs"):
    phi = similarity(getattr(before, side), getattr(after, side))
    assert phi[:, diagonal, diagonal] == pytest.approx(np.ones((2, 4)), abs=1e-4)
  assert similarity(before.a, after.a)[:, -1] == pytest.approx(np.ones((2, 4)), abs=1e-4)
  assert (similarity(before.a, after.a)[:, 0, 0] < 0.99).all()
  phi = similarity(before.a, rotated.a)
  assert phi[:, diagonal, diagonal] == pytest.approx(np.ones((2, 4)), abs=1e-4)


def to_float32(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def test_phi_of_known_angles_and_any_signs():
  u = orthonormal(12, 3, layers=(2,))
  angle = np.pi / 6
  other = np.linalg.svd(u, full_matrices=True).U[..., 3:4]
  tilted = np.cos(angle) * u[..., :1] + np.sin(angle) * other
  assert similarity(u, tilted)[..., 0] == pytest.approx(np.full((2, 3), 0.75))
  signs = np.array([1.0, -1.0, -1.0])
  assert similarity(u, u * signs) == pytest.approx(similarity(u, u))
  expected = [[1, 1, 1], [1, 1, 1], [1, 1, 1]]
  assert similarity(u, u)[0] == pytest.approx(np.array(expected))


def test_phi_of_every_pair_is_the_definition():
  first, second = orthonormal(9, 4, seed=1), orthonormal(9, 6, seed=2)
  phi = similarity(first, second)
  assert phi.shape == (4, 6)
  for i in range(1, 5):
    for j in range(1, 7):
      norm = np.linalg.norm(first[:, :i].T @ second[:, :j]) ** 2
      assert phi[i - 1, j - 1] == pytest.approx(norm / min(i, j))


def test_mean_and_deviation_of_random_subspaces():
  """By 4,000 draws: the mean within four standard errors, the deviation within 6 %."""
  count, dim = 4000, 7
  fixed = np.eye(dim)[:, :3]
  drawn = orthonormal(dim, 5, layers=(count,))
  phi = similarity(np.broadcast_to(fixed, (count, dim, 3)), drawn)
  mean, deviation = random_similarity(dim, 3, 5), random_similarity_deviation(dim, 3, 5)
  assert (np.abs(phi.mean(0) - mean) < 4 * deviation / count**0.5).all()
  assert phi.std(0) == pytest.approx(deviation, rel=0.06)
  assert random_similarity_deviation(4, 4, 4)[3] == pytest.approx(np.zeros(4))  # the whole space


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((np.ones((5, 2)), np.eye(5)), "the columns of first are not orthonormal"),
    ((np.eye(5), np.eye(4)), r"got \(5, 5\) and \(4, 4\)"),
    ((np.eye(5), np.eye(5)[None]), r"got \(5, 5\) and \(1, 5, 5\)"),
  ],
)
def test_what_are_no_directions_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    similarity(*arguments)


def test_arbitrary_directions_are_refused():
  params, adapter = random_adapter()
  weight = adapter["h_1"]["attn"]["query"]["kernel"]
  for b, message in (
    (0 * weight.lora_b, r"h_1/attn/query/kernel is 0 .*needs some training"),
    (weight.lora_b * np.float32([[1], [1], [1], [0]]), r"rank 3, expected 4: .*rank=3\)"),
    (weight.lora_b * np.float32(np.nan), "not finite"),
  ):
    adapter["h_1"]["attn"]["query"]["kernel"] = weight.replace(lora_b=b)
    with pytest.raises(ValueError, match=message):
      subspaces(CONFIG, adapter, params, QUERY)
  with pytest.raises(ValueError, match="matrix 1 has rank 1, expected 2"):
    directions(np.stack([np.eye(2), np.ones((2, 2))]))
  with pytest.raises(ValueError, match="the matrices has values that are not finite"):
    directions(np.full((2, 2), np.inf))


def test_bad_patterns_and_counts_are_refused():
  params, adapter = random_adapter()
  with pytest.raises(ValueError, match=r"several shapes .*query/kernel \(32, 32, 4\), .*128, 4\)"):
    subspaces(CONFIG, adapter, params, ".*")
  with pytest.raises(ValueError, match=r"'key' matches none of the 4 leaves .*did you mean"):
    adapted_matrices(params, adapter, "key")
  with pytest.raises(ValueError, match="params have no h_0/attn/query/kernel, h_1"):
    adapted_matrices({}, adapter, QUERY)
  with pytest.raises(ValueError, match="rank2=9 directions in a space of dim=8"):
    random_similarity(8, 2, 9)
  with pytest.raises(ValueError, match="rank1"):
    random_similarity(8, 0, 1)
  with pytest.raises(ValueError, match="dim must be at least 2"):
    random_similarity_deviation(1, 1, 1)


def test_a_rank_above_the_weights_is_refused_and_variants_are_named():
  query = lj.LoraConfig(4, 8.0, QUERY, variant=lj.DORA)
  params, adapter = random_adapter(config=query)
  with pytest.raises(ValueError, match=r"adapted by DoRA .*Use lora_jax.convert first"):
    subspaces(query, adapter, params, QUERY)
  params, adapter = random_adapter()
  both = lj.weighted_sum([(CONFIG, adapter)] * 9, [1.0] * 9, params)
  with pytest.raises(ValueError, match="A and B have rank 36, and the delta at most 32"):
    subspaces(*both, params, QUERY)
