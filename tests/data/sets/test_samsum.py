"""SAMSum: chats of our own in its format, the errors of bad rows, and the real files."""

import pytest

from lora_jax.data.sets import samsum

from tests.paths import SHARED
from tests.tiny_text_sets import CHATS, write_samsum

REAL = SHARED / "data" / "samsum"


@pytest.fixture
def folder(tmp_path):
  return write_samsum(tmp_path)


def test_a_record_is_a_chat_of_several_lines_and_its_summary(folder):
  records = samsum.read("train", folder, any_size=True)
  assert len(records) == len(CHATS)
  assert records[0] == (
    'Ann: I baked "cookies", want some?\nBen: Sure 🙂\nAnn: See you at 5.\nBen: Bye\nAnn: Bye\n\n',
    "Ann baked cookies and Ben wants some.",
  )


def test_lead_3_of_a_short_chat_is_all_of_it(folder):
  records = samsum.read("train", folder, any_size=True)
  assert samsum.lead(records[0].context).endswith("Ben: Sure 🙂 Ann: See you at 5.")
  assert samsum.lead(records[1].context) == "Cem: Is the lake open? Dee: Until noon."


def test_lines_may_end_in_carriage_returns_and_begin_with_a_mark(folder):
  expected = samsum.read("train", folder, any_size=True)
  path = folder / "train.csv"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
  assert samsum.read("train", folder, any_size=True) == expected


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (b"id,summary\n", r"test\.csv:1: expected the header id,dialogue,summary, got id,summary"),
    (b'id,dialogue,summary\n1,"a\nb",c\n2,d\n', r"test\.csv:4: expected an id, .*\['2', 'd'\]"),
    (b"id,dialogue,summary\n1,,c\n", r"test\.csv:2: expected .* not empty, got \['1', '', 'c'\]"),
    (b'id,dialogue,summary\n1,"a\nb", \n', r"test\.csv:2: expected .* not empty"),
    (b"id,dialogue,summary\n1,a,b\n\n", r"test\.csv:3: expected .* not empty, got \[\]"),
    (b"id,dialogue,summary\n1,a,b\n1,c,d\n", r"test\.csv:3: the id 1 is that of line 2 already"),
    (b'id,dialogue,summary\n1,a,b\n2,"c\n', r"test\.csv:3: expected a row of .* end of data"),
    (b"id,dialogue,summary\n1,Caf\xe9,b\n", r"test\.csv:2: expected UTF-8, got byte 0xe9"),
    ("id,dialogue,summary\n".encode("utf-16"), r"test\.csv:1: expected UTF-8, got a NUL byte"),
    (b"id,dialogue,summary\n", r"test\.csv: expected 819 chats, got 0"),
    (b"", r"test\.csv: expected 819 chats, got 0"),
  ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
  (tmp_path / "test.csv").write_bytes(rows)
  with pytest.raises(ValueError, match=message):
    samsum.read("test", tmp_path, any_size=True)


def test_missing_rows_files_and_splits_are_named(folder):
  with pytest.raises(ValueError, match=r"train\.csv: expected 14,731 chats, got 5\. .*any_size"):
    samsum.read("train", folder)
  with pytest.raises(FileNotFoundError, match=r"validation\.csv or val\.csv.*arXiv 1911\.12237"):
    samsum.read("valid", folder)
  with pytest.raises(ValueError, match="split of SAMSum must be one of train, valid, test"):
    samsum.read("validation", folder)


@pytest.mark.skipif(not REAL.is_dir(), reason="SAMSum's files are not beside this checkout")
def test_the_real_files():
  sizes = {split: len(samsum.read(split, REAL)) for split in samsum.FILES}
  assert sizes == {"train": 14731, "valid": 818, "test": 819}
