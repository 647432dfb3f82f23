"""Types of command-line arguments: integers with a lower bound."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
  """Returns the type of an argument that is an integer with this lower bound."""

  def number(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = least - 1
    if value < least:
      raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return value

  return number


count, count_or_zero = at_least(1), at_least(0)
