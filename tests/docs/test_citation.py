"""CITATION.cff is valid, and agrees with pyproject.toml and the changelog."""

import re
import tomllib

import yaml

from tests.paths import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIRED = {"cff-version", "message", "title", "authors"}
ALLOWED = REQUIRED | {
  *("abstract", "type", "version", "license", "keywords", "references", "date-released"),
  *("url", "repository-code", "identifiers", "doi"),
}


def test_it_has_the_fields_of_the_format():
  assert REQUIRED <= set(CITATION) <= ALLOWED
  assert CITATION["cff-version"] == "1.2.0"
  for entry in (CITATION, *CITATION["references"]):
    for author in entry["authors"]:
      assert set(author) in ({"name"}, {"family-names", "given-names"})
  for reference in CITATION["references"]:
    assert {"type", "title", "authors"} <= set(reference)


def test_it_agrees_with_the_package():
  assert CITATION["version"] == PROJECT["version"]
  assert CITATION["license"] == PROJECT["license"]
  assert CITATION["authors"] == PROJECT["authors"]
  assert set(CITATION["keywords"]) <= set(PROJECT["keywords"])
  assert CITATION["abstract"] == f"{PROJECT['description']}."


def test_a_released_version_has_its_date():
  heading = rf"^## \[{re.escape(PROJECT['version'])}\](?: - (\S+))?$"
  released = re.search(heading, (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
  date = released[1] if released else None
  assert str(CITATION.get("date-released")) == str(date)


def test_the_classifiers_are_those_of_the_package():
  named = {entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if "Python :: 3." in entry}
  assert named == {"3.11", "3.12", "3.13"}
  assert all(url.startswith("https://") for url in PROJECT["urls"].values())
  assert (ROOT / "lora_jax" / "py.typed").exists()
