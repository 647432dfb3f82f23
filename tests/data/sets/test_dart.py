"""DART 1.1.1: both formats, its repeated and empty texts, and the errors of bad files."""

import json

import pytest

from lora_jax.data.sets import dart, e2e

from tests.paths import SHARED
from tests.tiny_triples import dart_entries, write_dart

REAL = SHARED / "data" / "dart"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="DART is not beside this checkout")
RECORDS = [
  ("Al : birth_place : Bee | Al : age : 9", "Al, 9, is from Bee."),
  ("Cy : age : 8", "Cy is 8."),
  ("Cy : age : 8", "Cy's age is 8."),
  ("Cy : age : 8", "Cy is 8."),
  ("Di : team : É", "Di plays for É."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_dart(tmp_path_factory.mktemp("dart"))


def test_relations_are_lowercased_and_empty_texts_left_out(folder, caplog):
  records = dart.read("test", folder, any_size=True)
  assert records == RECORDS
  assert "1 empty texts left out, the first of" in caplog.text
  assert "test.jsonl:4" in caplog.text
  assert e2e.grouped(records)[1].references == ("Cy is 8.", "Cy's age is 8.", "Cy is 8.")


def test_both_formats_have_the_same_records(tmp_path):
  (tmp_path / "dart-v1.1.1-full-test.json").write_text(json.dumps(dart_entries()), "utf-8")
  assert dart.read("test", tmp_path, any_size=True) == RECORDS


def test_parts_of_the_development_set_have_no_input_in_common(folder):
  whole, *parts = (dart.read(s, folder, any_size=True) for s in ("valid", "dev_train", "dev_valid"))
  assert [len(records) for records in (whole, *parts)] == [21, 19, 2]
  assert sorted(parts[0] + parts[1]) == sorted(whole)
  assert not {record.context for record in parts[0]} & {record.context for record in parts[1]}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda e: e.pop("tripleset") and None, "expected the field tripleset, got the fields ann"),
    (lambda e: e.update(tripleset=[]), "expected tripleset to be a list that is not empty"),
    (lambda e: e.update(annotations={}), "expected annotations to be a list .*, got {}"),
    (lambda e: e["tripleset"][0].pop(), "triple 1: expected a list of subject, relation, object"),
    (lambda e: e["tripleset"].append(["a", 1, "b"]), "triple 2: expected relation to be a text"),
    (lambda e: e["tripleset"].append(["a", "b", " "]), "triple 2: expected object to be a text"),
    (lambda e: e["annotations"].append({"text": 3}), "annotation 3: expected text to be a text"),
    (lambda e: e["annotations"].append({"text": " "}), "annotation 3: expected text to be a text"),
    (lambda e: e["annotations"].append({}), "annotation 3: expected the field text, .*none"),
    (lambda e: e["annotations"].append("x"), "annotation 3: expected an object, got 'x'"),
    (lambda e: e.update(annotations=[{"text": ""}]), "expected a text that is not empty, got 1 em"),
  ],
)
def test_bad_entries_are_named_in_both_formats(tmp_path, change, message):
  entries = dart_entries()
  change(entries[1])
  (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, entries)), "utf-8")
  (tmp_path / "dart-v1.1.1-full-dev.json").write_text(json.dumps(entries), "utf-8")
  for split, place in (("test", r"test\.jsonl:2"), ("valid", r"full-dev\.json, entry 2")):
    with pytest.raises(ValueError, match=rf"{place}(, |: ).*{message}"):
      dart.read(split, tmp_path, any_size=True)


def test_bad_files_are_named(tmp_path):
  (tmp_path / "dart-v1.1.1-full-dev.json").write_text('{"tripleset": []}')
  with pytest.raises(ValueError, match=r"full-dev\.json: expected a list of entries, got dict"):
    dart.read("valid", tmp_path)
  (tmp_path / "test.jsonl").write_bytes(b'{"tripleset": [["\xff')
  with pytest.raises(ValueError, match=r"test\.jsonl:1: expected UTF-8, got byte 0xff"):
    dart.read("test", tmp_path)
  (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(dart_entries()[0]).encode())
  assert dart.read("test", tmp_path, any_size=True) == RECORDS[:1]  # without its byte-order mark
  with pytest.raises(ValueError, match=r"test\.jsonl: expected 12,552 texts, got 1\..*any_size"):
    dart.read("test", tmp_path)
  (tmp_path / "test.jsonl").write_text(json.dumps(dart_entries()[3]))
  with pytest.raises(ValueError, match=r"expected 12,552 texts, got 2\."):  # one of them empty
    dart.read("test", tmp_path)
  with pytest.raises(
    FileNotFoundError, match=r"DART 1\.1\.1 file dart-v1\.1\.1-full-train\.json or"
  ):
    dart.read("train", tmp_path)
  with pytest.raises(ValueError, match=r"split of DART 1\.1\.1 must be one of .*, got 'dev'"):
    dart.read("dev", tmp_path)


@needs_real
@pytest.mark.parametrize(
  ("split", "texts", "inputs"),
  [("valid", 6980, 2721), pytest.param("test", 12551, 4159, marks=pytest.mark.long)],
)
def test_the_published_numbers_of_texts_and_the_inputs(split, texts, inputs):
  records = dart.read(split, REAL)
  assert (len(records), len(e2e.grouped(records))) == (texts, inputs)


@needs_real
def test_a_record_of_the_authors():
  assert dart.read("dev_train", REAL)[0] == (
    "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina",
    "A school from Mars Hill, North Carolina, joined in 1973.",
  )
