"""ROUGE of summaries: counted by hand, and lead-3's on SAMSum."""

import importlib.util

import pytest

from lora_jax import metrics
from lora_jax.data.sets import samsum

from tests.paths import SHARED

REAL = SHARED / "data" / "samsum"


def test_f1_of_stemmed_words_pairs_and_the_longest_common_subsequence():
  scores = metrics.rouge(
    ["The CATS sat on a mat!", "on mats sat dogs", ""],
    [["a cat sat on the mat"], ["dogs sat on mats", "dogs"], ["nothing"]],
  )
  # Sorted words: all six agree; the pairs "cat sat", "sat on" of five; "cat sat on mat" of six.
  # "on mats" is one pair of three; "on mats" two words of four.
  assert scores["rouge1"].rows[:, 0] == pytest.approx([100, 100, 0])
  assert scores["rouge2"].rows[:, 0] == pytest.approx([40, 100 / 3, 0])
  assert scores["rougeL"].rows[:, 0] == pytest.approx([100 * 4 / 6, 50, 0])
  assert scores["rouge1"].score() == pytest.approx(200 / 3)


def test_each_metric_takes_its_best_reference():
  scores = metrics.rouge(["a b c d"], [["d c b a", "a b x y z"]])
  assert scores["rouge1"].score() == 100  # the first
  assert scores["rouge2"].score() == pytest.approx(100 * 2 / (3 + 4))  # the second


def test_without_the_package_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"rouge_score was not found; pip install lora-jax\[metric"):
    metrics.rouge(["a"], [["a"]])


@pytest.mark.skipif(not REAL.is_dir(), reason="SAMSum's files are not beside this checkout")
def test_the_floor_of_lead_3_on_samsum():
  records = samsum.read("test", REAL)
  scores = metrics.rouge(
    [samsum.lead(record.context) for record in records],
    [[record.completion] for record in records],
  )
  actual = {name: statistics.score() for name, statistics in scores.items()}
  expected = {"rouge1": 31.308, "rouge2": 8.677, "rougeL": 24.166}
  assert actual == pytest.approx(expected, abs=1e-3)
