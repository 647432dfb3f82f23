"""Slot errors: what a text leaves out, changes and adds, in people's own words."""

import numpy as np
import pytest

from lora_jax.data.sets import e2e
from lora_jax.metrics import slot_scores
from lora_jax.metrics.slots import SlotErrors, parse_slots, slot_errors, stated_values

INPUT = (
  "name : Aromi | Type : coffee shop | food : French | price : £ 20 - 25 | "
  "customer rating : 1 out of 5 | area : city centre | family friendly : no | near : The Rice Boat"
)
TEXT = (
  "Aromi is a coffee shop near The Rice Boat in the city centre . It serves moderately priced "
  "French food , has a low customer rating and is not family - friendly ."
)


@pytest.mark.parametrize(
  ("wording", "changed", "errors"),
  [
    ("", "", ((), (), ())),
    ("not family - friendly", "popular", (("family friendly",), (), ())),
    ("is not family", "is family", ((), ("family friendly",), ())),
    ("French food", "Italian food", ((), ("food",), ())),
    ("French food", "French and Italian food", ((), (), ("food",))),
    ("French food", "food", (("food",), (), ())),
    ("moderately priced", "cheap", ((), ("price",), ())),
    ("a low customer rating", "a 1 out of 5 customer rating", ((), (), ())),
    ("a low customer rating", "5 stars", ((), ("customer rating",), ())),
    ("a low customer rating", "low prices", (("customer rating",), (), ("price",))),
    ("a coffee shop", "a café", ((), (), ())),
    ("a coffee shop", "a pub", ((), ("Type",), ())),
    ("a coffee shop", "a restaurant and coffee shop", ((), (), ())),
    ("city centre", "centre of the city", ((), (), ())),
    ("in the city centre", "by the river", ((), ("area",), ())),
    ("near The Rice Boat", "near the rice boat", ((), (), ())),
    ("near The Rice Boat", "near Café Rouge", ((), ("near",), ())),
    ("near The Rice Boat", "near The Rice Boat and Cafe Rouge", ((), (), ("near",))),
    ("Aromi is", "It is", (("name",), (), ())),
  ],
)
def test_errors_of_a_text(wording, changed, errors):
  assert wording in TEXT
  text = TEXT.replace(wording, changed) if wording else TEXT
  assert slot_errors(text, parse_slots(INPUT)) == SlotErrors(*errors)


@pytest.mark.parametrize(
  ("text", "slot", "values"),
  [
    ("it is n't suitable for young children", "family friendly", {"no"}),
    ("it isn 't kid friendly", "family friendly", {"no"}),
    ("for adults only", "family friendly", {"no"}),
    ("it is not cheap , but families are welcome", "family friendly", {"yes"}),
    ("children are not welcome", "family friendly", {"no"}),
    ("an inexpensive price range", "price", {"low"}),
    ("highly rated with low prices", "price", {"low"}),
    ("highly rated with low prices", "customer rating", {"high"}),
    ("it is in the high price range and customers rate it 3 out of 5", "price", {"high"}),
    ("customers rate it 3 out of 5", "customer rating", {"average"}),
    ("higher than average prices", "price", {"high"}),
    ("more than £ 30", "price", {"high"}),
    ("£20-25", "price", {"moderate"}),
    ("by the river , outside the city centre", "area", {"riverside"}),
    ("the Rainbow Vegetarian Cafe serves pasta", "Type", set()),
    ("the Golden Curry", "venue", {"The Golden Curry"}),
  ],
)
def test_values_in_a_text(text, slot, values):
  assert stated_values(text)[slot] == values


def test_both_formats_of_the_data_have_the_same_slots():
  official = e2e.read("test", "official")
  for theirs, ours in zip(official[::50], e2e.read("test")[::50], strict=True):
    assert parse_slots(theirs.context) == parse_slots(ours.context)


def test_an_unknown_venue_of_the_input_is_found():
  slots = parse_slots("name : Chez Nous | near : Bei Uns")
  assert slot_errors("Chez Nous is near Bei Uns .", slots).total == 0
  assert slot_errors("It is near Bei Uns .", slots).missing == ("name",)


def test_the_rate_of_the_references():
  """The floor of docs/smollm2.md, on every twentieth reference."""
  records = e2e.read("test")[::20]
  scores = slot_scores([r.completion for r in records], [r.context for r in records])
  assert 7 < scores.rate < 11
  low, high = scores.interval()
  assert low < scores.rate < high
  assert scores.interval(seed=0) == (low, high)


def test_the_rate_is_over_all_slots():
  texts = [TEXT.replace("French", "Italian"), "Aromi is cheap ."]
  scores = slot_scores(texts, [INPUT, "name : Aromi | Type : pub"])
  np.testing.assert_array_equal(scores.counts, [[0, 1, 0, 8], [1, 0, 1, 2]])
  assert scores.rate == pytest.approx(30)
