"""The rows of the tables of bad inputs: a `bad_inputs.py` in each folder of tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class BadInput(NamedTuple):
  """An input that must be refused, and the words that the message must have.

  Attributes:
    name: of the row, unique in its table.
    call: gives the input to the code, with an empty folder.
    words: each must occur in the message: the field or file, the value, what is allowed.
    error: the expected type.
  """

  name: str
  call: Callable[[Path], Any]
  words: tuple[str, ...]
  error: type[Exception] = ValueError
