"""The loss is the paper's code's; chunks, packing and padding change nothing but the time."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.data import text
from lora_jax.data.batches import packed_batches, padded_batches
from lora_jax.data.sets import e2e
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer
from lora_jax.training.loss import LossSum, cross_entropy, language_model_loss, mean

from tests.tiny_e2e import EMBEDDED
from tests.tiny_training import batches, fresh_params, model
from tests.toy_models import randomized, relative_difference

KEY = jax.random.key(0)
QUERY = r".*/query/kernel"


def reference(logits, targets, mask, eps):
  """The loss as microsoft/LoRA computes it, in float64."""
  logits = np.asarray(logits, np.float64)
  logprobs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
  nll = -np.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
  smooth = -np.mean(logprobs, -1)
  return np.sum(((1 - eps) * nll + eps * smooth) * mask) / (np.sum(mask) + 1e-4)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_the_loss_equals_the_reference(eps):
  draw = np.random.default_rng(0)
  logits = draw.standard_normal((3, 5, 11)).astype(np.float32) * 4
  targets, mask = draw.integers(0, 11, (3, 5)), draw.integers(0, 2, (3, 5)).astype(np.float32)
  got = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask), eps)
  assert float(got.weight) == mask.sum()
  np.testing.assert_allclose(mean(got), reference(logits, targets, mask, eps), rtol=1e-6)


def test_weights_scale_or_exclude_tokens():
  draw = np.random.default_rng(0)
  logits, targets = jnp.asarray(draw.standard_normal((4, 7)), jnp.bfloat16), jnp.arange(4)
  each = [cross_entropy(logits[i], targets[i], jnp.ones(())).total for i in range(4)]
  weights = jnp.asarray([0.0, 1.0, 2.0, 0.5])
  got = cross_entropy(logits, targets, weights)
  assert got.total.dtype == jnp.float32
  np.testing.assert_allclose(got.total, np.dot(weights, each), rtol=1e-6)
  np.testing.assert_allclose(got.weight, 3.5)


def value_and_grad(adaptation, params):
  """Returns a function from a trainable tree and a batch to its loss and gradient."""

  @jax.jit
  def batch_loss(trainable, batch):
    def total(trainable):
      loss = adaptation.apply(params, trainable, batch, lora_key=None)
      return loss.total, loss

    (_, loss), grads = jax.value_and_grad(total, has_aux=True)(trainable)
    return loss, grads

  return batch_loss


def lora(target, **options):
  return partial(lj.lora, config=lj.LoraConfig(4, 8.0, target, **options))


METHODS = {
  "tied embedding": lora([QUERY, "wte/embedding"]),
  "extra embedding": lora(QUERY, extra="wte/embedding"),
  "full": lj.full_finetuning,
}


@pytest.mark.parametrize(
  ("name", "scan_layers"),
  [
    ("tied embedding", True),
    pytest.param("extra embedding", False, marks=pytest.mark.long),
    ("full", False),
  ],
)
def test_chunks_change_nothing(name, scan_layers):
  shape = {"scan_layers": scan_layers, "num_layers": 1}
  module, params = model(**shape)[0], fresh_params(**shape)
  batch = batches()[0]
  whole, chunked = (METHODS[name](language_model_loss(module, 0.1, c)) for c in (None, 4))
  trainable = whole.init(KEY, params, batch)
  if name != "full":
    trainable = randomized(trainable)
  expected, expected_grads = value_and_grad(whole, params)(trainable, batch)
  got, grads = value_and_grad(chunked, params)(trainable, batch)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert relative_difference(grads, expected_grads) < 1e-5
  merged = whole.merge(params, trainable)
  np.testing.assert_allclose(
    jax.jit(language_model_loss(module, 0.1))(merged, batch), expected, rtol=1e-5
  )


def test_an_indivisible_chunk_is_refused():
  module, params = model()
  with pytest.raises(ValueError, match="chunk_size 7 must divide the 20 target tokens of a row"):
    language_model_loss(module, chunk_size=7)(params, batches()[0])


def test_the_head_is_applied_to_targets_only():
  """No logits of all positions: 32 tokens a row, 20 of them targets."""
  module, params = model()
  jaxpr = str(jax.make_jaxpr(language_model_loss(module))(params, batches()[0]))
  assert "f32[8,20,64]" in jaxpr
  assert "f32[8,32,64]" not in jaxpr


@cache
def e2e_examples():
  tokenizer = load_tokenizer(EMBEDDED, 8192)
  records = e2e.read("train")[:12]
  return text.encode(tokenizer, records, end_of_text_id(tokenizer), 512)


def summed(batches):
  """Returns the loss over all batches and its gradient for LoRA's factors."""
  module, params = model(num_layers=1, vocab_size=8192, num_positions=512)
  adaptation = lora(QUERY)(language_model_loss(module, 0.1))
  trainable = randomized(adaptation.init(KEY, params, batches[0]))
  batch_loss = value_and_grad(adaptation, params)
  parts = [batch_loss(trainable, batch) for batch in batches]
  return jax.tree.map(lambda *leaves: sum(leaves), *parts)


def test_packed_and_padded_examples_have_the_same_loss_and_gradients():
  examples, shape = e2e_examples(), {"batch_size": 4, "seed": 3}
  packed = packed_batches(examples, row_length=192, loss_length=112, **shape)
  padded = padded_batches(examples, row_lengths=[128], loss_length=96, **shape)
  reference = padded_batches(examples, row_lengths=[512], loss_length=128, **shape)
  assert len(packed) < len(padded) == len(reference)
  expected, expected_grads = summed(packed)
  assert isinstance(expected, LossSum)
  assert float(expected.weight) == sum(len(example.targets) for example in examples)
  for other in (padded, reference):
    got, grads = summed(other)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert relative_difference(grads, expected_grads) < 1e-5
