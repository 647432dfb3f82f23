"""The E2E files: the embedded copies, the reading of lines, and the errors of bad ones."""

import hashlib

import pytest

from lora_jax.data.sets import e2e

COUNTS = {"train": (42061, 4862), "valid": (4672, 547), "test": (4693, 630)}


@pytest.mark.parametrize("split", COUNTS)
def test_the_reference_format_has_the_papers_numbers_of_lines_and_inputs(split):
  records = e2e.read(split)
  assert (len(records), len(e2e.grouped(records))) == COUNTS[split]


def test_a_line_and_a_row_are_read_without_the_spaces_around_the_line():
  assert e2e.read("test")[0] == (
    "name : Blue Spice | Type : coffee shop | area : city centre",
    "A coffee shop in the city centre area called Blue Spice .",
  )
  assert e2e.read("test", "official")[0] == (
    "name[Blue Spice], eatType[coffee shop], area[city centre]",
    "A coffee shop in the city centre area called Blue Spice.",
  )


@pytest.mark.parametrize("split", ["valid", "test"])
def test_both_formats_have_the_same_inputs_and_texts_except_for_spaces(split):
  reference, official = e2e.read(split), e2e.read(split, "official")
  assert e2e.input_ids(reference) == e2e.input_ids(official)
  for a, b in zip(e2e.grouped(reference), e2e.grouped(official), strict=True):
    texts = [["".join(text.split()) for text in group.references] for group in (a, b)]
    assert texts[0] == texts[1]


def test_groups_keep_every_text_in_the_files_order():
  records = e2e.read("test")
  groups = e2e.grouped(records)
  numbers = e2e.input_ids(records)
  assert sum(len(group.references) for group in groups) == len(records)
  for i, group in enumerate(groups):
    input_records = [r for r, number in zip(records, numbers, strict=True) if number == i]
    assert group == (input_records[0].context, tuple(record.completion for record in input_records))


@pytest.mark.parametrize("name", e2e.EMBEDDED_SHA256)
def test_embedded_files_are_the_originals(name):
  assert hashlib.sha256(e2e.embedded_bytes(name)).hexdigest() == e2e.EMBEDDED_SHA256[name]


def test_a_changed_embedded_file_is_refused(monkeypatch):
  monkeypatch.setitem(e2e.EMBEDDED_SHA256, "valid.txt", "0" * 64)
  with pytest.raises(ValueError, match=r"valid\.txt\.xz: expected content of SHA-256 0000"):
    e2e.read("valid")


def test_the_official_training_set_is_not_embedded():
  with pytest.raises(FileNotFoundError, match=r"trainset\.csv is not embedded.*reference format"):
    e2e.read("train", "official")


def test_a_folder_is_read_by_the_original_names(tmp_path):
  (tmp_path / "train.txt").write_text("name : A||It is A .\r\nname : B||It is B .", newline="")
  assert e2e.read("train", folder=tmp_path) == [
    ("name : A", "It is A ."),
    ("name : B", "It is B ."),
  ]
  with pytest.raises(FileNotFoundError, match=rf"valid\.txt in the folder {tmp_path}"):
    e2e.read("valid", folder=tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"a||b\nc|d\n", r"train\.txt:2: expected 'context\|\|completion', got 'c\|d'"),
    (b"a||b\na||b||c\n", r"train\.txt:2: expected 'context\|\|completion', got 'a\|\|b\|\|c'"),
    (b"a||b\n\nc||d\n", r"train\.txt:2: expected 'context\|\|completion', got ''"),
    (b"a|| \n", r"train\.txt:1: expected 'context\|\|completion', got 'a\|\| '"),
    (b"||b\n", r"train\.txt:1: expected"),
    (b"a||b\nCaf\xe9||d\n", r"train\.txt:2: expected UTF-8, got byte 0xe9"),
    (b"", r"train\.txt: expected at least one record, got none"),
  ],
)
def test_bad_lines_are_named(content, message):
  with pytest.raises(ValueError, match=message):
    e2e.parse(content, "train.txt", "reference")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"meaning,ref\na,b\n", r"dev\.csv:1: expected the header 'mr,ref', got 'meaning,ref'"),
    (b"mr,ref\na,b\na\n", r"dev\.csv:3: expected a row 'mr,ref', got \['a'\]"),
    (b'mr,ref\n"a,x",b,c\n', r"dev\.csv:2: expected a row 'mr,ref', got \['a,x', 'b', 'c'\]"),
    (b'mr,ref\na," "\n', r"dev\.csv:2: expected"),
    (b'mr,ref\na,"b\n', r"dev\.csv:2: expected a row 'mr,ref', got unexpected end of data"),
    (b"mr,ref\na,\xff\n", r"dev\.csv:2: expected UTF-8, got byte 0xff"),
    (b"mr,ref\n", r"dev\.csv: expected at least one record, got none"),
    (b"", r"dev\.csv: expected at least one record, got none"),
  ],
)
def test_bad_rows_are_named(content, message):
  with pytest.raises(ValueError, match=message):
    e2e.parse(content, "dev.csv", "official")


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'dev'"):
    e2e.read("dev")
  with pytest.raises(ValueError, match="form must be one of reference, official, got 'csv'"):
    e2e.read("test", "csv")
