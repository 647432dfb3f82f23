"""The benchmark of switching runs, without PEFT, and stops where the ways disagree."""

import jax
import numpy as np
import pytest

from benchmarks import switch

SMALL = ["--megabytes", "1", "--width", "64", "--vocabulary", "64", "--length", "4"]


def test_the_benchmark_prints_its_table(capsys):
  with jax.numpy_rank_promotion("allow"):
    seconds = switch.main([*SMALL, "--repeats", "3", "--alone"])
  assert {name: len(turns) for name, turns in seconds.items()} == {
    "lora_jax": 3,
    "lora_jax merged": 3,
  }
  row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("lora_jax "))
  assert row.split()[-2:] == ["1.00", "1"]


def test_ways_that_disagree_stop_the_benchmark():
  def way(value):
    return lambda task: (0.0, 0.0, np.asarray([1.0, value]))

  switch.compare({"one": way(0.5), "two": way(0.5)}, 1)
  with pytest.raises(ValueError, match=r"the logits of two differ by 1\.0e-01"):
    switch.compare({"one": way(0.5), "two": way(0.6)}, 1)
