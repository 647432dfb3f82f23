"""What to adapt: the configuration, and the leaves of a parameter tree that it means."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax.adapter import LoraAxes
from lora_jax.initializers import BY_NAME, Initializer
from lora_jax.tracing import is_array
from lora_jax.trees import as_patterns, key_parts, matches, near, select

PyTree = Any
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
  """

  pattern: str
  rank: int | None = None
  alpha: float | None = None
  init: Init | None = None
  dropout: float | None = None
  axes: LoraAxes | None = None
  stacked_layers: Sequence[int] | None = None
  on_unhandled: OnUnhandled = "raise"

  def __post_init__(self):
    as_patterns(self.pattern)
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
    init: `kaiming_uniform`, `gaussian`, `original_code` (see `lora_jax.initializers`), or a
      function `(key, a_shape, b_shape, fan_in) -> (lora_a, lora_b)`.
    rules: what differs for some of the weights.
    extra: leaves that are trained whole besides: a head, biases, LayerNorm.
    layers: adapts these layers only, by the first integer in a path (`h_11/...`,
      `layers/11/...`).
    stacked_layers: of weights that are stacked (by `scan`), adapts these layers only, by the
      index on the stacked axis.

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

  def __post_init__(self):
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
    known = ", ".join(near(str(init), BY_NAME))
    raise ValueError(f"init must be one of {known}, or a function, got {init!r}")
  if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
    raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")


def _check_layers(name: str, layers: Sequence[int] | None) -> None:
  if layers is not None and not (len(layers) and all(map(_is_index, layers))):
    raise ValueError(f"{name} must be a sequence of layer numbers from 0, got {layers!r}")


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclasses.dataclass(frozen=True)
class Target:
  """One weight to adapt: where it is, and the settings that hold for it."""

  path: str
  keys: tuple[str, ...]
  leaf: Any
  rank: int
  alpha: float
  init: Init
  dropout: float
  axes: LoraAxes | None
  by_number: bool  # chosen by `layers`, the number in its path
  stacked_layers: tuple[int, ...] | None
  on_unhandled: OnUnhandled

  @property
  def scaling(self) -> float:
    return self.alpha / self.rank


Extra = dict[str, tuple[tuple[str, ...], Any]]


def find_leaves(config: LoraConfig, params: PyTree) -> tuple[dict[str, Target], Extra]:
  """Returns the weights that `config` adapts, by path, in the order of `params`, and the extras.

  Returns:
    `{path: Target}`, and `{path: (keys, leaf)}` of the leaves that are trained whole.
  Raises:
    ValueError: if a pattern of `target`, `extra` or a rule matches nothing, or what it matches
      cannot be adapted.
  """
  leaves = array_leaves(params)
  chosen = select(config.target, leaves, "target")
  for rule in config.rules:
    select(rule.pattern, chosen, "the rule")
  targets = {}
  for path in chosen:
    keys, leaf = leaves[path]
    target = _target(config, path, keys, leaf)
    if target is not None:
      targets[path] = target
  if not targets:
    raise ValueError(f"layers={list(config.layers or ())} leaves none of the targeted weights")
  extra = select(config.extra, leaves, "extra") if as_patterns(config.extra) else []
  both = [path for path in extra if path in targets]
  if both:
    raise ValueError(f"both target and extra match {', '.join(both)}; expected one of them")
  return targets, {path: leaves[path] for path in extra}


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


def array_leaves(params: PyTree) -> dict[str, tuple[tuple[str, ...], Any]]:
  """Returns `{path: (keys, leaf)}` of the arrays of a tree.

  Raises:
    ValueError: if two leaves have the same path.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  leaves: dict[str, tuple[tuple[str, ...], Any]] = {}
  for key_path, leaf in flat:
    keys = key_parts(key_path)
    path = "/".join(keys)
    if not keys:
      raise ValueError("params are a single array; expected a tree, as {'kernel': array}")
    if path in leaves:
      raise ValueError(f"two leaves of params have the path {path!r}; rename one")
    if is_array(leaf):
      leaves[path] = (keys, leaf)
  return leaves


def _target(config: LoraConfig, path: str, keys: tuple[str, ...], leaf: Any) -> Target | None:
  rule = next((r for r in config.rules if matches(r.pattern, path)), LoraRule(".*"))
  if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise ValueError(
      f"{path} cannot be adapted by LoRA: expected a floating-point array of at least two axes, "
      f"got {leaf.dtype.name} of shape {leaf.shape}. Train it whole with `extra`, "
      "or narrow `target`"
    )
  number = layer_number(path)
  if config.layers is not None:
    if number is None:
      raise ValueError(
        f"{path}: layers={list(config.layers)} needs a layer's number in the path. Narrow "
        "`target` to the layers' weights, or give stacked_layers for a stack of layers"
      )
    if number not in config.layers:
      return None
  stacked = config.stacked_layers if rule.stacked_layers is None else rule.stacked_layers
  if rule.axes is not None:
    rule.axes.check(leaf.ndim, path)
  return Target(
    path,
    keys,
    leaf,
    rank=config.rank if rule.rank is None else rule.rank,
    alpha=config.alpha if rule.alpha is None else rule.alpha,
    init=config.init if rule.init is None else rule.init,
    dropout=config.dropout if rule.dropout is None else rule.dropout,
    axes=rule.axes,
    by_number=config.layers is not None,
    stacked_layers=None if stacked is None else tuple(stacked),
    on_unhandled=rule.on_unhandled,
  )


def layer_number(path: str) -> int | None:
  """Returns the first integer in a path, which numbers its layer; None if there is none.

  >>> layer_number("h_11/attn/query/kernel"), layer_number("blocks/attn/query/kernel")
  (11, None)
  """
  found = re.search(r"(?:^|[/_.])(\d+)(?=[/_.]|$)", path)
  return int(found[1]) if found else None
