"""E2E reversed: exchanged records, slots in any order, and the floor of copying."""

import pytest

from lora_jax.data.sets import e2e, e2e_reversed
from lora_jax.metrics import exact_match, part_accuracy


def test_records_are_those_of_e2e_exchanged():
  records = e2e_reversed.read("test")
  assert records[0] == (
    "A coffee shop in the city centre area called Blue Spice .",
    "name : Blue Spice | Type : coffee shop | area : city centre",
  )
  assert len(records) == 4693
  groups = e2e.grouped(records)
  several = [group for group in groups if len(set(group.references)) > 1]
  assert (len(groups), len(several)) == (4532, 45)


def test_a_folder_is_read_as_e2e_reads_it(tmp_path):
  (tmp_path / "valid.txt").write_text("name : A||It is A .\n")
  assert e2e_reversed.read("valid", tmp_path) == [("It is A .", "name : A")]
  with pytest.raises(FileNotFoundError, match=r"test\.txt"):
    e2e_reversed.read("test", tmp_path)


@pytest.mark.parametrize(
  ("text", "is_same"),
  [
    ("name : Aromi | near : Café Rouge", True),
    ("near:  café rouge |Name : Aromi", True),
    ("name : Aromi | name : Aromi | near : Café Rouge", True),
    ("name : Cocum | name : Aromi | near : Café Rouge", False),
    ("name : Aromi | near : Café Rouge | area : riverside", False),
    ("name : Aromi", False),
    ("name : Aromi | near : Café Rouge |", False),
    ("Aromi is near Café Rouge .", False),
    ("", False),
  ],
)
def test_slots_count_without_order_case_and_spaces(text, is_same):
  expected = e2e_reversed.slots("name : Aromi | near : Café Rouge")
  assert (e2e_reversed.slots(text) == expected) == is_same


def test_copying_finds_the_longest_value_in_whole_words():
  known = {"near": ["Ranch", "The Rice Boat"], "price": ["£ 20 - 25", "high", "cheap"]}
  assert e2e_reversed.copied("Near the rice boat, cheaply .", known) == "near : The Rice Boat"
  assert (
    e2e_reversed.copied("For £ 20 - 25 at the Ranch", known) == "near : Ranch | price : £ 20 - 25"
  )
  assert e2e_reversed.copied("By the Ranch and the rice boat", known) == "near : The Rice Boat"
  assert e2e_reversed.copied("It is .", known) == ""


@pytest.mark.parametrize(
  ("size", "exact", "slots"),
  [(300, 25.333, 83.544), pytest.param(4532, 4.987, 72.598, marks=pytest.mark.long)],
)
def test_the_floor_of_copying(size, exact, slots):
  known = e2e_reversed.values(e2e_reversed.read("train"))
  assert {name: len(values) for name, values in known.items()} == {
    **{"name": 34, "Type": 3, "food": 7, "price": 6, "customer rating": 6, "area": 2},
    **{"family friendly": 2, "near": 19},
  }
  groups = e2e.grouped(e2e_reversed.read("test"))[:size]
  texts = [e2e_reversed.copied(group.context, known) for group in groups]
  answers = [group.references for group in groups]
  right = [group.references[-1] for group in groups]
  assert exact_match(right, answers, e2e_reversed.slots).score() == 100
  assert exact_match(texts, answers, e2e_reversed.slots).score() == pytest.approx(exact, abs=1e-3)
  assert part_accuracy(texts, answers, e2e_reversed.slots).score() == pytest.approx(slots, abs=1e-3)
