"""Files that others have written: read strictly, with errors that name file and place."""

import os

import pytest

from lora_jax import files


@pytest.mark.parametrize(
  "address", ["gs://bucket/run", "s3://a/b", "hf://model", "https://host/file", "gs:/bucket/run"]
)
def test_addresses_are_refused(address):
  with pytest.raises(ValueError, match=f"{address[:2]}.* address, expected a local path"):
    files.local_path(address)


@pytest.mark.parametrize("path", ["run", "./a:b", "/tmp/x:/y", "C:/run", "a b/c", "../x", ""])
def test_local_paths_are_kept(path):
  assert str(files.local_path(path)) == str(files.Path(path))


def test_only_regular_files_are_read(tmp_path):
  with pytest.raises(FileNotFoundError, match="none does not exist"):
    files.read_bytes(tmp_path / "none")
  with pytest.raises(ValueError, match="is a folder, expected a file"):
    files.read_bytes(tmp_path)
  os.mkfifo(tmp_path / "fifo")
  for path in (tmp_path / "fifo", "/dev/zero"):
    with pytest.raises(ValueError, match="a fifo, a socket or a device, expected a file"):
      files.read_json_if_present(path)
  (tmp_path / "link").symlink_to(tmp_path / "file")
  (tmp_path / "file").write_bytes(b"\xff")
  assert files.read_bytes(tmp_path / "link") == b"\xff"
  with pytest.raises(ValueError, match="link is not text in UTF-8"):
    files.read_text(tmp_path / "link")


def test_lines(tmp_path, monkeypatch):
  path = tmp_path / "a"
  path.write_bytes(b"\xef\xbb\xbfone\r\n\xef\xbb\xbftwo\n\nth\rree\xe2\x80\xa8")
  numbers, lines = zip(*files.read_lines(path), strict=True)
  assert numbers == tuple(f"{path}:{i}" for i in (1, 2, 3, 4))
  assert lines == ("one", "\ufefftwo", "", "th\rree\u2028")
  path.write_bytes(b"")
  assert list(files.read_lines(path)) == []
  for content, message in (
    (b"a\n\xffb", "a:2: expected UTF-8, got byte 0xff"),
    (b"a\nb\0", "a:2: expected UTF-8, got a NUL byte"),
    ("a".encode("utf-16"), "a:1: expected UTF-8, got a NUL byte: it is binary, or UTF-16"),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      list(files.read_lines(path))
  monkeypatch.setattr(files, "_MAX_LINE", 2**20)
  path.write_bytes(b"a" * 2**20 + b"\n")
  with pytest.raises(ValueError, match="a:1: the line has more than 1 MiB"):
    list(files.read_lines(path))


def test_values_of_json():
  text = '{"a": [1, -2.5, true, null, "\\ud83d\\ude00 \\\\ud83d"], "b": {"a": 1}}'
  value = {"a": [1, -2.5, True, None, "\N{GRINNING FACE} \\ud83d"], "b": {"a": 1}}
  assert files.parse_json(text, "f") == files.parse_json(text.encode(), "f") == value


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "f:1 is not JSON"),
    ("{'a': 1}", "f:1 is not JSON"),
    ("\ufeff1", "f:1 is not JSON: .*BOM"),
    (b"\xff", "f:1 is not text in UTF-8"),
    ('{"a": 1, "a": 1}', "f:1: the key 'a' occurs twice in one object"),
    ('[{"b": {"a": 1, "c": 2, "a": 3}}]', "f:1: the key 'a' occurs twice"),
    ('{"a": 1, "\\u0061": 1}', "f:1: the key 'a' occurs twice"),
    ("9" * 401, "f:1: an integer of 401 digits; at most 400"),
    ("-" + "9" * 10**5, "f:1: an integer of 100001 digits"),
    ("[" * 10**5 + "]" * 10**5, "f:1 is nested too deeply"),
    ('{"a":' * 10**5, "f:1 is nested too deeply"),
    ('"\\ud83d"', "f:1: half of a surrogate pair, '.ud83d', is not text"),
    ('{"\\uDE00": 1}', "f:1: half of a surrogate pair"),
    ('["\\ude00\\ud83d"]', "f:1: half of a surrogate pair"),
  ],
)
def test_json_that_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    files.parse_json(text, "f:1")


def test_a_json_file_has_an_object(tmp_path):
  path = tmp_path / "a.json"
  assert files.read_json_if_present(path) == {}
  with pytest.raises(FileNotFoundError, match=r"a\.json does not exist"):
    files.read_json(path)
  path.write_text('{"a": 1}')
  assert files.read_json(path) == files.read_json_if_present(path) == {"a": 1}
  for text, kind in (("[]", "list"), ("null", "NoneType"), ("1", "int"), ('"a"', "str")):
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: expected a JSON object, got {kind}"):
      files.read_json_if_present(path)
