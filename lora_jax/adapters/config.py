"""The configuration of an adapter: which weights to adapt, and how."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import jax

from lora_jax.adapters.delta import BiasGain, Shared, Variant
from lora_jax.adapters.initializers import Initializer
from lora_jax.axes import INNER, LoraAxes
from lora_jax.fields import (
  Count,
  CountOrZero,
  Finite,
  Pattern,
  Share,
  check_fields,
  read_value,
)

Init = Literal["kaiming_uniform", "gaussian", "original_code"] | Initializer
OnUnhandled = Literal["raise", "materialize"]


def nonzero(name: str, value: float) -> None:
  """Raises ValueError if a value is 0."""
  if value == 0:
    raise ValueError(f"{name} must not be 0, which would train nothing, got {value!r}")


Alpha = Annotated[Finite, nonzero]


@dataclasses.dataclass(frozen=True)
class LoraRule:
  """Settings of the targeted weights that `pattern` matches; None keeps the config's.

  Attributes:
    pattern: a regular expression for the whole path. The first rule that matches counts.
    rank: of these weights.
    alpha: of these weights; scaling is alpha / rank.
    init: of these weights.
    dropout: of these weights' inputs.
    axes: instead of the inferred ones.
    stacked_layers: as in `LoraConfig`.
    on_unhandled: "materialize" computes W + scaling * AB where an operation has no rule, and
      warns once; "raise" raises.
    variant: of LoRA, for these weights.
  """

  pattern: Pattern
  rank: Count | None = None
  alpha: Alpha | None = None
  init: Init | None = None
  dropout: Share | None = None
  axes: LoraAxes | None = None
  stacked_layers: Sequence[CountOrZero] | None = None
  on_unhandled: OnUnhandled = "raise"
  variant: Variant | None = None

  def __post_init__(self):
    _check_traced(self.alpha)
    check_fields(self)
    for name, dims in (self.axes._asdict() if self.axes is not None else {}).items():
      read_value(Sequence[CountOrZero], dims, f"axes.{name}")
    _check_variant(self.variant)
    _check_layers("stacked_layers", self.stacked_layers)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """LoRA of the weights whose path `target` matches (Hu et al. 2021, sec. 4).

  Attributes:
    rank: of A and B; at most the smaller dimension of every weight.
    alpha: the branch is scaled by alpha / rank (sec. 4.1). 0 is an error, since it would train
      nothing. A negative alpha trains the same function as a positive one, with B negated; loaded
      adapters may have one.
    target: regular expressions for whole paths, `.*/attn/(query|value)/kernel`.
    dropout: the rate at which elements of the branch's input are dropped in training.
    init: `kaiming_uniform`, `gaussian`, `original_code` (`adapters.initializers`), or a
      function `(key, a_shape, b_shape, fan_in) -> (lora_a, lora_b)`.
    rules: settings of some of the weights.
    extra: leaves that are fully trained: a head, biases, LayerNorm. Each has a float32 copy, 4
      bytes a parameter; the function gets it in the base model's dtype.
    layers: adapts these layers only, by the first integer in a path (`h_11/...`,
      `layers/11/...`).
    stacked_layers: of weights that are stacked (by `scan`), adapts these layers only, by the
      index on the stacked axis.
    variant: of LoRA, as `lora_jax.DORA`; None is that of the function which takes the config,
      plain LoRA for `lora_jax.lora`.

  Raises:
    ValueError: naming the field, its value and the allowed values.
  """

  rank: Count
  alpha: Alpha
  target: Pattern | Sequence[Pattern]
  dropout: Share = 0.0
  init: Init = "kaiming_uniform"
  rules: Sequence[LoraRule] = ()
  extra: Pattern | Sequence[Pattern] = ()
  layers: Sequence[CountOrZero] | None = None
  stacked_layers: Sequence[CountOrZero] | None = None
  variant: Variant | None = None

  def __post_init__(self):
    _check_traced(self.alpha)
    check_fields(self)
    _check_variant(self.variant)
    _check_layers("layers", self.layers)
    _check_layers("stacked_layers", self.stacked_layers)
    if not self.target and not self.extra:
      raise ValueError(f"target or extra must name a pattern, got target={self.target!r}")
    for i, rule in enumerate(self.rules):
      if not isinstance(rule, LoraRule):
        raise ValueError(f"rules[{i}] must be a LoraRule, got {rule!r}")
    patterns = [rule.pattern for rule in self.rules]
    for i, pattern in enumerate(patterns):
      if pattern in patterns[:i]:
        first = patterns.index(pattern)
        raise ValueError(
          f"rules[{i}] has the pattern of rules[{first}], {pattern!r}, and would never apply: the "
          "first rule that matches counts. Join the two"
        )


def check_config(config: object) -> None:
  """Raises ValueError unless it is a `LoraConfig`."""
  if not isinstance(config, LoraConfig):
    raise ValueError(f"expected a lora_jax.LoraConfig, got {config!r:.100}")


def _check_traced(alpha: object) -> None:
  if isinstance(alpha, jax.Array):
    raise ValueError(f"alpha must be a number, got {alpha!r}. To trace it, give apply(scaling=...)")


def _check_variant(variant: Variant | None) -> None:
  if variant is None:
    return
  where = f"variant {variant.name!r}"
  read_value(str, variant.name, "variant.name")
  _check_words(where, variant.arrays, ["batch", "in", "out", *INNER])
  names = set(variant.arrays)
  if variant.shared is not None:
    names |= _checked_shared(where, variant)
  if isinstance(variant.frozen, str) or not set(variant.frozen) <= names:
    raise ValueError(
      f"{where}: frozen={variant.frozen!r} must be a collection of names of its arrays, "
      f"{', '.join(sorted(names))}"
    )
  if set(variant.frozen) == names:
    raise ValueError(f"{where} has no array that is trained; expected one that is not in `frozen`")
  if variant.bias is not None:
    _check_bias(where, variant)
  for name in ("start", "weight", "sizes"):
    if not callable(getattr(variant, name)):
      raise ValueError(f"{where}: {name} must be a function, got {getattr(variant, name)!r}")


def _check_words(where: str, arrays: Mapping[str, str], known: Sequence[str]) -> None:
  read_value(Mapping, arrays, f"{where}: arrays")
  for name, words in arrays.items():
    read_value(str, name, f"{where}: the name of an array")
    read_value(str, words, f"{where}: arrays[{name!r}]")
    if not name.isidentifier() or name in ("axes", "sum_with_weight"):
      raise ValueError(
        f"{where}: {name!r} cannot name an array; expected an identifier other than axes and "
        "sum_with_weight"
      )
  words = {word for axes in arrays.values() for word in axes.split()}
  if unknown := words - set(known):
    raise ValueError(
      f"{where}: unknown axes {', '.join(sorted(unknown))}; expected {', '.join(known)}"
    )


def _checked_shared(where: str, variant: Variant) -> set[str]:
  """Returns the names of a variant's shared arrays; raises ValueError if they are not usable."""
  shared = variant.shared
  if not isinstance(shared, Shared):
    raise ValueError(f"{where}: shared must be a Shared(arrays, start), got {shared!r:.100}")
  _check_words(f"{where}: shared", shared.arrays, ["in", "out", *INNER])
  if not callable(shared.start):
    raise ValueError(f"{where}: shared.start must be a function, got {shared.start!r}")
  if both := set(shared.arrays) & set(variant.arrays):
    raise ValueError(f"{where} has {', '.join(sorted(both))} in its arrays and in its shared ones")
  if "/" in variant.name:
    raise ValueError(f"{where} has shared arrays, and a '/' in its name, which joins paths")
  return set(shared.arrays)


def _check_bias(where: str, variant: Variant) -> None:
  gain = variant.bias
  if not isinstance(gain, BiasGain):
    raise ValueError(f"{where}: bias must be a BiasGain(array, paths), got {gain!r:.100}")
  if sorted(variant.arrays.get(gain.array, "").split()) not in (["batch", "out"], ["out"]):
    raise ValueError(f"{where}: bias names {gain.array!r}, expected an array of 'batch out'")
  read_value(Mapping, gain.paths, f"{where}: bias.paths")
  for path, bias in gain.paths.items():
    read_value(str | None, bias, f"{where}: bias.paths[{path!r}]")


def _check_layers(name: str, layers: Sequence[int] | None) -> None:
  if layers is None:
    return
  if not layers:
    raise ValueError(f"{name} must name a layer, got {layers!r}; None adapts all layers")
  if repeated := [layer for layer, count in Counter(layers).items() if count > 1]:
    raise ValueError(f"{name}={list(layers)} names layer {repeated[0]} twice; expected each once")


def exact_config(rules: Mapping[str, LoraRule], extra: Iterable[str]) -> LoraConfig:
  """Returns the config that adapts only the weights at these paths.

  Args:
    rules: by path, a rule with that path, escaped, as its pattern, and with rank and alpha.
    extra: paths of leaves that are fully trained.
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
