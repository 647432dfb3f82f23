"""The benchmark of LoRA against full fine-tuning, at toy sizes."""

import pytest

from benchmarks import full_finetuning


@pytest.mark.long
def test_each_method_has_a_row_and_lora_needs_fewer_operations_and_bytes(monkeypatch):
  monkeypatch.setattr(full_finetuning, "missing_peers", lambda: ["torch"])
  shape = {**full_finetuning.TINY, "embed_dim": 256, "num_heads": 4}
  monkeypatch.setattr(full_finetuning, "TINY", shape)
  options = full_finetuning.parse(["--tiny", "--turns", "1", "--remat", "none"])
  head, lora, full = full_finetuning.compare(options)
  assert head == full_finetuning.HEADS
  assert (lora[:2], full[:2]) == (["none", "LoRA"], ["none", "full"])
  assert float(lora[2]) < 0.05 * float(full[2])
  assert float(lora[5]) < 0.9 < float(full[5]) == 1.0
  assert lora[-1].startswith("mb 0.45: ")


@pytest.mark.long
def test_the_memory_of_a_process_has_a_row(monkeypatch, capsys):
  monkeypatch.setattr(full_finetuning, "missing_peers", lambda: ["torch"])
  full_finetuning.main(["--tiny", "--peak", "--remat", "none"])
  rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
  assert [row[3] for row in rows[2:]] == ["LoRA", "full"]
  assert [int(row[5]) for row in rows[2:]] == [0, 0]  # less than a megabyte of weights
  assert all(int(row[9]) > 0 for row in rows[2:])


def test_goals_are_compared_with_the_ratios():
  assert full_finetuning.goals("none", 0.46, 0.73) == "mb 0.45: MISSED, s 0.73: met"
  assert full_finetuning.goals("nothing_saveable", 0.45, 0.81) == "mb 0.45: met, s 0.8: MISSED"
  policy = "dots_with_no_batch_dims_saveable"
  assert full_finetuning.goals(policy, 0.1, 0.1) == "mb 0.45: met"


def test_losses_that_differ_stop_the_benchmark():
  full_finetuning.check_losses({"LoRA none": 10.0, "full none": 10.0005})
  with pytest.raises(ValueError, match=r"the losses before the first update differ by 1\.0e-03"):
    full_finetuning.check_losses({"LoRA none": 10.0, "full none": 10.01})
