"""A language model's head: float32 logits, and a backward pass in the computation's dtype."""

from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import float32_dot
from lora_jax.training.loss import language_model_loss, mean

LAST_OF_BOTH = (((1,), (1,)), ((), ()))
SHAPE: dict[str, Any] = {
  "vocab_size": 48,
  "num_positions": 16,
  "embed_dim": 32,
  "num_layers": 1,
  "num_heads": 2,
}


def dots(jaxpr):
  """Yields the dtypes of the operands of each matmul."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield [str(operand.aval.dtype) for operand in equation.invars]
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from dots(inner)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_are_float32_and_only_bfloat16_has_a_backward_pass_of_its_own(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x, weight = (jax.random.normal(key, (5, 64)).astype(dtype) for key in keys[:2])
  cotangent = jax.random.normal(keys[2], (5, 5))

  def gradients(dot):
    return jax.vjp(lambda x, weight: dot(x, weight, LAST_OF_BOTH), x, weight)[1](cotangent)

  def plain(x, weight, dimensions):
    return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=jnp.float32)

  logits = float32_dot(x, weight, LAST_OF_BOTH)
  assert logits.dtype == jnp.float32
  np.testing.assert_array_equal(logits, plain(x, weight, LAST_OF_BOTH))
  for got, want in zip(gradients(float32_dot), gradients(plain), strict=True):
    assert got.dtype == want.dtype == jnp.dtype(dtype)
    got, want = (np.asarray(value, np.float32) for value in (got, want))
    tolerance = 2e-2 if dtype == "bfloat16" else 0.0
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)
  backward = jax.make_jaxpr(lambda: gradients(float32_dot))().jaxpr
  dtypes = {operand for operands in dots(backward) for operand in operands}
  assert dtypes == ({"bfloat16"} if dtype == "bfloat16" else {"float32", dtype})


@pytest.mark.parametrize(("tie_head", "chunk_size"), [(True, None), (False, 4)])
def test_an_adapted_bfloat16_head_has_the_gradient_of_merged_weights(tie_head, chunk_size):
  config = GPT2Config(**SHAPE, tie_head=tie_head, dtype="bfloat16")
  model, tokens = GPT2(config), jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
  index = np.tile(np.arange(8, dtype=np.int32), (2, 1))
  batch = {
    **{"tokens": tokens, "positions": index, "segment_ids": jnp.ones_like(tokens)},
    **{"target_index": index, "targets": tokens[:, ::-1]},
    "target_weights": np.ones((2, 8), np.float32),
  }
  params = model.init(jax.random.key(0), tokens)["params"]
  target = ".*wte/embedding" if tie_head else ".*lm_head/kernel"
  loss = language_model_loss(model, chunk_size=chunk_size)
  lora = lj.lora(loss, lj.LoraConfig(rank=4, alpha=4.0, target=target))
  adapter = jax.tree.map(
    lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape),
    lora.init(jax.random.key(2), params, batch),
  )

  def merged(adapter):
    return mean(loss(lora.merge(params, adapter), batch))

  got = jax.grad(lambda adapter: mean(lora.apply(params, adapter, batch)))(adapter)
  want = jax.grad(merged)(adapter)
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, atol=0.05 * np.abs(theirs).max(), rtol=0)
