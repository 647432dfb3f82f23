"""Runs of prefix methods: slots in the data, decoding without merging, and errors."""

import numpy as np
import pytest

from experiments import export, finetune, glue, gpt2_e2e
from experiments.classification.restore import load_encoder
from experiments.configs import finetune as finetune_configs
from experiments.evaluate import evaluate_run
from experiments.generate import main as generate
from experiments.harness.config import read_config, replace_fields
from experiments.harness.launch import apply
from experiments.harness.methods import check_used, slots_of
from experiments.nlg import e2e as nlg_e2e
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import examples_of, inputs_of
from experiments.nlg.prompts import encode_prompts
from experiments.nlg.restore import load_run
from lora_jax.slots import FIRST_SLOT, Slots

from tests.experiments.test_glue import assert_predicts
from tests.tiny_e2e import tiny_config, tiny_folder, write_pairs
from tests.tiny_glue_run import tiny_config as tiny_glue
from tests.tiny_training import interrupted_at

SLOTS = {"prefix.num_prefix": 2, "prefix.num_infix": 1}
SHORT = {"data.num_train_records": 24, "decoding.num_inputs": 2, "fit.checkpoint_every_steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of LoRA with prefix layers."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  changes = {"method": "lora_prefix_layer", **SLOTS, **SHORT}
  return workdir, gpt2_e2e.run(apply(tiny_config(workdir), changes))


@pytest.mark.long
def test_a_run_trains_and_decodes(finished):
  workdir, result = finished
  lora = 2 * (4 * 4 * (32 + 32) + 2 * 4 * (32 + 128))  # attention's four weights, and the MLP's two
  assert result["trainable_parameters"] == lora + 2 * 3 * 32
  assert len((workdir / "predictions.txt").read_text().splitlines()) == 2
  assert "LoRA+PL" in gpt2_e2e.report(workdir, result)
  for flags in ([], ["--merged"]):
    with pytest.raises(SystemExit, match=r"of lora_prefix_layer: .* cannot be merged"):
      export.main([str(workdir), str(workdir.parent / "out"), *flags])


@pytest.mark.long
def test_a_finished_run_is_restored_generates_and_is_evaluated(finished, capsys):
  workdir, result = finished
  run = load_run(workdir)
  contexts = [group.context for group in inputs_of(run.config)]
  assert run.generate(contexts) == (workdir / "predictions.txt").read_text().splitlines()
  generate([str(workdir), "name : Blue Spice", "--max_new_tokens=4"])
  assert capsys.readouterr().out.strip()
  served = evaluate_run(workdir, {"rounded_to": "Q4_0"})
  assert 0 < abs(served["valid_loss"] - result["valid_loss"]) < 0.2


@pytest.mark.long
def test_a_mesh_changes_nothing(finished, tmp_path):
  _, result = finished
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "decoding.num_inputs": 0}
  changes = {"method": "lora_prefix_layer", **SLOTS, **SHORT, **mesh}
  other = gpt2_e2e.run(apply(tiny_config(tmp_path), changes))
  assert other["valid_loss"] == pytest.approx(result["valid_loss"], rel=1e-4)


@pytest.mark.long
def test_an_interrupted_run_resumes_to_the_same_bits(finished, tmp_path):
  workdir, result = finished
  config = apply(tiny_config(tmp_path), {"method": "lora_prefix_layer", **SLOTS, **SHORT})
  with interrupted_at(2):
    gpt2_e2e.run(config)
  resumed = gpt2_e2e.run(config)
  assert resumed["valid_loss"] == result["valid_loss"]
  same = [(path / "predictions.txt").read_text() for path in (workdir, tmp_path)]
  assert same[0] == same[1]


def test_slots_are_around_each_prompt_and_count_as_tokens(tmp_path):
  changes = {"method": "prefix_embedding", **SLOTS, "data.max_length": 131}
  config = read_config(E2EConfig, apply(tiny_config(tmp_path), changes))
  assert slots_of(config) == Slots(2, 1)
  assert slots_of(replace_fields(config, {"method": "lora"})) == Slots()
  base = load_base(config, config.mesh.make())
  examples = examples_of(config, base, "valid")
  plain = examples_of(
    replace_fields(config, {"method": "lora", "data.max_length": 128}), base, "valid"
  )
  for example, other in zip(examples, plain, strict=True):
    assert example.tokens[:2].tolist() == [FIRST_SLOT, FIRST_SLOT + 1]
    assert example.tokens[example.target_index[0]] == FIRST_SLOT + 2
    np.testing.assert_array_equal(example.tokens[example.tokens < FIRST_SLOT], other.tokens)
    np.testing.assert_array_equal(example.target_index, other.target_index + 3)


def test_slots_are_around_each_decoded_prompt(tmp_path, monkeypatch):
  changes = {"method": "prefix_embedding", "prefix.num_prefix": 240, "prefix.num_infix": 1}
  config = read_config(E2EConfig, apply(tiny_config(tmp_path), changes))
  base, decoded = load_base(config, config.mesh.make()), []

  def search(decoder, params, prompts, *_, **__):
    decoded.extend(prompts)
    raise StopIteration

  monkeypatch.setattr(nlg_e2e, "beam_search", search)
  with pytest.raises(StopIteration):
    nlg_e2e.generate(config, base, {}, ["name : Blue Spice | Type : pub"], config.mesh.make())
  (prompt,) = decoded
  assert len(prompt) == 256 - 8  # the context is cut in front, and no slot is
  words = prompt[240:-1]
  assert prompt == Slots(240, 1).around(words)
  assert words == encode_prompts(base, ["name : Blue Spice | Type : pub"])[0][-7:]


@pytest.mark.long
@pytest.mark.parametrize("num_infix", [0, 1])
def test_finetune_answers_and_writes_no_merged_model(num_infix, tmp_path, capsys):
  write_pairs(tmp_path / "data.jsonl", 40)
  changes = {
    "workdir": str(tmp_path / "run"),
    "method": "prefix_embedding",
    "model.folder": str(tiny_folder()),
    "data.file": str(tmp_path / "data.jsonl"),
    "data.num_epochs": 1,
    "data.batch_size": 4,
    "prefix.num_prefix": 2,
    "prefix.num_infix": num_infix,
    "samples.count": 2,
    "samples.max_new_tokens": 4,
  }
  result = finetune.run(apply(finetune_configs.get_config(), changes))
  assert result["trainable_parameters"] == (2 + num_infix) * 32
  assert len(result["samples"]) == 2
  assert not (tmp_path / "run" / "model").exists()
  printed = capsys.readouterr().out
  folder = tmp_path / "run" / ("adapter" if num_infix else "peft")
  assert f"wrote      {folder}" in printed
  if num_infix:
    assert f'# python -m experiments.generate {tmp_path / "run"} "PROMPT"' in printed
  else:  # PEFT's prompt tuning
    assert "slots = lora_jax.Slots(2)" in printed
    assert '"PROMPT_TUNING"' in (folder / "adapter_config.json").read_text()
  prompt = result["samples"][0]["prompt"]
  generate([str(tmp_path / "run"), prompt, "--max_new_tokens=4"])
  assert capsys.readouterr().out.strip() == result["samples"][0]["generated"].strip()


@pytest.mark.long
@pytest.mark.parametrize("method", ["prefix_layer", "lora_prefix_embedding"])
def test_a_classifier_is_trained_with_its_head(method, tmp_path):
  config = apply(tiny_glue(tmp_path / "run"), {"method": method, **SLOTS, "fit.num_epochs": 1})
  result = glue.run(config)
  lora = config.lora.rank * 2 * 2 * 32 if method == "lora_prefix_embedding" else 0
  assert result["trainable_parameters"] - result["head_parameters"] == lora + 3 * 32
  assert result["head_parameters"] > 32
  run = load_encoder(tmp_path / "run")
  assert_predicts(run, tmp_path / "run")
  with pytest.raises(SystemExit, match=r"cannot be merged, .*load_encoder\(folder\)"):
    export.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merged"])
  with pytest.raises(ValueError, match=f"a run of {method} cannot be merged"):
    run.save_merged(tmp_path / "merged")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"prefix.num_prefix": 0, "prefix.num_infix": 0}, "leave no slot; raise one of them"),
    ({"prefix.num_prefix": 600}, "max_new_tokens=9 must be at most the model's positions but 608"),
    (
      {"prefix.num_prefix": 600, "decoding.num_inputs": 0},
      "the 608 slots of prefix.num_prefix and prefix.num_infix leave no room in",
    ),
  ],
  ids=["none", "decoding", "training"],
)
def test_bad_numbers_of_slots_are_refused(changes, message, tmp_path):
  config = apply(tiny_config(tmp_path), {"method": "prefix_embedding", **changes})
  with pytest.raises(ValueError, match=message):
    gpt2_e2e.run(config)


def test_slots_have_no_effect_on_other_methods():
  with pytest.raises(ValueError, match=r"=2 has no effect with method=lora: .*prefix_emb"):
    check_used("lora", {"prefix.num_prefix": 2}, "gpt2_e2e")
