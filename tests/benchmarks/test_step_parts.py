"""The benchmark of a step's parts: operations are told apart, and changes keep the loss."""

import numpy as np
import pytest

from benchmarks import e2e_epoch, step_parts
from benchmarks.step_parts import LARGE, OTHERS, SMALL
from experiments.harness import flops
from lora_jax.data import batches, text
from lora_jax.models.gpt2.folder import load_gpt2

from tests.tiny_e2e import tiny_folder


@pytest.mark.parametrize("changes", ["none", pytest.param("all", marks=pytest.mark.long)])
def test_matmuls_of_a_profiled_step_are_those_of_its_program(changes, monkeypatch, capsys):
  monkeypatch.setattr(e2e_epoch, "load_base", lambda _: e2e_epoch.Base(*load_gpt2(tiny_folder())))
  counted = []

  def instruction_flops(text):
    counted.append(flops.compiled_flops(text))
    return flops.instruction_flops(text)

  monkeypatch.setattr(step_parts, "instruction_flops", instruction_flops)
  sizes = ["--lines", "12", "--rows", "2", "--row_length", "192", "--turns", "1"]
  step_parts.main([*sizes, "--changes", changes])
  printed = capsys.readouterr().out
  rows = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line
  ]
  large, small, others = (row for row in rows if row[0] in (LARGE, SMALL, OTHERS))
  assert float(large[2]) + float(small[2]) == pytest.approx(counted[0] / 1e9, abs=0.1)
  assert int(large[1]) > 2 * 6
  assert int(others[1]) > 10
  assert sum(float(row[4].removesuffix("%")) for row in (large, small, others)) == pytest.approx(
    100, abs=2
  )
  names = ["unchanged", *(step_parts.CHANGES if changes == "all" else ())]
  assert [row[0] for row in rows[-len(names) :]] == names


def test_operations_are_large_small_or_no_matmuls():
  events = [("fusion.1", 3.0), ("dot.2", 1.0), ("fusion.1", 3.0), ("copy", 1.0)]
  assert step_parts.parts(
    events, {"fusion.1": 9e6, "dot.2": 1e6, "copy": 0.0}, least_large=5e6
  ) == [
    ["large matmuls", "2", "0.0", "6.0", "75%", "3"],
    ["small matmuls", "1", "0.0", "1.0", "12%", "1"],
    ["others", "1", "", "1.0", "12%", ""],
  ]


def test_all_logits_have_the_targets_of_the_batch():
  index = np.asarray([1, 2], np.int32)
  example = text.Example(np.arange(3, dtype=np.int32), np.asarray([7, 9], np.int32), index)
  whole = step_parts.with_all_logits(batches.fill([[example]], 1, 5, 4))
  assert whole["target_index"].tolist() == [[0, 1, 2, 3, 4]]
  assert whole["targets"].tolist() == [[0, 7, 9, 0, 0]]
  assert whole["target_weights"].tolist() == [[0, 1, 1, 0, 0]]


def test_a_change_of_the_loss_stops_the_benchmark():
  step_parts.check({"unchanged": 2.0, "bfloat16": 2.01})
  with pytest.raises(ValueError, match=r"fast math: the first loss differs by 5\.0e-03"):
    step_parts.check({"unchanged": 2.0, "fast math": 2.01})
