"""The benchmark of the chunked loss: equal gradients and operations, less memory."""

import argparse

import jax.numpy as jnp
import pytest

from benchmarks import chunked_loss


def test_chunks_have_the_operations_and_a_part_of_the_memory_of_all_tokens(monkeypatch):
  monkeypatch.setattr(chunked_loss, "TINY", (1, 64, 16, 1024, (8,)))
  options = argparse.Namespace(tiny=True, turns=1)
  whole, chunked = chunked_loss.measure(options, is_trained=True)
  assert (whole[:2], chunked[:2]) == (["trained", "all"], ["trained", "8"])
  assert len(whole) == len(chunked) == len(chunked_loss.HEADS) + 1
  assert whole[2] == chunked[2] == f"{3 * 2 * 64 * 16 * 1024 / 1e9:.4g}"
  assert float(chunked[4]) < 0.5 < float(whole[4]) == 1.0
  assert chunked[-1].startswith("mb 0.25: ")
  assert ", s 1.05: " in chunked[-1]


def test_gradients_that_differ_stop_the_benchmark():
  expected = (jnp.ones(()), {"states": jnp.ones(2)})
  chunked_loss.check({"all": expected, "4": expected})
  other = (jnp.ones(()), {"states": jnp.asarray([1.0, 1.001])})
  with pytest.raises(ValueError, match=r"chunks of 4: a loss or gradient differs by 1\.0e-03"):
    chunked_loss.check({"all": expected, "4": other})
