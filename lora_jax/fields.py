"""Types and bounds of what a user writes: the fields of configs, and values read from JSON.

A dataclass states the bounds in its annotations, and one function checks them all:

    @dataclasses.dataclass(frozen=True)
    class Optimizer:
      learning_rate: Positive
      b1: Annotated[float, Within("[0, 1)")]

      def __post_init__(self):
        check_fields(self)
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lora_jax.files import local_path
from lora_jax.trees import as_patterns, closest_names

Section = TypeVar("Section")

_SHOWN = 200  # characters of a wrong value in a message


@dataclasses.dataclass(frozen=True)
class Within:
  """An interval in the notation of mathematics, such as `[0, 1)`; `inf` is an open end."""

  interval: str

  def __call__(self, name: str, value: float) -> None:
    """Raises ValueError if the value is not finite or outside the interval."""
    low, high = map(float, self.interval[1:-1].split(","))
    above = value > low if self.interval[0] == "(" else value >= low
    below = value < high if self.interval[-1] == ")" else value <= high
    if not (above and below and abs(value) != math.inf):  # nan is neither above nor below
      kind = "an integer" if isinstance(value, int) else "a finite number"
      raise ValueError(f"{name} must be {kind} in {self.interval}, got {_shown(value)}")


def pattern(name: str, value: str) -> None:
  """Raises ValueError if the value is not a regular expression for paths."""
  as_patterns(value, name)


def local(name: str, value: str) -> None:
  """Raises ValueError if the value cannot be the path of a local file or folder; "" is allowed."""
  try:
    local_path(value)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
  if "\0" in value:
    raise ValueError(f"{name} must be a path without NUL characters, got {_shown(value)}")
  if value == "~" or value.startswith("~/"):
    raise ValueError(
      f"{name} must be a path in full, got {value!r}: the shell expands ~ only at the start of a "
      f"word. Write $HOME{value[1:]}"
    )
  if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in value.split("/")):
    raise ValueError(
      f"{name} must be a path whose parts have at most 255 bytes, got {_shown(value)}"
    )


def nonempty(name: str, value: str) -> None:
  """Raises ValueError if the value is empty."""
  if not value:
    raise ValueError(f"{name} must not be empty, got ''")


Finite = Annotated[float, Within("(-inf, inf)")]
Positive = Annotated[float, Within("(0, inf)")]
NonNegative = Annotated[float, Within("[0, inf)")]
Share = Annotated[float, Within("[0, 1)")]  # dropout rates, smoothing, decay rates of moments
Count = Annotated[int, Within("[1, inf)")]
CountOrZero = Annotated[int, Within("[0, inf)")]
Pattern = Annotated[str, pattern]
LocalPath = Annotated[str, local]
NonEmptyPath = Annotated[str, nonempty, local]


def check_fields(config: Any, prefix: str = "") -> None:
  """Checks every field of a dataclass against its annotation.

  Args:
    config: an instance; its annotations may carry checks, `Annotated[float, Within("[0, 1)")]`.
    prefix: put before the names of fields in messages, `model.`.
  Raises:
    ValueError: naming the field, the value and what is allowed.
  """
  hints = get_type_hints(type(config), include_extras=True)
  for field in dataclasses.fields(config):
    read_value(hints[field.name], getattr(config, field.name), prefix + field.name)


def read_section(kind: type[Section], values: Mapping[str, Any], prefix: str = "") -> Section:
  """Returns a dataclass made from a mapping of its fields, nested dataclasses included.

  Args:
    kind: the dataclass. A field with a default may be missing in `values`.
    values: field names and values, as from JSON or a ConfigDict.
    prefix: put before the names of fields in messages, `optimizer.`.
  Raises:
    ValueError: naming the field, if it is unknown, missing, of another type or out of bounds.
  """
  hints = get_type_hints(kind, include_extras=True)
  fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
  for name in values:
    if name not in fields:
      likely = ", ".join(prefix + field for field in closest_names(str(name), fields))
      raise ValueError(f"the config has no field {prefix + str(name)!r}; did you mean {likely}?")
  for name, field in fields.items():
    has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
    if name not in values and not has_default:
      raise ValueError(f"the config lacks the field {prefix + name!r}")
  return kind(**{name: read_value(hints[name], values[name], prefix + name) for name in values})


def read_value(kind: Any, value: Any, name: str) -> Any:
  """Returns a value as the annotation `kind` has it: an integer for a float becomes a float, a
  list for a tuple a tuple, a mapping for a dataclass the dataclass.

  Raises:
    ValueError: naming the field, the value and what is allowed.
  """
  if get_origin(kind) is Annotated:
    base, *checks = get_args(kind)
    value = read_value(base, value, name)
    for check in checks:
      if callable(check):
        check(name, value)
    return value
  if get_origin(kind) in (Union, types.UnionType):
    return _read_union(get_args(kind), value, name)
  if get_origin(kind) is Literal:
    if any(type(value) is type(choice) and value == choice for choice in get_args(kind)):
      return value
    raise ValueError(f"{name} must be {_described(kind)}, got {_shown(value)}")
  if _is_list(kind) and isinstance(value, Sequence) and not isinstance(value, str | bytes):
    item, *_ = get_args(kind)
    return tuple(read_value(item, each, f"{name}[{i}]") for i, each in enumerate(value))
  if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
    return read_section(kind, value, f"{name}.")  # pyright: ignore[reportArgumentType]
  if kind is float and type(value) is int:
    return _as_float(value, name)
  if kind is Any or _is_instance(value, kind):
    return value
  raise ValueError(f"{name} must be {_described(kind)}, got {_shown(value)}")


def _read_union(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
  errors = []
  for kind in kinds:
    try:
      return read_value(kind, value, name)
    except ValueError as error:
      errors.append(error)
  # The bounds of the alternative that has the value's type say more than a list of types.
  for kind, error in zip(kinds, errors, strict=True):
    if (
      (get_origin(kind) is Annotated and type(value) is get_args(kind)[0])
      or (_is_list(kind) and str(error).startswith(f"{name}["))
      or (dataclasses.is_dataclass(kind) and isinstance(value, Mapping))
    ):
      raise error
  raise ValueError(f"{name} must be {' or '.join(map(_described, kinds))}, got {_shown(value)}")


def _is_list(kind: Any) -> bool:
  return get_origin(kind) in (tuple, Sequence)


def _is_instance(value: Any, kind: Any) -> bool:
  if kind is float:
    return isinstance(value, float)  # NumPy's float64 is one
  if kind in (bool, int, str):
    return type(value) is kind
  if _is_list(kind):
    return False
  if get_origin(kind) is Callable or kind is Callable:
    return callable(value)
  plain = get_origin(kind) or kind
  return not isinstance(plain, type) or isinstance(value, plain)


def _as_float(value: int, name: str) -> float:
  try:
    return float(value)
  except OverflowError:
    raise ValueError(f"{name} must be a finite number, got {_shown(value)}") from None


def _described(kind: Any) -> str:
  names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
  if get_origin(kind) is Annotated:
    base, *checks = get_args(kind)
    intervals = [f" in {check.interval}" for check in checks if isinstance(check, Within)]
    return _described(base) + "".join(intervals)
  if kind is type(None):
    return "none"
  if get_origin(kind) is Callable or kind is Callable:
    return "a function"
  if get_origin(kind) is Literal:
    return "one of " + ", ".join(str(choice) or "''" for choice in get_args(kind))
  if _is_list(kind):
    return "a list"
  return names.get(kind) or f"of type {getattr(kind, '__name__', kind)}"


def _shown(value: Any) -> str:
  if isinstance(value, int) and abs(value) >= 10**30:
    return f"an integer of {value.bit_length()} bits"
  text = repr(value)
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
