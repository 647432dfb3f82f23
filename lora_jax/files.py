"""Local paths, and the text and JSON in files that others may have written."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MAX_DIGITS = 400  # of an integer in JSON; more than any float has
_MAX_LINE = 2**26  # bytes
_HUB_MODEL = r"(?:hf:/+|https?:/+huggingface\.co/)(?!datasets/|spaces/)([^/]+/[^/]+)"


def local_path(path: str | Path) -> Path:
  """Returns the path of a local file or folder.

  Raises:
    ValueError: if it is the address of a bucket or a server, such as `gs://bucket/run`, which
      `pathlib` would silently turn into a local folder named `gs:`.
  """
  if match := re.match(_HUB_MODEL, str(path)):
    raise ValueError(
      f"{path} is an https:// or hf:// address, expected a local path; for a model give the "
      f"repository's name, {match[1]!r}"
    )
  if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path)):
    raise ValueError(
      f"{path} is a {match[1]}:// address, expected a local path. Copy the files to a local folder "
      "first, or mount the bucket (gcsfuse, mountpoint-s3) and name the mounted folder"
    )
  return Path(path)


def cache_folder() -> Path:
  """Returns `lora_jax` in the user's folder for cached files: `$XDG_CACHE_HOME` or `~/.cache`."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"


def make_folder(path: str | Path) -> Path:
  """Makes a local folder, its parents included, unless it exists; returns its path.

  Raises:
    ValueError: if the path, or one of its parents, exists and is not a folder; or as `local_path`.
  """
  path = local_path(path)
  for part in (path, *path.parents):
    if part.exists() or part.is_symlink():
      if not part.is_dir():
        kind = "a file" if part.is_file() else "a broken link, a fifo, a socket or a device"
        raise ValueError(f"{path} cannot be a folder: {part} is {kind}. Choose another path")
      break
  path.mkdir(parents=True, exist_ok=True)
  return path


@contextmanager
def new_path(path: str | Path) -> Iterator[Path]:
  """Yields a path for a file or folder to write, which appears at `path` at the end or not at all.

  Raises:
    FileExistsError: if there is something at `path`.
    ValueError: if one of its parents is a file; or as `local_path`.
  """
  path = local_path(path)
  if path.exists():
    raise FileExistsError(f"{path} exists; nothing is overwritten")
  make_folder(path.parent)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as name:
    temporary = Path(name) / "new"
    yield temporary
    os.rename(temporary, path)


def read_bytes(path: str | Path) -> bytes:
  """Returns the content of a regular file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is a folder, a fifo or a device.
  """
  return regular_file(path).read_bytes()


def regular_file(path: str | Path) -> Path:
  """Returns the path of a regular file; errors as in `read_bytes`."""
  path = local_path(path)
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist")
  if not path.is_file():
    kind = "a folder" if path.is_dir() else "a fifo, a socket or a device"
    raise ValueError(f"{path} is {kind}, expected a file")
  return path


def read_text(path: str | Path) -> str:
  """Returns the text in a file; errors as in `read_bytes`, and ValueError if it is not UTF-8."""
  try:
    return read_bytes(path).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
  """Yields the place, `FILE:NUMBER`, and the text of each line, without its line break.

  A byte-order mark at the start is left out, and a carriage return at the end of a line.

  Raises:
    FileNotFoundError, ValueError: as in `read_bytes`, or if a line is not UTF-8, has a NUL byte
      or more than 64 MiB.
  """
  path = regular_file(path)
  with path.open("rb") as file:
    for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), b""), 1):
      where = f"{path}:{number}"
      if len(line) > _MAX_LINE:
        raise ValueError(f"{where}: the line has more than {_MAX_LINE >> 20} MiB")
      yield where, decode_line(line, where, is_first=number == 1)


def decode_line(line: bytes, where: str, is_first: bool) -> str:
  """Returns the text of a line of a file; errors as in `read_lines`."""
  if is_first:
    line = line.removeprefix(b"\xef\xbb\xbf")
  if b"\0" in line:
    raise ValueError(f"{where}: expected UTF-8, got a NUL byte: it is binary, or UTF-16")
  try:
    return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{where}: expected UTF-8, got byte 0x{line[error.start]:02x}") from error


def parse_json(text: str | bytes, where: str | Path) -> Any:
  """Returns the value of a JSON text.

  Args:
    text: UTF-8 if it is bytes.
    where: the file, or the file and line, for messages.
  Raises:
    ValueError: if it is not UTF-8 or not JSON, an object has a key twice, an integer has more
      than 400 digits, a string holds half of a surrogate pair, or the nesting is too deep for
      Python's parser.
  """
  if isinstance(text, bytes):
    try:
      text = text.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"{where} is not text in UTF-8: {error}") from error

  def without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
      if key in value:
        raise ValueError(f"{where}: the key {key[:100]!r} occurs twice in one object")
      value[key] = item
    return value

  def short_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
      raise ValueError(f"{where}: an integer of {len(digits)} digits; at most {_MAX_DIGITS}")
    return int(digits)

  try:
    value = json.loads(text, object_pairs_hook=without_duplicates, parse_int=short_integer)
    if re.search(r"\\u[dD][89a-fA-F]", text):
      json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value
  except json.JSONDecodeError as error:
    raise ValueError(f"{where} is not JSON: {error}") from error
  except UnicodeEncodeError as error:
    half = error.object[error.start]
    raise ValueError(f"{where}: half of a surrogate pair, {half!a}, is not text") from None
  except RecursionError:
    raise ValueError(f"{where} is nested too deeply to be read as JSON") from None


def read_json(path: str | Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: as in `read_text` and `parse_json`, or if the value is not an object.
  """
  value = parse_json(read_text(path), path)
  if not isinstance(value, dict):
    raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
  return value


def read_json_if_present(path: str | Path) -> dict[str, Any]:
  """Returns the object in a JSON file, or an empty one if there is no such file."""
  return read_json(path) if local_path(path).exists() else {}
