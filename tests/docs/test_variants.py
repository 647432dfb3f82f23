"""docs/variants.md: its counts are the adapters', its table is of the tests' variants and kinds."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.methods import bottleneck

from tests import variant_kinds
from tests.docs import peft_lines
from tests.docs.pages import page
from tests.layer_kinds import KINDS
from tests.variants import test_variants as variants

PAGE = page("variants")
SIZES = {"n_in": 12, "n_out": 10, "rank": 2, "group": 4, "in1": 3, "out1": 2, "tokens": 3}
SIZES |= {"small": 10, "bases": 5, "length": 7, "u": 3}
FUNCTIONS = {  # the others are constants
  "QA_LORA": lambda: lj.qa_lora_variant(SIZES["group"]),
  "UNI_LORA": lambda: lj.uni_lora_variant(SIZES["length"]),
  "TINY_LORA": lambda: lj.tiny_lora_variant(SIZES["u"]),
  "LOKR": lambda: lj.lokr_variant(SIZES["in1"]),
  "trainable_tokens_variant": lambda: lj.trainable_tokens_variant([1, 5, 7]),
}
FROM_DATA = {"LORA_GA": lj.lora_ga_config, "CORDA": lj.corda_config}


def rows(section):
  """Returns the cells of a section's table, without its head."""
  text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
  lines = [line for line in text.splitlines() if line.startswith("|")]
  return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


COUNTS = {row[0].strip("`"): row[2].strip("`") for row in rows("Equations")}


def count(name):
  """Returns the number of trained parameters of a weight (12, 10)."""
  variant = FUNCTIONS[name]() if name in FUNCTIONS else getattr(lj, name)
  config = lj.LoraConfig(SIZES["rank"], 2.0, "w", variant=variant)
  params = {"w": jax.random.normal(jax.random.key(1), (SIZES["n_in"], SIZES["n_out"]))}

  def fn(params, x):
    return params["w"][x] if name == "trainable_tokens_variant" else x @ params["w"]

  if name in FROM_DATA:
    config = dataclasses.replace(config, variant=None)
    config = FROM_DATA[name](lambda p, x: fn(p, x).sum(), config, params, [jnp.ones((1, 12))])
  x = jnp.zeros(3, int) if name == "trainable_tokens_variant" else jnp.ones((1, SIZES["n_in"]))
  trainable = lj.lora(fn, config).init(jax.random.key(0), params, x)
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  return sum(leaf.size for leaf in jax.tree.leaves(lj.partition(trainable, mask)[0]))


@pytest.mark.parametrize("name", COUNTS)
def test_the_count_is_the_adapters(name):
  assert count(name) == eval(COUNTS[name], {}, SIZES)


def public_variants():
  constants = {name for name in dir(lj) if isinstance(getattr(lj, name), lj.Variant)}
  return constants | {"trainable_tokens_variant"}


def test_every_variant_is_on_the_page():
  assert {*COUNTS} == public_variants()
  named = {name for name in dir(lj) if name.endswith(("_variant", "_config"))}
  named = {name for name in named if getattr(lj, name).__module__ != bottleneck.__name__}
  assert [name for name in named if f"`lj.{name}" not in PAGE] == []


def shown():
  """Returns the printed table of the page, and its cells by variant and kind."""
  text = PAGE.split("<!-- variant kinds -->")[1].split("<!-- /variant kinds -->")[0].strip()
  table, _, refusals = text.partition("\n\n")
  head, _, *lines = [line.strip("|").split("|") for line in table.splitlines()]
  names = [cell.strip(" `") for cell in head[1:]]
  words = dict(re.findall(r"^(\d+)\. (.*)$", refusals, flags=re.MULTILINE))
  cells = {}
  for kind, (label, *row) in zip(KINDS, lines, strict=True):
    assert label.strip() == variant_kinds.label(kind)
    for name, cell in zip(names, row, strict=True):
      number = cell.strip(" ()")
      cells[name, str(kind)] = words.get(number, number)
  return text, names, cells


def test_the_table_is_of_the_tests_variants_and_kinds():
  text, names, cells = shown()
  assert names == [*variants.VARIANTS], "run `python -m tests.variant_kinds` and paste its output"
  assert variant_kinds.table(names, cells) == text


def test_the_refusals_are_those_of_the_tests():
  _, _, cells = shown()
  for pair, words in cells.items():
    is_refused = pair in variants.REFUSED or variants.BY_SIZE.get(pair[0], "no size") in words
    assert (words != variant_kinds.WORKS) == is_refused, pair


@pytest.mark.parametrize("name", ["qa_lora", "hira"])
def test_a_pair_is_run_as_the_page_says(name):
  _, _, cells = shown()
  kind = next(kind for kind in KINDS if str(kind) == "plain: one_hot @ w")
  assert variant_kinds.status(name, kind) == cells[name, str(kind)]


def test_an_interrupted_table_continues(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(variant_kinds, "status", lambda name, kind: asked.append(name) or "yes")
  path = tmp_path / "verdicts.jsonl"
  path.write_text(json.dumps(["dora", str(KINDS[0]), "refused"]) + "\n")
  known = variant_kinds.verdicts(["dora"], path)
  assert len(asked) == len(KINDS) - 1
  assert known["dora", str(KINDS[0])] == "refused"
  assert len(path.read_text().splitlines()) == len(KINDS)
  assert "\n1. refused" in variant_kinds.table(["dora"], known)


def test_an_unknown_variant_is_named(capsys):
  with pytest.raises(SystemExit):
    variant_kinds.main(["dora", "dorra"])
  assert "the variants must be of dora, qa_lora, " in capsys.readouterr().err


def references():
  """Returns the files and lines of PEFT that the page names."""
  last, references = "", set()
  for name, lines in re.findall(r"`((?:[\w/]+\.py)?):(\d+(?:-\d+)?)`", PAGE):
    last = name or last
    references.add((last, lines))
  return references


def test_each_reference_to_peft_has_a_word():
  assert references() == {
    (name, lines) for name in peft_lines.WORDS for lines in peft_lines.WORDS[name]
  }


def test_the_lines_of_peft_have_the_words():
  peft = pytest.importorskip("peft", reason="compares with PEFT's files: make test-peers")
  assert peft.__version__ in PAGE
  for name, words in peft_lines.WORDS.items():
    text = (Path(peft.__file__).parent / name).read_text("utf-8").splitlines()
    for lines, word in words.items():
      first, *last = map(int, lines.split("-"))
      assert word in "\n".join(text[first - 1 : last[0] if last else first]), (name, lines)
