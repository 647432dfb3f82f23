"""An adapter of a scanned model allocates its own weights, and nothing of the base model."""

import gc

import pytest

from benchmarks.scanned_base import main, measure


@pytest.fixture
def _quick_collections():
  """Leaves the objects of earlier tests out of garbage collections, which take seconds."""
  gc.freeze()
  yield
  gc.unfreeze()


@pytest.mark.long
def test_a_narrow_model_has_heads(capsys):
  main(["--width", "8", "--mlp_dim", "8", "--num_layers", "1", "--num_adapters", "1"])
  assert "adapter 0: weights" in capsys.readouterr().out


@pytest.mark.usefixtures("_quick_collections")
def test_each_adapter_allocates_its_own_weights_only():
  sizes = measure(width=36, mlp_dim=48, num_layers=3, num_adapters=2)
  assert sizes["allocated"] == sizes["adapter"]
  assert len(sizes["adapter"]) == 2
  assert sizes["base"][0] == 3 * 4 * (36 * (32 + 16 + 16) + 32 * 36 + 3 * 36 * 48 + 2 * 36)
