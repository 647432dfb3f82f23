"""Configs as dataclasses: read strictly, and the same on disk as they always were."""

import dataclasses
import json

import pytest

from experiments.classification.config import GlueConfig
from experiments.configs import e2e_budgets, finetune, glue, gpt2_e2e, gpt2_pretrain, gpt3_plan
from experiments.harness.config import flat, read_config, read_output, replace_fields
from experiments.harness.workdir import open_workdir, read_run
from experiments.nlg.config import E2EConfig, FinetuneConfig, PretrainConfig
from experiments.plan.config import PlanConfig

KINDS = {
  E2EConfig: gpt2_e2e.get_config(),
  FinetuneConfig: finetune.get_config(),
  GlueConfig: glue.get_config("roberta_base,mrpc"),
  PretrainConfig: gpt2_pretrain.get_config(),
  PlanConfig: gpt3_plan.get_config(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_keeps_every_field_and_its_format_on_disk(kind, tmp_path):
  source = KINDS[kind]
  config = read_config(kind, source)
  assert dataclasses.asdict(config) == source.to_dict()
  with open_workdir(replace_fields(config, {"workdir": str(tmp_path)})):
    pass
  stored = json.loads((tmp_path / "config.json").read_text())
  plain = json.loads(json.dumps(source.to_dict()))
  del plain["workdir"]
  plain.pop("distributed", None)
  assert stored == plain
  assert read_run(kind, tmp_path) == replace_fields(config, {"workdir": str(tmp_path)})
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lora.rank": "4"}, r"lora\.rank must be an integer, got '4'"),
    ({"lora.rank": True}, r"lora\.rank must be an integer, got True"),
    ({"lora.rank": 4.5}, r"lora\.rank must be an integer, got 4\.5"),
    ({"lora.alpha": "much"}, r"lora\.alpha must be a number, got 'much'"),
    ({"lora.rnk": 4}, r"no field 'lora\.rnk'; did you mean lora\.rank"),
    ({"sed": 4}, "no field 'sed'; did you mean seed"),
    ({"lora": 4}, r"lora must be of type TextLora, got 4"),
    ({"fit.keep": "first"}, r"fit\.keep must be one of best, last, got 'first'"),
    ({"data.packing": 1}, r"data\.packing must be true or false, got 1"),
    ({"experiment": "glue"}, "a config of 'glue', and the experiment is 'gpt2_e2e'. Start it with"),
  ],
)
def test_bad_values_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    replace_fields(read_config(E2EConfig, KINDS[E2EConfig]), changes)


def test_every_variant_of_the_config_files_is_valid():
  for variant in gpt2_e2e.FULL_RANK:
    read_config(E2EConfig, gpt2_e2e.get_config(variant))
  models = [("minilm", "")] + [
    (model, f",{recipe}") for model in glue.PAPER for recipe in ("paper", "scripts")
  ]
  for task in (*glue.glue.TASKS, "boolq", "super_rte", "record"):
    for model, recipe in [*models, ("roberta_large", ",dagger")]:
      read_config(GlueConfig, glue.get_config(f"{model},{task}{recipe}"))
  for variant in ("rates", "seeds"):
    read_config(E2EConfig, e2e_budgets.get_config(variant))


def test_sequences_hold_one_type():
  config = read_config(GlueConfig, KINDS[GlueConfig])
  assert replace_fields(config, {"data.row_lengths": [16, 32]}).data.row_lengths == (16, 32)
  with pytest.raises(ValueError, match=r"data\.row_lengths\[1\] must be an integer, got 'a'"):
    replace_fields(config, {"data.row_lengths": (16, "a")})


def test_a_missing_field_is_named_and_whole_numbers_are_floats():
  values = KINDS[E2EConfig].to_dict()
  del values["optimizer"]["eps"]
  with pytest.raises(ValueError, match=r"the config lacks the field 'optimizer\.eps'"):
    read_config(E2EConfig, values)
  values["optimizer"]["eps"] = 1
  assert isinstance(read_config(E2EConfig, values).optimizer.eps, float)


def test_a_field_that_is_newer_than_a_run_counts_as_its_default(tmp_path):
  """Runs of `finetune` were stored before it had methods."""
  config = replace_fields(
    read_config(FinetuneConfig, KINDS[FinetuneConfig]), {"workdir": str(tmp_path)}
  )
  with open_workdir(config) as workdir:
    (workdir / "result.json").write_text("{}")
  path = tmp_path / "config.json"
  stored = json.loads(path.read_text())
  del stored["method"]
  path.write_text(json.dumps(stored))
  with open_workdir(config):
    pass
  path.write_text(json.dumps(stored))
  other = replace_fields(config, {"method": "full_finetuning"})
  message = "another config: method='lora' there, 'full_finetuning' now"
  with pytest.raises(ValueError, match=message), open_workdir(other):
    pass


def test_a_stored_config_that_cannot_be_read_names_its_folder(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"experiment": "gpt2_e2e", "colour": "red"}))
  with pytest.raises(ValueError, match=rf"{tmp_path}: the config has no field 'colour'"):
    read_run(E2EConfig, tmp_path)


def test_a_run_of_another_experiment_is_refused(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"experiment": "glue"}))
  with pytest.raises(ValueError, match=r"is a run of 'glue', expected a run of 'gpt2_e2e'$"):
    read_run(E2EConfig, tmp_path)


def test_an_ending_of_the_files_is_not_repeated(tmp_path):
  for name in ("a", "a.md", "a.html"):
    assert read_output("--out", tmp_path / name, ".html", ".md") == tmp_path / "a"
  assert read_output("--out", tmp_path / "a.md") == tmp_path / "a.md"
  (tmp_path / "a.md").mkdir()
  with pytest.raises(ValueError, match=r"a\.md is a folder, expected a file"):
    read_output("--out", tmp_path / "a.md", ".html", ".md")


def test_flat_names_are_dotted():
  assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
