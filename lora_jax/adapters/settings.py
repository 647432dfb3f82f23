"""The arguments of `apply` that replace settings of the config: scaling, dropout and its key."""

import enum
from collections.abc import Mapping
from typing import Any

from jaxtyping import PRNGKeyArray

from lora_jax.adapters.checks import check_number
from lora_jax.adapters.targets import Target
from lora_jax.fields import Finite, Share
from lora_jax.trees import closest_names


class NotGiven(enum.Enum):
  """Distinguishes an argument that was left out from None."""

  NOT_GIVEN = enum.auto()


NOT_GIVEN = NotGiven.NOT_GIVEN


def scalings_of(scaling: Any, targets: Mapping[str, Target]) -> Mapping[str, Any]:
  """Returns the scaling of each weight by path: the argument of `apply`, or the config's."""
  defaults = {path: target.scaling for path, target in targets.items()}
  return _by_path(scaling, defaults, "scaling", Finite)


def dropout_rates_of(rate: Any, targets: Mapping[str, Target]) -> Mapping[str, Any]:
  """Returns the dropout rate of each weight by path, in the same way."""
  defaults = {path: target.dropout for path, target in targets.items()}
  return _by_path(rate, defaults, "dropout_rate", Share)


def _by_path(value: Any, defaults: Mapping[str, float], name: str, kind: Any) -> Mapping[str, Any]:
  """Returns a value for each path; None is the default, a mapping may have some of the paths."""
  if value is None:
    return defaults
  for path, number in value.items() if isinstance(value, Mapping) else [("", value)]:
    check_number(f"{name}[{path!r}]" if path else name, number, kind)
  if not isinstance(value, Mapping):
    return dict.fromkeys(defaults, value)
  unknown = [path for path in value if path not in defaults]
  if unknown:
    names = ", ".join(closest_names(unknown[0], defaults))
    raise ValueError(
      f"{name} names {', '.join(unknown)}, which is not adapted. Did you mean {names}?"
    )
  return {path: value.get(path, default) for path, default in defaults.items()}


def dropout_key(
  lora_key: PRNGKeyArray | NotGiven | None, targets: Mapping[str, Target], dropout_rate: Any
) -> PRNGKeyArray | None:
  """Returns the key, None to evaluate; raises ValueError if there is dropout and none is given."""
  rates = dropout_rates_of(dropout_rate, targets)
  drops = not all(is_zero(rate) for rate in rates.values())
  if not drops:
    return None
  if isinstance(lora_key, NotGiven):
    raise ValueError(
      "there is LoRA dropout, so apply needs lora_key: a key to train, None to evaluate"
    )
  return lora_key


def is_zero(rate: Any) -> bool:
  """Tells whether a dropout rate is known to be 0; a traced one is not."""
  return isinstance(rate, int | float) and rate == 0
