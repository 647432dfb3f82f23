"""What to adapt: the configuration, and the leaves of a parameter tree that it means."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lora_jax.adapters.delta import Variant
from lora_jax.adapters.initializers import BY_NAME, Initializer
from lora_jax.axes import INNER, LoraAxes
from lora_jax.trees import as_patterns, closest_names

Init = Literal["kaiming_uniform", "gaussian", "original_code"] | Initializer
OnUnhandled = Literal["raise", "materialize"]


@dataclasses.dataclass(frozen=True)
class LoraRule:
  """What is different for the targeted weights that `pattern` matches; None changes nothing.

  Attributes:
    pattern: a regular expression for the whole path. The first rule that matches counts.
    rank: of these weights.
    alpha: of these weights; scaling is alpha / rank.
    init: of these weights.
    dropout: of these weights' inputs.
    axes: instead of the inferred ones.
    stacked_layers: as in `LoraConfig`.
    on_unhandled: "materialize" forms W + scaling * AB where an operation has no rule, and
      warns once; "raise" raises.
    variant: of LoRA, for these weights.
  """

  pattern: str
  rank: int | None = None
  alpha: float | None = None
  init: Init | None = None
  dropout: float | None = None
  axes: LoraAxes | None = None
  stacked_layers: Sequence[int] | None = None
  on_unhandled: OnUnhandled = "raise"
  variant: Variant | None = None

  def __post_init__(self):
    as_patterns(self.pattern)
    _check_variant(self.variant)
    _check(self.rank, self.alpha, self.init, self.dropout)
    _check_layers("stacked_layers", self.stacked_layers)
    if self.on_unhandled not in ("raise", "materialize"):
      raise ValueError(f"on_unhandled must be 'raise' or 'materialize', got {self.on_unhandled!r}")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """LoRA of the weights whose path `target` matches (Hu et al. 2021, sec. 4).

  Attributes:
    rank: of A and B; at most the smaller side of every weight.
    alpha: the branch is scaled by alpha / rank (sec. 4.1).
    target: regular expressions for whole paths, `.*/attn/(query|value)/kernel`.
    dropout: the rate at which elements of the branch's input are dropped in training.
    init: `kaiming_uniform`, `gaussian`, `original_code` (`adapters.initializers`), or a
      function `(key, a_shape, b_shape, fan_in) -> (lora_a, lora_b)`.
    rules: what differs for some of the weights.
    extra: leaves that are trained whole besides: a head, biases, LayerNorm.
    layers: adapts these layers only, by the first integer in a path (`h_11/...`,
      `layers/11/...`).
    stacked_layers: of weights that are stacked (by `scan`), adapts these layers only, by the
      index on the stacked axis.
    variant: of LoRA, as `lora_jax.DORA`; None is that of the function which takes the config,
      plain LoRA for `lora_jax.lora`.

  Raises:
    ValueError: naming what was expected and what came.
  """

  rank: int
  alpha: float
  target: str | Sequence[str]
  dropout: float = 0.0
  init: Init = "kaiming_uniform"
  rules: Sequence[LoraRule] = ()
  extra: str | Sequence[str] = ()
  layers: Sequence[int] | None = None
  stacked_layers: Sequence[int] | None = None
  variant: Variant | None = None

  def __post_init__(self):
    _check_variant(self.variant)
    for name in ("rank", "alpha", "dropout", "init"):
      if getattr(self, name) is None:
        raise ValueError(f"{name} must be given, got None")
    _check(self.rank, self.alpha, self.init, self.dropout)
    _check_layers("layers", self.layers)
    _check_layers("stacked_layers", self.stacked_layers)
    if not as_patterns(self.target):
      raise ValueError("target must name a pattern, got none")
    as_patterns(self.extra)
    for rule in self.rules:
      if not isinstance(rule, LoraRule):
        raise ValueError(f"rules must be LoraRules, got {rule!r}")


def _check(rank, alpha, init, dropout) -> None:
  if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
    raise ValueError(f"rank must be a positive integer, got {rank!r}")
  if alpha is not None and not (_is_number(alpha) and math.isfinite(alpha)):
    raise ValueError(
      f"alpha must be a finite number, got {alpha!r}. To trace it, give apply(scaling=...)"
    )
  if init is not None and not callable(init) and init not in BY_NAME:
    known = ", ".join(closest_names(str(init), BY_NAME))
    raise ValueError(f"init must be one of {known}, or a function, got {init!r}")
  if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
    raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")


def _check_variant(variant: Any) -> None:
  if variant is not None and not isinstance(variant, Variant):
    raise ValueError(f"variant must be a lora_jax.Variant, as lora_jax.DORA, got {variant!r}")
  if variant is None:
    return
  words = {word for axes in variant.arrays.values() for word in axes.split()}
  if unknown := words - {"batch", "in", "out", *INNER}:
    raise ValueError(
      f"variant {variant.name}: unknown axes {', '.join(sorted(unknown))}; expected batch, in, "
      f"out, {', '.join(INNER)}"
    )
  if isinstance(variant.frozen, str) or not set(variant.frozen) <= set(variant.arrays):
    raise ValueError(
      f"variant {variant.name}: frozen={variant.frozen!r} must be a collection of names of its "
      f"arrays, {', '.join(variant.arrays)}"
    )


def _check_layers(name: str, layers: Sequence[int] | None) -> None:
  if layers is not None and not (len(layers) and all(map(_is_index, layers))):
    raise ValueError(f"{name} must be a sequence of layer numbers from 0, got {layers!r}")


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def exact_config(rules: Mapping[str, LoraRule], extra: Iterable[str]) -> LoraConfig:
  """Returns the config that adapts the weights at some paths and no others.

  Args:
    rules: by path, a rule whose pattern is that path, escaped, and that gives rank and alpha.
    extra: paths of leaves that are trained whole.
  """
  (rank, alpha), _ = Counter((rule.rank, rule.alpha) for rule in rules.values()).most_common(1)[0]
  assert rank is not None, "a rule for a path gives the rank"
  assert alpha is not None, "and alpha"
  return LoraConfig(
    rank,
    alpha,
    target=[rule.pattern for rule in rules.values()],
    rules=[r for r in rules.values() if r != LoraRule(r.pattern, rank=rank, alpha=alpha)],
    extra=[re.escape(path) for path in extra],
  )
