"""Models of each architecture compute in llama.cpp what they compute here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.served.tiny_models import CONFIGS, make_tiny

pytestmark = pytest.mark.served
PROMPT = np.random.default_rng(5).integers(0, 200, 13).tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_probabilities_are_those_of_llama_cpp(name, llama_cpp, tmp_path):
  tiny = make_tiny(tmp_path, name)
  ours = jax.nn.softmax(tiny.call(tiny.params, jnp.asarray([PROMPT]))[0])
  theirs = jax.nn.softmax(jnp.asarray(llama_cpp.logits(tiny.path, PROMPT)))
  print(name, np.abs(ours - theirs).max())
