"""The benchmark of concurrent runs: its losses are checked against the ordinary steps."""

import jax.numpy as jnp
import pytest

from benchmarks import concurrent

FEW = ["--tiny", "--runs", "2", "--batch", "1", "--length", "4", "--turns", "1"]


@pytest.mark.long
def test_the_table_has_a_row_for_each_number_of_runs(monkeypatch):
  monkeypatch.setattr(concurrent, "TINY", concurrent.TINY | {"num_layers": 1})
  alone, both = concurrent.measure(concurrent.parse(FEW), 4)
  assert alone[:2] == ["4", "alone"]
  assert both[:2] == ["4", "2"]
  assert alone[4] == "1.00 (1.00-1.00)"


def test_without_turns_no_step_is_made(monkeypatch):
  def never():
    raise AssertionError("a step")

  programs = {
    "random_params": lambda *args: {},
    "make_runs": lambda loss, params, batches: batches,
    "one_run": lambda loss, run: concurrent.Way(never, 1, 2_000_000),
    "all_runs": lambda loss, runs: concurrent.Way(never, len(runs), 5_000_000),
  }
  for name, fake in programs.items():
    monkeypatch.setattr(concurrent, name, fake)
  table = concurrent.measure(concurrent.parse([*FEW, "--turns", "0"]), 4)
  assert table == [["4", "alone", "", "", "", "2"], ["4", "2", "", "", "", "5"]]


def test_losses_that_differ_stop_the_benchmark():
  concurrent.check(jnp.asarray([2.0, 1.0]), jnp.asarray([2.0]), 1e-4)
  with pytest.raises(ValueError, match=r"2 runs: the first loss differs by 1\.0e-03"):
    concurrent.check(jnp.asarray([2.002, 1.0]), jnp.asarray([2.0]), 1e-4)
