"""Exact answers, whole and in parts, and their intervals."""

import pytest

from lora_jax import metrics
from lora_jax.data.sets import e2e_reversed, wikisql

QUERY = "SELECT MAX [age] FROM table WHERE [name] = Ann AND [year] > 1999"


def test_an_answer_is_right_if_it_equals_a_reference_except_for_spaces():
  references = [["6728"], ["neutral"], ["a b", "c"], ["d"]]
  hypotheses = [" 6728\n", "Neutral", "c", ""]
  matched = metrics.exact_match(hypotheses, references)
  assert matched.rows[:, 0].tolist() == [100, 0, 100, 0]
  assert matched.score() == 50


def test_logical_form_accuracy_ignores_the_order_of_conditions():
  hypotheses = [
    "select max [age] from table where [year] > 1999 and [name] = ann",
    QUERY.replace("MAX", "MIN"),
    QUERY.replace(" AND", ""),
  ]
  matched = metrics.exact_match(hypotheses, [[QUERY]] * 3, wikisql.logical_form)
  assert matched.rows[:, 0].tolist() == [100, 0, 0]


def test_part_accuracy_counts_missing_wrong_and_added_parts():
  reference = "name : Aromi | food : French | area : riverside"
  hypotheses = [
    reference,
    "area : riverside | name : Aromi",
    reference.replace("French", "Indian"),
    f"{reference} | near : Ranch",
    "",
  ]
  scored = metrics.part_accuracy(hypotheses, [[reference]] * 5, e2e_reversed.slots)
  assert scored.rows.tolist() == [[3, 3], [2, 3], [2, 3], [3, 4], [0, 4]]  # "" names one part
  assert scored.score() == pytest.approx(100 * 10 / 17)


def test_of_several_references_the_nearest_counts():
  references = [["name : A | area : B | near : C", "name : A | food : D"]]
  scored = metrics.part_accuracy(["name : A | food : E"], references, e2e_reversed.slots)
  assert scored.rows.tolist() == [[1, 2]]


def test_statistics_have_intervals_and_paired_differences():
  references = [[str(i)] for i in range(200)]
  halves, none = [str(i) if i % 2 else "x" for i in range(200)], ["x"] * 200
  a, b = (
    metrics.Measured({"exact": metrics.exact_match(texts, references)}, {"other": "missing"})
    for texts in (halves, none)
  )
  by_metric = metrics.intervals(a)
  assert by_metric.keys() == {"exact", "other"}
  assert by_metric["other"] is None
  exact = by_metric["exact"]
  assert (exact.score, exact.low, exact.high) == pytest.approx((50, 43, 57), abs=1)
  with pytest.raises(ValueError, match="at least one metric, got none"):
    metrics.intervals(metrics.Measured({}, {}))
  difference = metrics.differences(a, b)["exact"]
  assert (difference.difference, difference.share_against) == (50, 0)


@pytest.mark.parametrize(
  ("hypotheses", "references", "message"),
  [
    (["a"], [["a"], ["b"]], "got 1 hypotheses for 2 segments"),
    ([], [], "at least one segment"),
    (["a"], ["a"], r"references\[0\] is one string"),
    ("a", [["a"]], "expected a list of hypotheses, got one string"),
  ],
)
def test_lists_that_do_not_pair_up_are_refused(hypotheses, references, message):
  for metric in (
    metrics.exact_match,
    metrics.rouge,
    lambda h, r: metrics.part_accuracy(h, r, e2e_reversed.slots),
  ):
    with pytest.raises(ValueError, match=message):
      metric(hypotheses, references)
