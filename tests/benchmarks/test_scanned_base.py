"""An adapter of a scanned model allocates its own weights, and nothing of the base model."""

from benchmarks.scanned_base import measure


def test_each_adapter_allocates_its_own_weights_only():
  sizes = measure(width=36, mlp_dim=48, num_layers=3, num_adapters=2)
  assert sizes["allocated"] == sizes["adapter"]
  assert len(sizes["adapter"]) == 2
  assert sizes["base"][0] == 3 * 4 * (36 * (32 + 16 + 16) + 32 * 36 + 3 * 36 * 48 + 2 * 36)
