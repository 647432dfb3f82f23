"""The adapter on disk, plain arrays and their axes; its summary."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import LoraWeight
from lora_jax.axes import LoraAxes
from lora_jax.training.checkpoint import restore_adapter, save_adapter

from tests.toy_models import make_params, randomized, tokens, unrolled

KEY = jax.random.key(0)


def example():
  config = lj.LoraConfig(4, 8.0, r"h_\d/attn/(query|value)/kernel", extra=".*bias")
  lora = lj.lora(unrolled, config)
  params = make_params()
  return lora, params, randomized(lora.init(KEY, params, tokens()))


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_pack_and_unpack_are_inverse():
  _, _, trainable = example()
  arrays, axes = lj.pack(trainable)
  assert set(json.loads(axes)) == {"format", "version", "leaves"}
  assert all(isinstance(array, jax.Array) for array in arrays.values())
  assert arrays["h_0/attn/query/kernel/lora_a"].shape == (24, 4)
  assert_same(lj.unpack(arrays, axes), trainable)
  assert_same(lj.unpack(arrays, axes, like=trainable), trainable)


def test_swapped_axes_are_refused():
  lora = lj.lora(lambda p, x: x @ p["w"], lj.LoraConfig(2, 2.0, "w"))
  other = lj.lora(lambda p, x: x @ p["w"].T, lj.LoraConfig(2, 2.0, "w"))
  params, x = {"w": jnp.ones((6, 6))}, jnp.ones((1, 6))
  arrays, axes = lj.pack(lora.init(KEY, params, x))  # square: every shape agrees
  with pytest.raises(
    ValueError, match=r"other axes: w has .*inputs=\(0,\).*expected .*inputs=\(1,\)"
  ):
    lj.unpack(arrays, axes, like=other.init(KEY, params, x))


def test_unpack_lists_every_difference():
  _, _, trainable = example()
  arrays, axes = lj.pack(trainable)
  with pytest.raises(ValueError, match=r"expected the axes of a lora_jax adapter.*got 'no json'"):
    lj.unpack(arrays, "no json")
  with pytest.raises(ValueError, match=r"version 1 or 2, as JSON; got .*version 3"):
    lj.unpack(arrays, axes.replace('"version": 2', '"version": 3'))
  fewer = dict(arrays)
  del fewer["h_1/attn/value/kernel/lora_b"]
  with pytest.raises(ValueError, match="missing: h_1/attn/value/kernel/lora_b\n  unexpected: more"):
    lj.unpack(fewer | {"more": jnp.ones(1)}, axes)
  smaller = lj.lora(unrolled, lj.LoraConfig(2, 8.0, r"h_[01]/attn/(query|value)/kernel"))
  like = smaller.init(KEY, make_params(), tokens())
  message = (
    r"(?s)unexpected: h_0/mlp/up/bias.*unexpected: h_2/attn/query/kernel"
    r".*mis-shaped: h_0/attn/query/kernel is \[\(24, 4\)"
  )
  with pytest.raises(ValueError, match=message):
    lj.unpack(arrays, axes, like)


def test_a_checkpoint_round_trip(tmp_path):
  _, _, trainable = example()
  save_adapter(tmp_path / "adapter", trainable)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable)
  assert_same(restore_adapter(tmp_path / "adapter", like=shapes), trainable)
  assert not list(tmp_path.rglob("*.pkl"))


def test_checkpoint_restores_onto_shardings(tmp_path):
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
  node = LoraWeight(jnp.ones((6, 2)), jnp.ones((2, 6)), LoraAxes((), (0,), (1,)))
  save_adapter(tmp_path / "adapter", {"w": node})
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), {"w": node})
  assert restore_adapter(tmp_path / "adapter", like)["w"].lora_a.sharding == split


def test_checkpoint_of_other_axes_or_shapes_is_refused(tmp_path):
  node = LoraWeight(jnp.ones((6, 2)), jnp.ones((2, 6)), LoraAxes((), (0,), (1,)))
  save_adapter(tmp_path / "adapter", {"w": node})
  swapped = LoraWeight(node.lora_a, node.lora_b, LoraAxes((), (1,), (0,)))
  with pytest.raises(ValueError, match="other axes: w"):
    restore_adapter(tmp_path / "adapter", {"w": swapped})
  larger = LoraWeight(jnp.ones((6, 4)), jnp.ones((4, 6)), node.axes)
  with pytest.raises(ValueError, match=r"mis-shaped: w is \[\(6, 2\), \(2, 6\)\], expected"):
    restore_adapter(tmp_path / "adapter", {"w": larger})
  with pytest.raises(ValueError, match="already exists"):
    save_adapter(tmp_path / "adapter", {"w": node})
  with pytest.raises(FileNotFoundError, match="holds no adapter"):
    restore_adapter(tmp_path / "nothing", {"w": node})


def test_summary():
  config = lj.LoraConfig(4, 8.0, r"h_\d/attn/(query|value)/kernel", extra=".*bias")
  _, params, trainable = example()
  lines = lj.summary(params, trainable, config).splitlines()
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  row = next(line for line in lines if line.startswith("h_1/attn/value/kernel"))
  assert row.split() == (
    f"h_1/attn/value/kernel 24 x 24 24 x 4 4 x 24 4 2 192 {100 * 192 / total:.3f}%".split()
  )
  counts = {line.split("  ")[0]: line.split() for line in lines}
  assert counts["adapter"][1] == f"{6 * 192:,}"
  assert counts["fully trained"][2] == str(3 * 96)
  assert counts["base"][1] == f"{total:,}"
  kinds = lj.summary(params, trainable, config, by_kind=True).splitlines()
  row = next(line for line in kinds if "/attn/value/kernel" in line)
  assert (
    row.split()
    == (
      f"h_{{0..2}}/attn/value/kernel x3 24 x 24 24 x 4 4 x 24 4 2 576 {100 * 576 / total:.3f}%"
    ).split()
  )
  assert [line.split() for line in kinds[-1:]] == [line.split() for line in lines[-1:]]
  assert len([line for line in kinds if "lora" not in line and "/kernel" in line]) == 2
  without = lj.summary(params, trainable).splitlines()
  assert "alpha/4" in without[1]
