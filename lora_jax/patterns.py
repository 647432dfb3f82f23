"""Regular expressions for paths, matched in time that grows with the path, never exponentially.

Python's own matcher tries one way after another: `(a+)+b` on a path of forty letters never ends.
Here a pattern is a function from the positions where a match may start to those where it may end,
so that every position is visited once, however many ways lead to it. Patterns are Python's, with
lookarounds and flags; back references, atomic groups and possessive repeats are refused.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# Python's parser and code generator: `re` has no public name for a parsed pattern.
_parser: Any = re._parser  # pyright: ignore[reportAttributeAccessIssue]
_compiler: Any = re._compiler  # pyright: ignore[reportAttributeAccessIssue]

Step = Callable[[str, set[int]], set[int]]
"""From a text and the positions where a match may start to those where it may end."""

MAX_LENGTH = 10_000  # characters of a pattern
MAX_DEPTH = 100  # groups within groups
_ONE_CHARACTER = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT")  # or none: an anchor


def fullmatch(pattern: str, text: str) -> bool:
  """Tells whether a regular expression matches the whole of a text.

  >>> fullmatch(r"h_\\d+/attn/(query|value)/kernel", "h_11/attn/query/kernel")
  True
  >>> fullmatch("(a+)+b", "a" * 100)
  False

  Raises:
    ValueError: if the pattern is not a regular expression that can be matched in this way.
  """
  return compiled(pattern)(text)


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> Callable[[str], bool]:
  """Returns a function that tells whether a pattern matches the whole of a text.

  Raises:
    ValueError: if it is not a regular expression, too long, or has a back reference or the like.
  """
  if len(pattern) > MAX_LENGTH:
    raise ValueError(
      f"{pattern[:40]!r}... has {len(pattern):,} characters; a pattern has at most {MAX_LENGTH:,}"
    )
  try:
    parsed = _parser.parse(pattern)
    context = _Context(parsed.state)
    step, ending = _sequence(parsed, context), _ending(parsed, context)
  except (re.error, OverflowError) as error:
    raise ValueError(f"{pattern!r} is not a regular expression for paths: {error}") from error
  except RecursionError:
    raise ValueError(
      f"{pattern[:40]!r}... is not a regular expression for paths: nested too deeply"
    ) from None
  return lambda text: ending(text) and len(text) in step(text, {0})


class _Context(NamedTuple):
  """Where an item of a pattern is: the parser's state, the flags of its groups, their number."""

  state: Any
  added: int = 0
  removed: int = 0
  depth: int = 0

  def group(self, added: int = 0, removed: int = 0) -> "_Context":
    if self.depth >= MAX_DEPTH:
      raise re.error(f"more than {MAX_DEPTH} groups within one another")
    flags = (self.added & ~removed) | added, (self.removed & ~added) | removed
    return _Context(self.state, *flags, self.depth + 1)


def _sequence(items: Iterable[Any], context: _Context) -> Step:
  """Returns the concatenation of parsed items."""
  steps: list[Step] = []
  characters: list[Any] = []
  for item in items:
    if str(item[0]) in _ONE_CHARACTER:
      characters.append(item)
      continue
    if characters:
      steps.append(_characters(characters, context))
      characters = []
    steps.append(_step(str(item[0]), item[1], context))
  if characters:
    steps.append(_characters(characters, context))

  def run(text: str, starts: set[int]) -> set[int]:
    for step in steps:
      if not starts:
        break
      starts = step(text, starts)
    return starts

  return run


def _characters(items: Sequence[Any], context: _Context) -> Step:
  """Returns a run of single characters and anchors, which has one length: Python matches it."""
  inner = _parser.SubPattern(context.state, list(items))
  group = (_parser.SUBPATTERN, (None, context.added, context.removed, inner))
  match = _compiler.compile(_parser.SubPattern(context.state, [group])).match

  def run(text: str, starts: set[int]) -> set[int]:
    return {hit.end() for start in starts if (hit := match(text, start))}

  return run


def _ending(items: Iterable[Any], context: _Context) -> Callable[[str], bool]:
  """Returns a quick test of a text's last characters, which most texts fail."""
  items = list(items)
  if items and str(items[-1][0]) == "SUBPATTERN":
    _, added, removed, inner = items[-1][1]
    return _ending(inner, context.group(added, removed))
  one = (str(name) in _ONE_CHARACTER and str(name) != "AT" for name, _ in reversed(items))
  length = sum(1 for _ in itertools.takewhile(bool, one))
  if not length:
    return lambda text: True
  last = _characters(items[len(items) - length :], context)
  return lambda text: len(text) >= length and bool(last(text, {len(text) - length}))


def _step(name: str, value: Any, context: _Context) -> Step:
  """Returns an item that is not a single character."""
  if name == "SUBPATTERN":
    _, added, removed, inner = value
    return _sequence(inner, context.group(added, removed))
  if name == "BRANCH":
    choices = [_sequence(choice, context.group()) for choice in value[1]]
    return lambda text, starts: set().union(*(choice(text, starts) for choice in choices))
  if name in ("MAX_REPEAT", "MIN_REPEAT"):  # greedy or not, the whole matches or does not
    low, high, inner = value
    return _repeat(_sequence(inner, context.group()), low, high)
  if name in ("ASSERT", "ASSERT_NOT"):
    direction, inner = value
    low, high = inner.getwidth() if direction < 0 else (0, 0)
    if low != high:
      raise re.error("a lookbehind needs a fixed width")
    return _look(_sequence(inner, context.group()), low, direction, name == "ASSERT")
  if name == "FAILURE":  # an empty negative lookahead
    return lambda text, starts: set()
  raise re.error("back references, atomic groups and possessive repeats are not supported")


def _repeat(step: Step, low: int, high: int) -> Step:
  def run(text: str, starts: set[int]) -> set[int]:
    for _ in range(low):
      following = step(text, starts)
      if following == starts:  # so will all others be
        break
      starts = following
    ends, fresh, count = set(starts), starts, low
    while fresh and count < high:
      fresh = step(text, fresh) - ends
      ends |= fresh
      count += 1
    return ends

  return run


def _look(step: Step, width: int, direction: int, expected: bool) -> Step:
  """Returns a lookahead or a lookbehind, which is `width` characters wide."""

  def occurs(text: str, position: int) -> bool:
    if direction > 0:
      return bool(step(text, {position}))
    return position >= width and position in step(text, {position - width})

  def run(text: str, starts: set[int]) -> set[int]:
    return {start for start in starts if occurs(text, start) == expected}

  return run
