"""Greedy decoding is argmax at each step, and a nucleus follows its definition."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.decoding import CachedModel, SamplingConfig, from_linen, generate
from lora_jax.decoding.sampling import in_nucleus
from lora_jax.models.gpt2.folder import load_gpt2
from lora_jax.models.gpt2.model import GPT2, init_cache

from tests.paths import GOLDEN

FOLDER = GOLDEN / "beam"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
PROMPTS = GOLDEN["prompts"][:24]
EOS_IDS = tuple(GOLDEN["eos_ids"])


@pytest.fixture(scope="module")
def params():
  return load_gpt2(FOLDER)[1]


@pytest.fixture(scope="module")
def model():
  config, _ = load_gpt2(FOLDER)
  return from_linen(GPT2(config), functools.partial(init_cache, config), config.num_positions)


def test_greedy_decoding_is_that_of_transformers(model, params):
  case = next(case for case in GOLDEN["cases"] if case["settings"]["num_beams"] == 1)
  config = SamplingConfig(EOS_IDS, temperature=0, max_new_tokens=case["settings"]["max_new_tokens"])
  ids = generate(model, params, PROMPTS, config)
  assert ids == [[t for t in tokens if t not in EOS_IDS] for tokens in case["tokens"]]


def test_samples_do_not_depend_on_the_batch(model, params):
  config = SamplingConfig(EOS_IDS, temperature=1.5, top_p=0.95, max_new_tokens=12)
  whole = generate(model, params, PROMPTS[:9], config, jax.random.key(1))
  parts = generate(
    model, params, PROMPTS[:9], config, jax.random.key(1), batch_size=4, length_multiple=24
  )
  assert whole == parts
  assert whole != generate(model, params, PROMPTS[:9], config, jax.random.key(2))


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
  logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))
  for top_p, expected in [
    (0.35, [[0, 1, 0, 0], [1, 1, 0, 0]]),
    (0.65, [[0, 1, 0, 1], [1, 1, 1, 0]]),
    (0.95, [[1, 1, 1, 1], [1, 1, 1, 1]]),
  ]:
    np.testing.assert_array_equal(in_nucleus(logits, top_p), np.array(expected, bool))


def test_sampling_follows_the_probabilities_of_the_nucleus():
  probabilities = jnp.array([0.5, 0.3, 0.15, 0.05])
  constant = CachedModel(
    extend=lambda params, tokens, positions, cache, index, mask: (tokens[..., None] * 0.0, cache),
    logits=lambda params, hidden: jnp.broadcast_to(jnp.log(probabilities), (*hidden.shape[:-1], 4)),
    make_cache=lambda batch_size, num_slots: jnp.zeros((batch_size, num_slots)),
    max_positions=9,
  )
  config = SamplingConfig((), top_p=0.8, max_new_tokens=1)
  ids = generate(constant, {}, [[1]] * 4000, config, jax.random.key(0), batch_size=4000)
  shares = np.bincount([tokens[0] for tokens in ids], minlength=4) / len(ids)
  np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)
