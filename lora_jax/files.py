"""Local paths, and the text and JSON in files that others may have written."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MAX_DIGITS = 400  # of an integer in JSON; more than any float has


def local_path(path: str | Path) -> Path:
  """Returns the path of a local file or folder.

  Raises:
    ValueError: if it is the address of a bucket or a server, such as `gs://bucket/run`, which
      `pathlib` would silently turn into a local folder named `gs:`.
  """
  if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path)):
    raise ValueError(
      f"{path} is a {match[1]}:// address, expected a local path. Copy the files to a local folder "
      "first, or mount the bucket (gcsfuse, mountpoint-s3) and name the mounted folder"
    )
  return Path(path)


def read_bytes(path: str | Path) -> bytes:
  """Returns the content of a regular file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is a folder, a fifo or a device.
  """
  path = local_path(path)
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist")
  if not path.is_file():
    kind = "a folder" if path.is_dir() else "a fifo, a socket or a device"
    raise ValueError(f"{path} is {kind}, expected a file")
  return path.read_bytes()


def read_text(path: str | Path) -> str:
  """Returns the text in a file; errors as of `read_bytes`, and ValueError if it is not UTF-8."""
  try:
    return read_bytes(path).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def parse_json(text: str | bytes, where: str | Path) -> Any:
  """Returns the value of a JSON text.

  Args:
    text: UTF-8 if it is bytes.
    where: the file, or the file and line, for messages.
  Raises:
    ValueError: if it is not UTF-8 or not JSON, an object has a key twice, an integer has more
      than 400 digits, or the nesting is too deep for Python's parser.
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
    return json.loads(text, object_pairs_hook=without_duplicates, parse_int=short_integer)
  except json.JSONDecodeError as error:
    raise ValueError(f"{where} is not JSON: {error}") from error
  except RecursionError:
    raise ValueError(f"{where} is nested too deeply to be read as JSON") from None


def read_json(path: str | Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: as of `read_text` and `parse_json`, or if the value is not an object.
  """
  value = parse_json(read_text(path), path)
  if not isinstance(value, dict):
    raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
  return value


def read_json_if_present(path: str | Path) -> dict[str, Any]:
  """Returns the object in a JSON file, or an empty one if there is no such file."""
  return read_json(path) if local_path(path).exists() else {}
