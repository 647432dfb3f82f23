"""docs/layer_kinds.md lists the layer kinds of the tests."""

from tests.layer_kinds import KINDS, lists
from tests.paths import ROOT
from tests.variants import test_variants as variants

PAGE = (ROOT / "docs" / "layer_kinds.md").read_text()


def test_the_lists_are_the_tests_layer_kinds():
  shown = PAGE.split("<!-- layer kinds -->")[1].split("<!-- /layer kinds -->")[0]
  assert shown.strip() == lists(), "run `python -m tests.layer_kinds` and paste its output"


def test_the_numbers_are_those_of_the_tests():
  assert f"LoRA is tested on {len(KINDS)} layers and functions" in PAGE
  assert {kind.tolerance for kind in KINDS} == {2e-4, 2e-2}  # both are in the text


def test_dora_is_tested_on_all_kinds():
  assert f"DoRA passes the same tests on all {len(KINDS)}" in PAGE
  assert "`make test` runs them on ten" in PAGE
  assert len(variants.ONE_PER_FAMILY) == 10
  assert "[variants.md](variants.md#layer-kinds) has all variants" in PAGE
  exceptions = {*variants.REFUSED, *variants.ROUNDED}
  assert "dora" not in {name for name, _ in exceptions}


def test_qa_lora_is_refused_as_the_page_says():
  lookups, odd = map(len, (variants.LOOKUPS, variants.ODD_INPUTS))
  refused = [name for name, _ in variants.REFUSED if name == "qa_lora"]
  assert len(refused) == lookups + odd
  assert f"them on {len(KINDS) - lookups - odd} and refuses the other {lookups + odd}" in PAGE
  assert f"{lookups} look rows up, and {odd} have inputs that the group size does not" in PAGE
