"""Fields: types, bounds, and messages that name the field, the value and what is allowed."""

import dataclasses
import math
from typing import Annotated, Literal

import pytest

from lora_jax.fields import (
  Count,
  CountOrZero,
  Finite,
  LocalPath,
  NonEmptyPath,
  NonNegative,
  Pattern,
  Positive,
  Share,
  Within,
  check_fields,
  read_section,
  read_value,
)


@dataclasses.dataclass(frozen=True)
class Part:
  rate: Positive
  names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Whole:
  part: Part
  count: Count | None = None
  mode: Literal["", "fast"] = ""

  def __post_init__(self):
    check_fields(self, "whole.")


@pytest.mark.parametrize(
  ("kind", "values"),
  [
    (Finite, (-1e300, 0.0, 3)),
    (Positive, (1e-300, 5)),
    (NonNegative, (0.0, 1e300)),
    (Share, (0.0, 0.999)),
    (Count, (1, 10**18)),
    (CountOrZero, (0, 10**400)),
    (Annotated[float, Within("(0, 1]")], (1.0, 0.1)),
    (Pattern, ("", r".*/attn/(query|value)/kernel")),
    (LocalPath, ("", "runs/a", "/x/y", "org/model", "./~")),
    (NonEmptyPath, ("runs", ".")),
  ],
)
def test_values_in_bounds_are_kept(kind, values):
  for value in values:
    assert read_value(kind, value, "x") == value


@pytest.mark.parametrize(
  ("kind", "value", "message"),
  [
    (Finite, math.nan, r"x must be a finite number in \(-inf, inf\), got nan"),
    (Finite, -math.inf, r"x must be a finite number in \(-inf, inf\), got -inf"),
    (Finite, 10**400, "x must be a finite number, got an integer of 1329 bits"),
    (Positive, 0, r"x must be a finite number in \(0, inf\), got 0\.0"),
    (Positive, True, "x must be a number, got True"),
    (NonNegative, -1e-9, r"in \[0, inf\), got -1e-09"),
    (Share, 1.0, r"in \[0, 1\), got 1\.0"),
    (Count, 0, r"x must be an integer in \[1, inf\), got 0"),
    (Count, 1.0, "x must be an integer, got 1.0"),
    (Annotated[int, Within("[1, 1_000]")], 10**400, r"in \[1, 1_000\], got an integer of 1329"),
    (Pattern, "a(", r"x: 'a\(' is not a regular expression"),
    (LocalPath, "gs://bucket/run", "x: gs://bucket/run is a gs:// address"),
    (LocalPath, "a\0b", r"x must be a path without NUL characters, got 'a\\x00b'"),
    (LocalPath, "~/run", r"the shell expands ~ .*Write \$HOME/run"),
    (LocalPath, "a/" + "é" * 128, "parts have at most 255 bytes"),
    (NonEmptyPath, "", "x must not be empty"),
    (Literal["", "fast"], "slow", "x must be one of '', fast, got 'slow'"),
  ],
)
def test_values_out_of_bounds_are_refused(kind, value, message):
  with pytest.raises(ValueError, match=message):
    read_value(kind, value, "x")


def test_a_long_value_is_shortened():
  with pytest.raises(ValueError, match=r"\.\.\. \(1000002 characters\)") as raised:
    read_value(int, "a" * 10**6, "x")
  assert len(str(raised.value)) < 300


def test_sections_are_read_with_their_parts():
  read = read_section(Whole, {"part": {"rate": 1, "names": ["a"]}, "count": 2})
  assert read == Whole(Part(1.0, ("a",)), 2)
  for values, message in (
    ({"part": {"rate": 0}}, r"part\.rate must be a finite number in \(0, inf\), got 0\.0"),
    ({"part": {"rate": 1, "names": ["a", 2]}}, r"part\.names\[1\] must be a string, got 2"),
    ({"part": {"rte": 1}}, r"no field 'part\.rte'; did you mean part\.rate"),
    ({"part": {}}, r"lacks the field 'part\.rate'"),
    ({"part": {"rate": 1}, "count": 0}, r"count must be an integer in \[1, inf\), got 0"),
    ({"part": {"rate": 1}, "count": "2"}, "count must be an integer in .* or none, got '2'"),
  ):
    with pytest.raises(ValueError, match=message):
      read_section(Whole, values)


def test_a_dataclass_is_checked_when_constructed():
  with pytest.raises(ValueError, match=r"whole\.mode must be one of '', fast, got 'slow'"):
    Whole(Part(1.0), mode="slow")  # pyright: ignore[reportArgumentType]
