"""The benchmark of the methods' steps prints a row for each, and covers every method."""

import pytest

from benchmarks import variants
from experiments.configs.variants import ARMS
from experiments.harness.methods import METHODS


def test_it_has_every_method_that_trains_on_floats():
  left_out = {name for name, method in METHODS.items() if method.trains} - set(variants.ALL)
  assert left_out <= {*variants.LEFT_OUT, "head_only"}


def test_the_tokens_of_the_comparison_are_in_every_model():
  model = variants.make_model(variants.parse(["--model=tiny"]))
  assert model.config.vocab_size > max(ARMS["trainable_tokens"].changes["lora.tokens"])


@pytest.mark.parametrize("flag", ["--turns", "--batch", "--length"])
def test_a_count_of_0_is_refused(flag, capsys):
  with pytest.raises(SystemExit):
    variants.parse([flag, "0"])
  assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.long
def test_the_table_has_ratios_to_lora(monkeypatch, capsys):
  monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)  # it is for whole processes
  flags = ["--model=tiny", "--batch=2", "--length=16", "--turns=2"]
  variants.main([*flags, "--only", "dora", "full_finetuning"])
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
  head, _, lora, dora, full = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
  assert head == variants.HEADS
  assert [row[0] for row in (lora, dora, full)] == ["LoRA", "DoRA", "full fine-tuning"]
  assert {lora[i] for i, name in enumerate(head) if name == "x"} == {"1.000", "1.00"}
  assert 1.0 < float(dora[3]) < float(full[3])  # operations
  assert float(full[1]) > float(dora[1]) > float(lora[1])  # trained parameters
  assert float(full[-1]) > 1.5  # memory
