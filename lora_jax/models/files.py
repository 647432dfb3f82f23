"""The texts and JSON objects in the files of model folders."""

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
  """Returns the text in a file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not UTF-8.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist")
  try:
    return path.read_text("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it does not hold a JSON object.
  """
  try:
    value = json.loads(read_text(path))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
  return value


def read_json_if_there(path: Path) -> dict[str, Any]:
  """Returns the object in a JSON file, an empty one if there is no such file; errors likewise."""
  return read_json(path) if path.is_file() else {}
