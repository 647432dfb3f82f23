"""Verdicts on groups of runs, from losses and texts in their folders."""

import json

import pytest

from experiments.comparison import verdicts
from experiments.comparison.statistics import Difference
from experiments.harness.config import flat
from experiments.harness.runs import Run
from experiments.harness.workdir import write_json
from experiments.nlg.groups import group_runs
from lora_jax.data.sets import e2e

from tests.tiny_e2e import tiny_config

INPUTS = e2e.grouped(e2e.read("test"))[:4]
LOSSES = {"lora1": 1.0, "lora2": 1.0002, "rank8": 1.003, "full": 1.2, "frozen": 0.5}
RUNS = {  # their method, rank and seed
  "lora1": ("lora", 4, 1),
  "lora2": ("lora", 4, 2),
  "rank8": ("lora", 8, 1),
  "full": ("full_finetuning", 4, 1),
  "frozen": ("frozen_base", 4, 1),
}


def run(root, name):
  """Makes a run's folder with the losses of four inputs of ten tokens each, and with texts."""
  method, rank, seed = RUNS[name]
  (root / name).mkdir()
  sums = [10 * (LOSSES[name] + by_input) for by_input in (-0.2, -0.1, 0.1, 0.2)]
  write_json(root / name / "losses.json", {"input_losses": sums, "input_tokens": [10] * 4})
  texts = ["A place ." if name == "full" else group.references[0] for group in INPUTS]
  (root / name / "predictions.txt").write_text("\n".join(texts) + "\n")
  settings = flat(json.loads(tiny_config(root / name).to_json()))
  settings |= {"method": method, "lora.rank": rank, "seed": seed, "decoding.num_inputs": 4}
  result = {"method": method, "seed": seed, "valid_loss": LOSSES[name], "scores": {"bleu": 50.0}}
  return Run(root / name, settings, result)


def last_cells(table):
  """Returns the last cells of a table's rows."""
  return [line.split("|")[-2].strip() for line in table.splitlines() if line.startswith("|")][2:]


def test_claims_are_decided_by_loss_first_and_by_bleu_second(tmp_path):
  runs = [run(tmp_path, name) for name in RUNS]
  text = verdicts.decide(group_runs(runs), tmp_path / "lora2")
  assert text.startswith("## Decided against LoRA, rank 4\n")
  by_loss, by_bleu = text.split("By validation loss, nats/token, with a margin of 0.02.")
  assert " +0.003 |" in by_loss
  assert last_cells(by_loss) == ["equivalent", "worse", "better"]
  assert last_cells(by_bleu) == ["equivalent", "worse", "equivalent"]
  assert "By BLEU, with a margin of 1:" in by_bleu


def test_groups_that_cannot_be_compared_are_named(tmp_path):
  runs = [run(tmp_path, name) for name in RUNS]
  write_json(tmp_path / "full" / "losses.json", {"input_losses": [9.0], "input_tokens": [9]})
  text = verdicts.decide(group_runs(runs[:4]))
  assert "Without losses on the same inputs (`--losses`): full fine-tuning." in text
  text = verdicts.decide(group_runs([runs[0], runs[2]]))
  assert "Nothing can be told: no second group has the control's inputs, or none a second" in text
  assert verdicts.decide(group_runs(runs[:2])) == ""


@pytest.mark.parametrize(
  ("ends", "verdict"),
  [
    ((10.0, 8.0, 12.0, 2.5), "better"),
    ((-10.0, -12.0, -8.0, 2.5), "worse"),
    ((1.4, 0.1, 2.7, 1.8), "cannot be told"),  # a smaller difference than would be detected
    ((0.1, -0.4, 0.6, 0.7), "equivalent"),
  ],
)
def test_a_verdict_by_bleu(ends, verdict):
  assert verdicts.bleu_verdict(Difference(*ends)) == verdict


def test_losses_by_input_are_measured_where_they_are_missing(tmp_path, monkeypatch):
  """A run whose adapter is gone is named; a floor has no model."""
  runs = [run(tmp_path, name) for name in RUNS]
  runs[4].result["method"] = "floor"
  for i in (1, 2, 4):
    (runs[i].folder / "losses.json").unlink()

  def measured(folder):
    if folder.name == "lora2":
      raise FileNotFoundError(f"{folder} has no adapter")
    return {"input_losses": [9.0], "input_tokens": [9]}

  monkeypatch.setattr(verdicts, "measure_losses", measured)
  assert verdicts.measure(runs) == (
    f"Losses by input could not be measured: `{tmp_path / 'lora2'}` ({tmp_path / 'lora2'} has no "
    "adapter)."
  )
  assert json.loads((tmp_path / "rank8" / "losses.json").read_text())["input_tokens"] == [9]
  assert "input_losses" in (tmp_path / "full" / "losses.json").read_text()
  assert not (tmp_path / "frozen" / "losses.json").exists()
