"""MNLI as text: prompts and label words of both formats, errors of bad rows, the real subset."""

import json

import pytest

from lora_jax.data.sets import glue, mnli_text
from lora_jax.metrics import exact_match

from tests.paths import SHARED
from tests.tiny_glue import write_glue
from tests.tiny_text_sets import PAIRS, write_mnli_subset

REAL = SHARED / "data" / "glue" / "subset10k" / "MNLI"


def test_a_record_is_a_prompt_and_a_label_word(tmp_path):
  records = mnli_text.read("valid", write_mnli_subset(tmp_path), any_size=True)
  assert records[0] == (
    "Premise: A man sleeps. Hypothesis: He is awake. Label:",
    "contradiction",
  )
  assert records[3].context == "Premise: The shop is closed. Hypothesis: The shop is open. Label:"
  assert len(records) == len(PAIRS)


def test_glues_own_files_give_the_same_prompts(tmp_path):
  rows = glue.read("mnli", "validation_matched", write_glue(tmp_path), any_size=True)
  records = mnli_text.prompts(glue.records("mnli", rows))
  assert records[:2] == [
    ("Premise: red Hypothesis: red Label:", "entailment"),
    ("Premise: red Hypothesis: blue Label:", "neutral"),
  ]


@pytest.mark.parametrize("record", [("a", "b", None), ("a", None, 1), ("a", "b", 3)])
def test_a_hidden_label_or_a_single_text_is_refused(record):
  with pytest.raises(ValueError, match="record 1: expected two texts and a label from 0 to 2"):
    mnli_text.prompts([glue.Record("a", "b", 0), glue.Record(*record)])


def test_the_majority_is_the_floor(tmp_path):
  records = mnli_text.read("train", write_mnli_subset(tmp_path), any_size=True)
  assert mnli_text.majority(records) == "contradiction"
  with pytest.raises(ValueError, match="at least one record"):
    mnli_text.majority([])


ROW = {"text_a": "a", "text_b": "b", "label": "neutral"}


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ({"0": ROW, "2": ROW}, r"dev\.json: row '2': expected the rows in order, here 1"),
    ({"0": ROW | {"label": "yes"}}, r"dev\.json: row '0': expected a label of entailment, .*'yes'"),
    ({"0": ROW | {"text_b": ""}}, r"dev\.json: row '0': expected text_b to be a text that is not"),
    ({"0": {"text_a": "a", "label": "neutral"}}, r"row '0': expected the field text_b"),
    ({"0": "a"}, r"row '0': expected an object"),
    ([ROW], r"dev\.json: expected a JSON object, got list"),
    ({}, r"dev\.json: expected 1,000 rows, got 0"),
  ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
  (tmp_path / "dev.json").write_text(json.dumps(rows))
  with pytest.raises(ValueError, match=message):
    mnli_text.read("valid", tmp_path, any_size=True)


def test_missing_rows_files_and_splits_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"MNLI, subset of 10,000 file train\.json.*GLUE"):
    mnli_text.read("train", tmp_path)
  write_mnli_subset(tmp_path)
  with pytest.raises(ValueError, match=r"train\.json: expected 8,999 rows, got 4\."):
    mnli_text.read("train", tmp_path)
  with pytest.raises(ValueError, match="must be one of train, valid, got 'test'"):
    mnli_text.read("test", tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="MNLI's subset is not beside this checkout")
def test_the_real_subset():
  assert [len(mnli_text.read(split, REAL)) for split in mnli_text.FILES] == [8999, 1000]
  guess = mnli_text.majority(mnli_text.read("train", REAL))
  answers = [[record.completion] for record in mnli_text.read("valid", REAL)]
  assert exact_match([guess] * 1000, answers).score() == pytest.approx(34.7)
