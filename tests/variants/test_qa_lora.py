"""QA-LoRA: the paper's formula, what is refused, and the exact merge into minima."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.axes import LoraAxes

from tests.toy_models import relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=2, alpha=4.0, target="w", variant=lj.QA_LORA)


def normal(*shape, seed=0, scale=1.0):
  return jnp.asarray(np.float32(scale * np.random.default_rng(seed).standard_normal(shape)))


def dense(params, x):
  return x @ params["w"]


def moved(trainable):
  """Returns an adapter after some training."""
  leaves, structure = jax.tree.flatten(trainable)
  drawn = [leaf + normal(*leaf.shape, seed=i, scale=0.1) for i, leaf in enumerate(leaves)]
  return jax.tree.unflatten(structure, drawn)


def paper(params, node, x, group_size):
  """Algorithm 1: the average over each group, times the group's size."""
  average = x.reshape(*x.shape[:-1], -1, group_size).mean(-1)
  return x @ params["w"] + (average * group_size) @ node.lora_a @ node.lora_b * 2.0


def test_output_and_gradients_are_the_papers():
  params, x = {"w": normal(64, 6)}, normal(3, 64)
  adapted = lj.qa_lora(dense, dataclasses.replace(CONFIG, variant=None), group_size=16)
  trainable = moved(adapted.init(KEY, params, x))
  assert trainable["w"].lora_a.shape == (4, 2)

  def loss(trainable, x):
    return jnp.sum(jnp.tanh(adapted.apply(params, trainable, x)))

  def expected_loss(trainable, x):
    return jnp.sum(jnp.tanh(paper(params, trainable["w"], x, 16)))

  got, expected = (jax.grad(f, argnums=(0, 1))(trainable, x) for f in (loss, expected_loss))
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert relative_difference(one, other) < 1e-5
  merged = adapted.merge(params, trainable)
  assert relative_difference(dense(merged, x), paper(params, trainable["w"], x, 16)) < 1e-5


def test_a_has_the_variance_of_loras():
  params, x = {"w": normal(4096, 8)}, normal(1, 4096)
  low_rank = dataclasses.replace(CONFIG, variant=None)
  a, b = (lj.lora(dense, config).init(KEY, params, x)["w"].lora_a for config in (CONFIG, low_rank))
  assert a.shape == (128, 2)
  assert float(a.std()) == pytest.approx(float(b.std()), rel=0.1)


def test_groups_of_several_input_axes_divide_the_last():
  conv = lambda params, x: jax.lax.conv_general_dilated(  # noqa: E731
    x, params["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
  )
  heads = lambda params, x: jnp.einsum("bhd,hdo->bo", x, params["w"])  # noqa: E731
  for fn, x in ((conv, normal(2, 9, 4)), (heads, normal(2, 3, 4))):
    params = {"w": normal(3, 4, 5)}
    adapted = lj.qa_lora(fn, dataclasses.replace(CONFIG, variant=None), group_size=2)
    trainable = moved(adapted.init(KEY, params, x))
    assert trainable["w"].lora_a.shape == (6, 2)
    delta = np.asarray(adapted.merge(params, trainable)["w"] - params["w"])
    np.testing.assert_allclose(delta[:, ::2], delta[:, 1::2], atol=1e-6)
    out = adapted.apply(params, trainable, x)
    assert relative_difference(out, fn(adapted.merge(params, trainable), x)) < 1e-5


def test_variants_of_one_group_size_are_one_value():
  assert lj.qa_lora_variant(32) == lj.QA_LORA != lj.qa_lora_variant(64)
  assert pickle.loads(pickle.dumps(CONFIG)) == CONFIG
  assert hash(CONFIG.variant) == hash(lj.qa_lora_variant(32))


def test_stored_adapters_have_the_axis_of_groups():
  params, x = {"w": normal(64, 6)}, normal(3, 64)
  trainable = lj.lora(dense, CONFIG).init(KEY, params, x)
  arrays, axes = lj.pack(trainable)
  jax.tree.map(np.testing.assert_array_equal, lj.unpack(arrays, axes, like=trainable), trainable)
  other = lj.qa_lora(dense, dataclasses.replace(CONFIG, variant=None), group_size=16)
  with pytest.raises(
    ValueError, match=r"w is QA-LoRA in groups of 32 .* the config's is QA-LoRA in"
  ):
    other.apply(params, trainable, x)


def quantized(shape, format="Q4_1", axis=-2):
  return lj.quantize({"w": normal(*shape)}, format, target="w", axis=axis)


def check_minima_were_rounded(merged, exact):
  """Checks that a weight differs from `exact` by no more than the rounding of minima to float16."""
  error = jnp.abs(merged.dequantize() - exact).max()
  assert 0 < float(error) <= 2.0**-11 * float(jnp.abs(merged.arrays["m"]).max()) + 1e-6


@pytest.mark.parametrize(("format", "group_size"), [("Q4_1", 32), ("Q5_1", 64)])
def test_the_merge_changes_minima_only_and_is_exact_up_to_their_rounding(format, group_size):
  params, x = quantized((128, 24), format), normal(3, 128)
  config = dataclasses.replace(CONFIG, variant=lj.qa_lora_variant(group_size))
  adapted = lj.lora(dense, config)
  trainable = moved(adapted.init(KEY, params, x))
  merged, errors = lj.merge_quantized(config, params, trainable)
  for name, array in merged["w"].arrays.items():
    assert array.dtype == params["w"].arrays[name].dtype
    if name != "m":
      np.testing.assert_array_equal(array, params["w"].arrays[name])
  node = trainable["w"]
  delta = jnp.repeat(2.0 * node.lora_a @ node.lora_b, group_size, axis=0)
  exact = params["w"].dequantize() + delta
  check_minima_were_rounded(merged["w"], exact)
  error = jnp.linalg.norm(merged["w"].dequantize() - exact) / jnp.linalg.norm(delta)
  assert errors == {"w": pytest.approx(float(error), rel=1e-2)}
  exact = jnp.asarray(params["w"].arrays["m"], jnp.float32) + delta[::32].T
  np.testing.assert_array_equal(merged["w"].arrays["m"], exact.astype(jnp.float16))
  out = dense(lj.dequantize(merged), x)
  assert relative_difference(out, adapted.apply(params, trainable, x)) < 1e-2


def test_some_layers_of_a_stack_of_heads_are_merged():
  fn = lambda params, x: jax.lax.scan(  # noqa: E731
    lambda x, w: (x, jnp.einsum("bhd,hdo->bo", x, w)), x, params["w"]
  )[1]
  params, x = quantized((3, 2, 64, 5)), normal(4, 2, 64)
  config = dataclasses.replace(CONFIG, rules=(lj.LoraRule("w", stacked_layers=[0, 2]),))
  plain = lj.dequantize(params)
  trainable = moved(lj.lora(fn, config).init(KEY, plain, x))
  assert trainable["w"].axes == LoraAxes((0,), (1, 2), (3,))
  merged, _ = lj.merge_quantized(config, params, trainable)
  expected = lj.lora(fn, config).merge(plain, trainable)["w"]
  np.testing.assert_array_equal(merged["w"].dequantize()[1], plain["w"][1])
  check_minima_were_rounded(merged["w"], expected)


def trained_on(config, num_groups):
  """Returns an adapter of a weight (64, 8)."""
  arrays = {"lora_a": normal(num_groups, 2), "lora_b": normal(2, 8)}
  axes = LoraAxes((), (0,), (1,))
  return {"w": lj.LoraWeight.from_arrays(arrays, config.variant.table, axes, None)}


@pytest.mark.parametrize(
  ("params", "variant", "num_groups", "words"),
  [
    ("Q8_0", lj.QA_LORA, 2, r"w is stored as Q8_0, .* expected one of Q4_1, Q5_1"),
    ("nf4", lj.QA_LORA, 2, r"w is stored as nf4, .* expected one of Q4_1, Q5_1"),
    (None, lj.QA_LORA, 2, "w is not quantized; the adaptation's merge"),
    ("Q4_1", lj.LORA, 64, r"w is adapted by LoRA .*only QA-LoRA .*dequantize\(params\)"),
    ("Q4_1", lj.qa_lora_variant(16), 4, "16 inputs are not whole blocks of Q4_1, which have 32"),
  ],
)
def test_inexact_merges_are_refused(params, variant, num_groups, words):
  config = dataclasses.replace(CONFIG, variant=variant)
  params = {"w": normal(64, 8)} if params is None else quantized((64, 8), params)
  with pytest.raises(ValueError, match=words):
    lj.merge_quantized(config, params, trained_on(config, num_groups))


def test_blocks_along_the_outputs_and_a_diverged_adapter_are_refused():
  arrays = {"lora_a": normal(2, 2), "lora_b": normal(2, 32)}
  node = lj.LoraWeight.from_arrays(arrays, lj.QA_LORA.table, LoraAxes((), (0,), (1,)), None)
  with pytest.raises(ValueError, match=r"run along axis 1 .* groups along its input axis 0"):
    lj.merge_quantized(CONFIG, quantized((64, 32), axis=-1), {"w": node})
  diverged = trained_on(CONFIG, 2)["w"]
  with pytest.raises(ValueError, match=r"w: a minimum exceeds float16's largest number"):
    lj.merge_quantized(
      CONFIG, quantized((64, 8)), {"w": diverged.replace(lora_b=1e9 * diverged.lora_b)}
    )


def test_qa_lora_of_a_config_of_another_variant():
  with pytest.raises(
    ValueError, match=r"QA-LoRA in groups of .* got a config of another variant, DoRA"
  ):
    lj.qa_lora(dense, dataclasses.replace(CONFIG, variant=lj.DORA))


def test_groups_that_do_not_fit_are_refused():
  params, x = {"w": normal(64, 8)}, normal(3, 64)
  for config, words in (
    (dataclasses.replace(CONFIG, variant=lj.qa_lora_variant(48)), r"groups of 48 .* of size 64"),
    (dataclasses.replace(CONFIG, rank=3), r"w: rank 3 is larger than its 2 groups of 32 inputs"),
  ):
    with pytest.raises(ValueError, match=words):
      lj.lora(dense, config).init(KEY, params, x)
  with pytest.raises(ValueError, match="group_size"):
    lj.qa_lora_variant(0)
