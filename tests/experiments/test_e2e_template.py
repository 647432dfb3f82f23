"""The template baseline: every slot's value is in its text, and its run reads like any other."""

import json

import pytest

from experiments import e2e_template
from experiments.e2e_template import describe, run
from experiments.nlg.config import TemplateConfig
from experiments.report import report
from lora_jax.data.sets import e2e
from lora_jax.metrics.slots import parse_slots


def test_a_text_of_all_slots():
  context = (
    "name : Alimentum | Type : coffee shop | food : Italian | price : moderate | "
    "customer rating : average | area : city centre | family friendly : no | near : Café Sicilia"
  )
  assert describe(parse_slots(context)) == (
    "Alimentum is a coffee shop that serves Italian food with a moderate price range . "
    "It has an average customer rating . "
    "It is located in the city centre near Café Sicilia and is not family friendly ."
  )


@pytest.mark.parametrize(
  ("context", "text"),
  [
    ("name : Aromi", "Aromi is a restaurant ."),
    ("name : Aromi | family friendly : yes", "Aromi is a family friendly restaurant ."),
    ("name : Aromi | family friendly : no", "Aromi is a restaurant . It is not family friendly ."),
    ("name : Aromi | food : Fast food", "Aromi is a restaurant that serves fast food ."),
    (
      "name : Aromi | price : £ 20 - 25 | customer rating : 3 out of 5",
      "Aromi is a restaurant with a price range of £ 20 - 25 . "
      "It has a customer rating of 3 out of 5 .",
    ),
    (
      "name : Aromi | area : riverside | near : Ranch",
      "Aromi is a restaurant . It is located in the riverside area near Ranch .",
    ),
  ],
)
def test_texts_of_some_slots(context, text):
  assert describe(parse_slots(context)) == text


def test_every_value_of_the_training_inputs_is_in_the_text():
  for group in e2e.grouped(e2e.read("train")):
    slots = parse_slots(group.context)
    text = describe(slots)
    for name, value in slots.items():
      if name != "family friendly":
        assert value.lower() in text.lower(), group.context
    assert ("family friendly" in text) == ("family friendly" in slots)
    assert ("not family friendly" in text) == (slots.get("family friendly") == "no")
    assert "  " not in text
    assert text.endswith(" .")


@pytest.mark.parametrize(
  ("context", "message"),
  [
    ("name : Aromi | colour : red", "got 'colour : red' in"),
    ("name : Aromi | name : Strada", "got 'name : Strada' in"),
    ("name : Aromi | food", "got 'food' in"),
    ("food : French", "expected a name, got 'food : French'"),
  ],
)
def test_inputs_that_cannot_be_read(context, message):
  with pytest.raises(ValueError, match=message):
    parse_slots(context)


def test_the_run_and_its_scores(tmp_path, capsys):
  folder = tmp_path / "template"
  e2e_template.main([f"--workdir={folder}"])
  result = json.loads((folder / "result.json").read_text("utf-8"))
  assert len((folder / "predictions.txt").read_text("utf-8").splitlines()) == 630
  assert (result["method"], result["trainable_parameters"]) == ("template", 0)
  assert result["valid_loss"] is None
  assert result["num_inputs"] == 630
  assert 55 < result["scores"]["bleu"] < 70
  low, high = result["intervals"]["bleu"]
  assert low < result["scores"]["bleu"] < high
  assert result["scores"]["meteor"] is None
  row = capsys.readouterr().out.splitlines()[-1]
  assert row.startswith("| template ")
  assert f"{result['scores']['bleu']:.2f}" in row
  text = report([folder], tmp_path / "r")
  assert f"| template | {0:>9} | {0:>8} |" in text
  assert "`--against=FOLDER` names a run" in text
  assert run(TemplateConfig(workdir=str(folder))) == result  # not done again
