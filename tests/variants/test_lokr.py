"""LoKr: Kronecker products as two factors or formed, sizes, and what is refused."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.variants.lokr import factors_of

from tests.jaxprs import count_of_sizes
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
CONFIG = lj.LoraConfig(rank=2, alpha=6.0, target="w")


def heads(params, x):
  return jnp.einsum("bi,iho->bho", x, params["w"])


def example(*shape):
  draw = np.random.default_rng(0).standard_normal
  return {"w": jnp.asarray(draw(shape), jnp.float32)}, jnp.asarray(draw((5, shape[0])), jnp.float32)


@pytest.mark.parametrize(
  ("factor", "decompose", "is_pair"),
  [(2, "w2", True), (2, "both", True), (-1, "none", False), (6, "w2", False)],
)
def test_output_and_gradients_are_those_of_the_kronecker_product(factor, decompose, is_pair):
  params, x = example(24, 3, 8)  # the output axes are taken as one
  adapted = lj.lokr(heads, CONFIG, factor, decompose)
  trainable = randomized(adapted.init(KEY, params, x))

  def paper(trainable):
    node = trainable["w"].arrays
    w1 = node["w1"] if "w1" in node else node["w1_a"] @ node["w1_b"]
    w2 = node["w2"] if "w2" in node else node["w2_a"] @ node["w2_b"]
    w = params["w"] + 3.0 * jnp.kron(w1, w2).reshape(24, 3, 8)
    return jnp.sum(jnp.sin(heads({"w": w}, x)))

  def loss(trainable):
    return jnp.sum(jnp.sin(adapted.apply(params, trainable, x)))

  got, expected = (jax.jit(jax.value_and_grad(f))(trainable) for f in (loss, paper))
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert relative_difference(one, other) < 1e-5
  created = count_of_sizes(jax.make_jaxpr(jax.grad(loss))(trainable), {24 * 24})
  assert (created == 0) == is_pair


def test_factors_are_pefts():
  assert [factors_of(n, -1) for n in (768, 576, 127, 1)] == [(24, 32), (24, 24), (1, 127), (1, 1)]
  assert [factors_of(n, 8) for n in (768, 12, 4, 9)] == [(8, 96), (3, 4), (2, 2), (3, 3)]
  assert factors_of(128, 64) == (64, 2)


def test_the_number_of_parameters():
  """With factors of (in1, in2) and (out1, out2): in1 out1 + rank (in2 + out2), or in2 out2."""
  params, x = {"w": jnp.ones((768, 2, 1152))}, jnp.ones((1, 768))
  for decompose, size in (("w2", 24 * 48 + 2 * (32 + 48)), ("none", 24 * 48 + 32 * 48)):
    shapes = jax.eval_shape(lj.lokr(heads, CONFIG, decompose=decompose).init, KEY, params, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == size


def test_variants_of_one_setting_are_one_value():
  assert lj.lokr_variant(8) == lj.lokr_variant(8) != lj.lokr_variant(8, "none")
  assert lj.lokr_variant() == lj.LOKR
  config = dataclasses.replace(CONFIG, variant=lj.lokr_variant(4))
  assert pickle.loads(pickle.dumps(config)) == config


def test_what_is_refused():
  params, x = example(24, 3, 8)
  config = dataclasses.replace(CONFIG, rank=5)
  for decompose, words in (
    ("w2", r"w: rank 5 is larger than the smaller side of W2, 6 x 6 .*lokr_variant\(-1, 'none'\)"),
    ("both", r"w: rank 5 is larger than the smaller side of W1, 4 x 4 .*lokr_variant\(-1, 'w2'\)"),
  ):
    rank = 5 if decompose == "both" else 7
    config = dataclasses.replace(CONFIG, rank=rank)
    with pytest.raises(ValueError, match=words.replace("rank 5", f"rank {rank}")):
      lj.lokr(heads, config, decompose=decompose).init(KEY, params, x)
  whole = dataclasses.replace(CONFIG, dropout=0.1)
  with pytest.raises(ValueError, match=r"w: LoRA dropout .*LoKr of factor -1, whole has none"):
    lj.lokr(heads, whole, decompose="none").init(KEY, params, x)
  lj.lokr(heads, whole, 2).init(KEY, params, x)  # has two factors
  with pytest.raises(ValueError, match="factor"):
    lj.lokr_variant(0)
  with pytest.raises(ValueError, match="decompose"):
    lj.lokr_variant(decompose="w1")  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match=r"LoKr of .* got a config of another variant, HiRA"):
    lj.lokr(heads, dataclasses.replace(CONFIG, variant=lj.HIRA))
