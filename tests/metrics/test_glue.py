"""GLUE's metrics against scikit-learn 1.9.1 and scipy 1.17.1.

Their figures are numbers here, which `python -m tests.metrics.test_glue` prints again if
both are installed.
"""

import numpy as np
import pytest

from lora_jax.metrics import glue

DRAW = np.random.default_rng(0)


def _agreeing(share, predicted, labels):
  return np.where(DRAW.random(len(labels)) < share, labels, predicted)


TWO, TWO_LABELS = DRAW.integers(0, 2, 200), DRAW.integers(0, 2, 200)
TWO = _agreeing(0.4, TWO, TWO_LABELS)
THREE, THREE_LABELS = DRAW.integers(0, 3, 200), DRAW.integers(0, 3, 200)
SCORES, SCORE_LABELS = np.round(DRAW.random((2, 200)) * 5, 1)
SCORES = np.round(0.5 * SCORES + 0.5 * SCORE_LABELS, 1)  # ties, many of them
ZEROS = np.zeros(200, int)


def one_hot(predicted, classes=2):
  return np.eye(classes)[predicted] * 3 - 1


def test_two_classes():
  assert glue.accuracy(TWO, TWO_LABELS) == pytest.approx(0.7, abs=1e-12)
  assert glue.f1(TWO, TWO_LABELS) == pytest.approx(0.7297297297297297, abs=1e-12)
  assert glue.matthews(TWO, TWO_LABELS) == pytest.approx(0.39279303735613885, abs=1e-12)


def test_three_classes():
  assert glue.accuracy(THREE, THREE_LABELS) == pytest.approx(0.35, abs=1e-12)
  assert glue.macro_f1(THREE, THREE_LABELS) == pytest.approx(0.3482782511234975, abs=1e-12)
  assert glue.matthews(THREE, THREE_LABELS) == pytest.approx(0.023565355112749643, abs=1e-12)


def test_a_class_that_is_never_predicted_or_missing():
  low, low_labels = np.minimum(THREE, 1), np.minimum(THREE_LABELS, 1)
  assert glue.macro_f1(low, THREE_LABELS) == pytest.approx(0.2715837006773465, abs=1e-12)
  assert glue.macro_f1(THREE, low_labels) == pytest.approx(0.26882203262984583, abs=1e-12)


def test_correlations_with_ties():
  assert np.unique(SCORES).size < 60
  assert glue.pearson(SCORES, SCORE_LABELS) == pytest.approx(0.7119519211902643, abs=1e-12)
  assert glue.spearman(SCORES, SCORE_LABELS) == pytest.approx(0.6940208454620783, abs=1e-12)


def test_constant_predictions_are_worth_nothing():
  for predicted, labels in ((ZEROS, TWO_LABELS), (TWO, ZEROS), (ZEROS, ZEROS)):
    assert glue.matthews(predicted, labels) == 0
  assert glue.f1(ZEROS, TWO_LABELS) == glue.f1(ZEROS, ZEROS) == 0
  constant = np.full(3, 0.1)
  assert np.any(constant != constant.mean())  # the mean is off by a rounding error
  assert glue.pearson(constant, SCORE_LABELS[:3]) == 0
  assert glue.pearson(SCORE_LABELS[:3], constant) == 0
  assert glue.spearman(constant, SCORE_LABELS[:3]) == 0


def test_the_metrics_of_each_task():
  outputs = one_hot(TWO)
  for task in ("sst2", "mnli", "qnli", "rte", "wnli", "boolq", "wic", "wsc"):
    assert glue.score(task, outputs, TWO_LABELS) == {"accuracy": pytest.approx(0.7)}
  for task in ("mrpc", "qqp"):
    actual = glue.score(task, outputs, TWO_LABELS)
    assert actual == {"accuracy": pytest.approx(0.7), "f1": pytest.approx(0.7297297297297297)}
    assert glue.main_metric(task) == "accuracy"
  assert glue.score("cola", outputs, TWO_LABELS) == {"matthews": pytest.approx(0.392793037)}
  actual = glue.score("stsb", SCORES[:, None], SCORE_LABELS)
  assert actual == {"pearson": pytest.approx(0.711951921), "spearman": pytest.approx(0.694020845)}
  actual = glue.score("cb", one_hot(THREE, 3), THREE_LABELS)
  assert actual == {"accuracy": pytest.approx(0.35), "f1": pytest.approx(0.34827825)}
  assert (glue.main_metric("cola"), glue.main_metric("stsb")) == ("matthews", "pearson")


def test_candidates_are_scored_together():
  groups = [7, 7, 3, 3]
  margins = np.array([0.1, 0.4, -2.0, -3.0])
  outputs = np.stack([0 * margins, margins], axis=1)
  assert glue.score("copa", outputs, [0, 1, 0, 1], groups) == {"accuracy": 0.5}
  actual = glue.score("multirc", outputs, [1, 1, 0, 1], groups)
  assert actual == {"f1": pytest.approx(0.8), "exact_match": 0.5}
  answers = ["Bob", "The Ann-Marie Lee", "Rome", "New York"]
  actual = glue.score("record", outputs, [0, 1, 0, 1], groups, answers)
  assert actual == {"f1": 0.5, "exact_match": 0.5}
  answers = ["Ann", "the Ann Lee.", "old York", "New York"]
  actual = glue.score("record", outputs, [1, 0, 0, 1], groups, answers)
  assert actual == {"f1": pytest.approx((2 / 3 + 1 / 2) / 2), "exact_match": 0.0}


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match=r"task must be one of stsb, cola.*got 'imdb'"):
    glue.score("imdb", one_hot(TWO), TWO_LABELS)
  with pytest.raises(ValueError, match=r"of 200 labels, got \(199, 2\)"):
    glue.score("rte", one_hot(TWO)[:-1], TWO_LABELS)
  with pytest.raises(ValueError, match="copa needs the groups of 200 records, got 0"):
    glue.score("copa", one_hot(TWO), TWO_LABELS)
  with pytest.raises(ValueError, match="record needs the entities of 200 records"):
    glue.score("record", one_hot(TWO), TWO_LABELS, ZEROS.tolist())
  with pytest.raises(ValueError, match="finite outputs"):
    glue.score("rte", one_hot(TWO) * np.nan, TWO_LABELS)


def _print_golden():
  from scipy.stats import pearsonr, spearmanr
  from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

  for predicted, labels, average in (
    (TWO, TWO_LABELS, "binary"),
    (THREE, THREE_LABELS, "macro"),
    (np.minimum(THREE, 1), THREE_LABELS, "macro"),
    (THREE, np.minimum(THREE_LABELS, 1), "macro"),
    (ZEROS, TWO_LABELS, "binary"),
  ):
    f1 = f1_score(labels, predicted, average=average)
    print(accuracy_score(labels, predicted), f1, matthews_corrcoef(labels, predicted))
  print(pearsonr(SCORES, SCORE_LABELS)[0], spearmanr(SCORES, SCORE_LABELS)[0])


if __name__ == "__main__":
  _print_golden()
