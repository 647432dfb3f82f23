"""Attention and its gradients are those of `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.parts import attention
from lora_jax.models.parts.attention import causal_attention, write_cache

SEGMENT_IDS = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])


def segments_mask():
  return (SEGMENT_IDS[:, :, None] == SEGMENT_IDS[:, None, :])[:, None]


def inputs(scale=1.0, dtype="float32"):
  keys = jax.random.split(jax.random.key(0), 4)
  return tuple((scale * jax.random.normal(key, (2, 12, 3, 8))).astype(dtype) for key in keys)


def outputs_and_gradients(attend, query, key, value, gradient):
  out, pull = jax.vjp(attend, query, key, value)
  return out, *pull(gradient)


def by_jax(mask):
  return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


@pytest.fixture(params=[5, pytest.param(128, marks=pytest.mark.long)], ids="blocks of {}".format)
def block_size(request, monkeypatch):
  """Three blocks of the 12 queries, or one."""
  monkeypatch.setattr(attention, "BLOCK_SIZE", request.param)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
  ("scale", "dtype", "tolerance"),
  [(1.0, "float32", 1e-5), (5.0, "float32", 1e-4), (1.0, "bfloat16", 3e-2)],
)
def test_outputs_and_gradients_are_jaxs(masked, scale, dtype, tolerance):
  mask = segments_mask() if masked else None
  arrays = inputs(scale, dtype)
  got = outputs_and_gradients(lambda *qkv: causal_attention(*qkv, mask), *arrays)
  wide = [array.astype("float32") for array in arrays]
  expected = outputs_and_gradients(by_jax(mask), *wide)
  for actual, expected_gradient in zip(got, expected, strict=True):
    assert actual.dtype == dtype
    largest = float(jnp.abs(expected_gradient).max())
    np.testing.assert_allclose(
      actual.astype("float32"), expected_gradient, atol=tolerance * largest
    )


@pytest.mark.usefixtures("block_size")
def test_heads_that_share_keys_are_jaxs():
  keys = jax.random.split(jax.random.key(0), 4)
  heads = zip(keys, (6, 2, 2, 6), strict=True)
  arrays = [jax.random.normal(key, (2, 12, count, 8)) for key, count in heads]
  mask = segments_mask()
  got = outputs_and_gradients(lambda *qkv: causal_attention(*qkv, mask), *arrays)
  expected = outputs_and_gradients(by_jax(mask), *arrays)
  for actual, expected_gradient in zip(got, expected, strict=True):
    np.testing.assert_allclose(actual, expected_gradient, atol=1e-5)


def test_fewer_queries_than_keys():
  query, key, value, gradient = inputs()
  index = jnp.asarray([9, 2, 2, 11, 0])
  causal = jnp.tril(jnp.ones((12, 12), bool))[None, None]
  mask = (segments_mask() & causal)[:, :, index]
  arrays = (query[:, index], key, value, gradient[:, index])
  got = outputs_and_gradients(lambda *qkv: causal_attention(*qkv, mask), *arrays)
  expected = outputs_and_gradients(
    lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask), *arrays
  )
  for actual, expected_gradient in zip(got, expected, strict=True):
    np.testing.assert_allclose(
      actual, expected_gradient, atol=1e-5 * float(jnp.abs(expected_gradient).max())
    )


@pytest.mark.usefixtures("block_size")
def test_a_token_sees_its_own_segment_up_to_itself():
  query, key, value, _ = inputs()

  def visible(position):
    def output(value):
      return causal_attention(query, key, value, segments_mask())[0, position].sum()

    return np.flatnonzero(np.abs(jax.grad(output)(value)[0]).sum(axis=(1, 2))).tolist()

  assert visible(3) == [0, 1, 2, 3]
  assert visible(7) == [5, 6, 7]


def test_no_more_than_eight_blocks_cover_all_queries():
  for length in (1, 127, 128, 129, 1000, 1024, 5000):
    blocks = attention._blocks(length, length)
    assert len(blocks) <= 8
    starts, stops, ends = map(list, zip(*blocks, strict=True))
    assert [0, *stops] == [*starts, length]
    assert ends == stops


@pytest.mark.parametrize("index_axis", [None, 0])
def test_a_cache_is_written_in_each_row_and_its_tokens_have_gradients(index_axis):
  keys, values = jnp.ones((3, 2, 4, 5, 6)), jnp.ones((3, 2, 4, 6, 5))
  key = value = jnp.arange(3.0 * 2 * 2 * 4 * 5).reshape(3, 2, 2, 4, 5)
  index = jnp.asarray(2) if index_axis is None else jnp.asarray([2, 0, 4])

  def written(key, value, index, keys, values):
    return write_cache((keys, values), key, value, index)

  @jax.jit
  def mapped(key, value):
    axes = 0, 0, index_axis, 0, 0
    return jax.vmap(written, axes)(key, value, index, keys, values)

  for row, start in enumerate([2, 2, 2] if index_axis is None else [2, 0, 4]):
    one_by_one = written(key[row], value[row], start, keys[row], values[row])
    expected = np.ones((2, 4, 6, 5), np.float32)
    expected[:, :, start : start + 2] = np.swapaxes(value[row], 1, 2)
    np.testing.assert_array_equal(one_by_one[1], expected)
    np.testing.assert_array_equal(one_by_one[0], np.swapaxes(expected, 2, 3))
    for out, alone in zip(mapped(key, value), one_by_one, strict=True):
      np.testing.assert_array_equal(out[row], alone)

  def of_first(key):
    return written(key, value[0], 2, keys[0], values[0])[0].sum()

  np.testing.assert_array_equal(jax.jit(jax.grad(of_first))(key[0]), np.ones_like(key[0]))
