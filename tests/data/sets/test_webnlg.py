"""WebNLG 2017: contexts, seen and unseen categories, and the errors of bad files."""

import json

import pytest

from lora_jax.data.sets import e2e, originals, triples, webnlg

from tests.paths import SHARED
from tests.tiny_triples import TRAIN, webnlg_entry, write_webnlg

REAL = SHARED / "data" / "webnlg"
COUNTS = {  # entries with a good text, records, inputs
  "train": (6935, 18025, 6888),
  "valid": (871, 2258, 870),
  "test": (1862, 4928, 1862),
  "test_seen": (971, 2495, 971),
  "test_unseen": (891, 2433, 891),
}
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="WebNLG is not beside this checkout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_webnlg(tmp_path_factory.mktemp("webnlg"))


def test_records_have_good_texts_and_the_triples_in_order(folder):
  assert webnlg.read("train", folder, any_size=True) == [
    ("Aville : river : Bee", "Aville is on the Bee."),
    ("Aville : river : Bee", "The Bee flows by Aville."),
    ("Soup : country : Ceeland", "Soup is from Ceeland ."),
    ('Soup : country : Ceeland | Soup : course : "first"', "A soup."),
  ]


def test_the_test_set_is_parted_by_the_categories_of_the_training_set(folder):
  read = {split: webnlg.read(split, folder, any_size=True) for split in COUNTS}
  assert {context for context, _ in read["test_seen"]} == {"Dtown : river : Bee"}
  assert read["test_unseen"] == [
    ("Eve_É : genre : Jazz", "Eve É plays jazz."),
    ("Fay : party : None", "Fay has no party."),
    ("Fay : party : None", "Fay is in no party."),
  ]
  assert sorted(read["test_seen"] + read["test_unseen"]) == sorted(read["test"])
  assert e2e.grouped(read["test"])[2].references == ("Fay has no party.", "Fay is in no party.")


def changed(tmp_path, change, name="train.json"):
  """Writes two entries, the second changed; returns the folder."""
  second = webnlg_entry(2, *TRAIN[2])
  replaced = change(second["2"]) or second
  entries = [webnlg_entry(1, *TRAIN[0]), replaced]
  (tmp_path / name).write_text(json.dumps({"entries": entries}), "utf-8")
  return tmp_path


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda e: e.pop("category") and None, "expected the field category, got the fields lex"),
    (lambda e: e.update(category="Artist"), "expected a category of Airport, .*, got 'Artist'"),
    (lambda e: e.update(category=" "), "expected category to be a text that is not empty"),
    (lambda e: e.update(modifiedtripleset=[]), "expected modifiedtripleset to be a list that is"),
    (lambda e: e.update(lexicalisations="x"), "expected lexicalisations to be a list .*, got 'x'"),
    (lambda e: e["modifiedtripleset"].pop() and None, "expected triples of size 2, got 1 of them"),
    (lambda e: e["modifiedtripleset"][1].update(object=""), "triple 2: expected object to be a t"),
    (lambda e: e["modifiedtripleset"][0].pop("subject") and None, "triple 1: expected the field s"),
    (lambda e: e["modifiedtripleset"].append([1]), r"triple 3: expected an object, got \[1\]"),
    (lambda e: e["lexicalisations"][0].update(lex=""), "lexicalisation 1: expected lex to be a"),
    (lambda e: e["lexicalisations"][0].update(lex=None), "lexicalisation 1: .*, got None"),
    (lambda e: e["lexicalisations"][0].update(comment="fine"), "comment good or toFix, got 'fine'"),
    (lambda e: {"3": e}, "expected an object with the one field '2', got {'3'"),
    (
      lambda e: e.update(category="City", size="1", xml_id="Id1"),
      "Id1 of City, .* entry 1 already",
    ),
  ],
)
def test_bad_entries_are_named(tmp_path, change, message):
  with pytest.raises(ValueError, match=rf"train\.json, entry 2(, |: ).*{message}"):
    webnlg.read("train", changed(tmp_path, change), any_size=True)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b'{"entries": [', "is not JSON"),
    (b"[]", r"expected an object, got \[\]"),
    (b'{"entries": []}', "expected entries to be a list that is not empty"),
    (b'{"Entries": [1]}', "expected the field entries, got the fields Entries"),
    (b'{"entries": "Caf\xe9"}', "is not text in UTF-8"),
    ('{"entries": []}'.encode("utf-16"), "is not text in UTF-8"),
  ],
)
def test_bad_files_are_named(tmp_path, data, message):
  (tmp_path / "test.json").write_bytes(data)
  with pytest.raises(ValueError, match=rf"test\.json:? {message}"):
    webnlg.read("test", tmp_path, any_size=True)


def test_a_byte_order_mark_is_left_out(folder, tmp_path):
  data = (folder / "dev.json").read_bytes()
  (tmp_path / "dev.json").write_bytes(originals.BYTE_ORDER_MARK + data)
  expected = webnlg.read("valid", folder, any_size=True)
  assert webnlg.read("valid", tmp_path, any_size=True) == expected


def test_other_files_than_the_published_ones_need_any_size(folder, monkeypatch):
  with pytest.raises(ValueError, match=r"expected 6,940 entries, got 4\. .*any_size=True"):
    webnlg.read("train", folder)
  monkeypatch.setitem(webnlg.SIZES, "train.json", 4)
  with pytest.raises(ValueError, match=r"expected content of SHA-256 180edb60.*microsoft/LoRA"):
    webnlg.read("train", folder)


def test_a_split_without_entries_is_an_error(tmp_path):
  folder = changed(tmp_path, lambda entry: None, "test.json")
  with pytest.raises(ValueError, match="expected entries of test_unseen with a good text, got no"):
    webnlg.read("test_unseen", folder, any_size=True)


def test_missing_files_and_unknown_splits(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"WebNLG 2017 file dev\.json in .*microsoft/LoRA"):
    webnlg.read("valid", tmp_path)
  with pytest.raises(ValueError, match=r"split of WebNLG 2017 must be one of train, .*, got 'dev'"):
    webnlg.read("dev", tmp_path)


@needs_real
@pytest.mark.parametrize(
  "split", ["valid", *(pytest.param(s, marks=pytest.mark.long) for s in COUNTS if s != "valid")]
)
def test_the_papers_files_have_the_published_numbers(split):
  entries = webnlg.read_entries(split, REAL)
  records = triples.records(entries)
  assert (len(entries), len(records), len(e2e.grouped(records))) == COUNTS[split]


@needs_real
def test_a_record_of_the_papers_files():
  assert webnlg.read("valid", REAL)[0] == (
    "Aarhus : leaderName : Jacob_Bundsgaard",
    "The leader of Aarhus is Jacob Bundsgaard.",
  )
