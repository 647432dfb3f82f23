"""LoftQ: its algorithm, the best iterate, and an adapter of plain LoRA on quantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.axes import LoraAxes

from tests.toy_models import relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=8, alpha=16.0, target="w")


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dense(params, x):
  return x @ params["w"]


def plain(*batch, inputs=64, outputs=24):
  """Returns an adapter, as `init` would."""
  num = len(batch)
  axes = LoraAxes(tuple(range(num)), (num,), (num + 1,))
  a, b = normal(*batch, inputs, 8, seed=1), jnp.zeros((*batch, 8, outputs))
  return {"w": lj.LoraWeight(a, b, axes)}


W = normal(64, 24)


def algorithm_1(w, format, count):
  """The paper's, with scaling 2; returns each iterate's relative error."""
  delta, errors = np.zeros_like(w), []
  for _ in range(count):
    q = np.asarray(lj.quantize({"w": jnp.asarray(w - delta)}, format, target="w")["w"].dequantize())
    u, s, v = np.linalg.svd(w - q, full_matrices=False)
    delta = (u[:, :8] * s[:8]) @ v[:8]
    errors.append(np.linalg.norm(w - q - delta) / np.linalg.norm(w))
  return q, delta, errors


@pytest.mark.parametrize("format", ["nf4", "Q4_0"])
def test_it_is_the_papers_algorithm(format):
  base, trainable, errors = lj.loftq(CONFIG, plain(), {"w": W}, format, 3)
  q, delta, expected = algorithm_1(np.asarray(W), format, 3)
  assert expected == sorted(expected, reverse=True)  # the last iterate is the best
  np.testing.assert_allclose(base["w"].dequantize(), q, atol=1e-5)
  node = trainable["w"]
  np.testing.assert_allclose(2.0 * node.lora_a @ node.lora_b, delta, atol=1e-4)
  assert errors["w"].corrected == pytest.approx(expected[-1], rel=1e-4)
  once = lj.quantize({"w": W}, format, target="w")["w"].dequantize()
  assert errors["w"].rounded == pytest.approx(relative_norm(W - once), rel=1e-4)
  assert errors["w"].corrected < 0.85 * errors["w"].rounded


def relative_norm(difference):
  return float(jnp.linalg.norm(difference) / jnp.linalg.norm(W))


def test_the_best_iterate_is_kept():
  """Weights on a grid of 7 levels: the first error is tiny, and A B moves them off it."""
  grid = jnp.round(3 * jnp.tanh(W)).at[0].set(3.0).at[32].set(-3.0) + 1e-3 * W
  errors = algorithm_1(np.asarray(grid), "rtn3", 4)[2]
  best = lj.loftq(CONFIG, plain(), {"w": grid}, "rtn3", 4)[2]["w"].corrected
  assert min(errors) < errors[-1]
  assert best == pytest.approx(min(errors), rel=1e-3)


def test_the_adapter_is_plain_lora_on_the_quantized_weights():
  base, trainable, errors = lj.loftq(CONFIG, plain(), {"w": W}, "Q4_0")
  adapted, x = lj.lora(dense, CONFIG), normal(5, 64, seed=2)
  assert trainable["w"].is_plain
  assert base["w"].format == "Q4_0"
  merged = adapted.merge(lj.dequantize(base), trainable)["w"]
  assert relative_norm(W - merged) == pytest.approx(errors["w"].corrected, rel=1e-3)
  out = adapted.apply(base, trainable, x)
  assert relative_difference(out, x @ merged) < 1e-5


def test_some_layers_of_a_stack():
  w = normal(3, 64, 24)
  config = lj.LoraConfig(8, 16.0, "w", stacked_layers=[0, 2])
  start = plain(2)["w"]
  start = {"w": lj.LoraWeight(start.lora_a, start.lora_b, start.axes, (0, 2))}
  base, trainable, _ = lj.loftq(config, start, {"w": w}, "nf4", 1)
  merged = lj.lora(dense, config).merge(lj.dequantize(base), trainable)["w"]
  errors = [
    float(jnp.linalg.norm(x) / jnp.linalg.norm(y)) for x, y in zip(w - merged, w, strict=True)
  ]
  assert max(errors[0], errors[2]) < 0.85 * errors[1]
  np.testing.assert_array_equal(merged[1], base["w"].dequantize()[1])


def test_a_base_model_that_is_quantized_already():
  config = lj.LoraConfig(8, 16.0, ".*")
  params = {"w": W, "other": W}
  base = {"w": lj.quantize({"w": W}, "nf4", target="w")["w"], "other": W}
  start = {"w": plain()["w"], "other": plain()["w"]}
  trainable, errors = lj.loftq_adapter(config, start, params, base)
  expected = lj.loftq(CONFIG, plain(), {"w": W}, "nf4", 1)
  np.testing.assert_array_equal(trainable["w"].lora_a, expected[1]["w"].lora_a)
  assert errors == {"w": expected[2]["w"]}
  np.testing.assert_array_equal(trainable["other"].lora_a, start["other"].lora_a)


def test_a_weight_of_zeros_has_no_error():
  zeros = {"w": jnp.zeros_like(W)}
  base, trainable, errors = lj.loftq(CONFIG, plain(), zeros, "nf4", 1)
  assert errors["w"] == (0.0, 0.0)
  assert not base["w"].dequantize().any()
  assert not jnp.any(trainable["w"].lora_a @ trainable["w"].lora_b)


def test_unusable_arguments_are_refused():
  quantized = lj.quantize({"w": W}, "nf4", target="w")
  with pytest.raises(ValueError, match="w is quantized already, as nf4, and LoftQ needs"):
    lj.loftq(CONFIG, plain(), quantized, "nf4")
  with pytest.raises(ValueError, match="w is only a shape, and LoftQ needs"):
    lj.loftq(CONFIG, plain(), {"w": jax.ShapeDtypeStruct(W.shape, W.dtype)}, "nf4")
  with pytest.raises(ValueError, match="none of the 1 adapted weights differs in `base`"):
    lj.loftq_adapter(CONFIG, plain(), {"w": W}, {"w": W})
  with pytest.raises(ValueError, match=r"w: base has the shape \(24, 64\), expected .*\(64, 24\)"):
    lj.loftq_adapter(CONFIG, plain(), {"w": W}, {"w": W.T})
  with pytest.raises(ValueError, match="num_iterations"):
    lj.loftq(CONFIG, plain(), {"w": W}, "nf4", 0)
  negative = lj.LoraConfig(8, -16.0, "w")
  with pytest.raises(ValueError, match="expected a positive alpha"):
    lj.loftq(negative, plain(), {"w": W}, "nf4")
  dora = lj.LoraConfig(8, 16.0, "w", variant=lj.DORA)
  node = lj.lora(dense, dora).init(KEY, {"w": W}, normal(5, 64))
  with pytest.raises(ValueError, match=r"w is adapted by DoRA .* and LoftQ is for plain LoRA"):
    lj.loftq(dora, node, {"w": W}, "nf4")
