"""Names of modules by their endings and patterns, as in PEFT's `target_modules`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.patterns import fullmatch


def shortest_endings(chosen: Iterable[str], modules: Sequence[str]) -> list[str]:
  """Returns the shortest endings of names that match the chosen modules and no others.

  >>> shortest_endings(["h.0.attn.q", "h.1.attn.q"], ["h.0.attn.q", "h.1.attn.q", "h.0.mlp.up"])
  ['q']
  """
  chosen = list(chosen)
  for count in range(1, max(name.count(".") for name in chosen) + 2):
    endings = list(dict.fromkeys(".".join(name.split(".")[-count:]) for name in chosen))
    whole = not any(ending[0].isdecimal() for ending in endings)
    if whole and {name for name in modules if named(name, endings)} == set(chosen):
      return endings
  return chosen


def usual(values: Iterable[Any]) -> Any:
  """Returns the commonest of several values."""
  return Counter(values).most_common(1)[0][0]


def pattern_of(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """Returns the commonest value of the modules, and the others by the endings of their names.

  >>> pattern_of({"h.0.q": 2, "h.0.v": 2, "h.1.q": 2, "h.0.up": 8, "h.1.up": 8})
  (2, {'up': 8})
  """
  most, by_ending = usual(values.values()), {}
  for value in dict.fromkeys(values.values()):
    if value != most:
      names_with_value = [name for name, item in values.items() if item == value]
      by_ending |= dict.fromkeys(shortest_endings(names_with_value, list(values)), value)
  return most, by_ending


def named(module: str, names: str | Iterable[str]) -> bool:
  """Returns whether a regular expression matches a whole name, or one of several names ends it."""
  if isinstance(names, str):
    return fullmatch(names, module)
  return any(module == name or module.endswith(f".{name}") for name in names)


def by_pattern(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
  """Returns the value of the first pattern that matches the end of a name, or the default."""
  for ending, value in patterns.items():
    if fullmatch(rf"(.*\.)?({ending})", module):
      return value
  return default
