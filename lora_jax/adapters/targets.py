"""The leaves of a parameter tree that a configuration selects."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.adapters.config import (
  Init,
  LoraConfig,
  LoraRule,
  OnUnhandled,
  check_config,
)
from lora_jax.adapters.copies import is_float
from lora_jax.adapters.delta import SHARED, Variant, is_shared
from lora_jax.axes import LoraAxes
from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.tracing import check_dtype, is_array
from lora_jax.trees import as_patterns, key_parts, matches, select, weights_with_path

NO_RULE = LoraRule(".*")


@dataclasses.dataclass(frozen=True)
class Target:
  """One weight to adapt: its path, and its settings."""

  path: str
  keys: tuple[str, ...]
  leaf: Any
  rank: int
  alpha: float
  init: Init
  dropout: float
  axes: LoraAxes | None
  by_number: bool  # selected by `layers`, the number in its path
  stacked_layers: tuple[int, ...] | None
  on_unhandled: OnUnhandled
  variant: Variant | None  # None is the transform's own

  @property
  def scaling(self) -> float:
    return self.alpha / self.rank


def variant_of(target: Target) -> Variant:
  """Returns the variant of a target of `adapt`, which sets it."""
  assert target.variant is not None, "`adapt` sets it"
  return target.variant


Extra = dict[str, tuple[tuple[str, ...], Any]]


def find_leaves(config: LoraConfig, params: PyTree) -> tuple[dict[str, Target], Extra]:
  """Returns the weights that `config` adapts, by path, in the order of `params`, and the extras.

  Returns:
    `{path: Target}`, and `{path: (keys, leaf)}` of the leaves that are fully trained.
  Raises:
    ValueError: if a pattern of `target`, `extra` or a rule matches nothing, or `target` matches a
      leaf that cannot be adapted.
  """
  check_config(config)
  leaves = array_leaves(params)
  if reserved := [path for path in leaves if is_shared(path)]:
    raise ValueError(
      f"params have a leaf {reserved[0]!r}, and the key {SHARED!r} is kept for the arrays that all "
      "adapted weights share. Rename it"
    )
  chosen = select_arrays(config.target, params, leaves, "target")
  for rule in config.rules:
    select(rule.pattern, chosen, "the rule")
  targets = {}
  for path in chosen:
    keys, leaf = leaves[path]
    target = _target(config, path, keys, leaf)
    if target is not None:
      targets[path] = target
  _check_numbers(config, chosen)
  patterns = as_patterns(config.extra, "extra")
  extra = select_arrays(patterns, params, leaves, "extra") if patterns else []
  both = [path for path in extra if path in targets]
  if both:
    raise ValueError(f"both target and extra match {', '.join(both)}; expected one of them")
  return targets, {path: leaves[path] for path in extra}


def shapes(targets: Mapping[str, Target]) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of targeted weights, by path."""
  return {path: tuple(target.leaf.shape) for path, target in targets.items()}


def array_leaves(params: PyTree) -> dict[str, tuple[tuple[str, ...], Any]]:
  """Returns `{path: (keys, leaf)}` of the arrays of a tree.

  Raises:
    ValueError: if two leaves have the same path, or one is of numbers that JAX does not have.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
  leaves: dict[str, tuple[tuple[str, ...], Any]] = {}
  for key_path, leaf in flat:
    keys = key_parts(key_path)
    path = "/".join(keys)
    if not keys:
      raise ValueError("params are a single array; expected a tree, as {'kernel': array}")
    if path in leaves:
      raise ValueError(f"two leaves of params have the path {path!r}; rename one")
    if is_array(leaf):
      check_dtype(path, leaf)
      leaves[path] = (keys, leaf)
  return leaves


def select_arrays(
  patterns: str | Iterable[str], params: PyTree, arrays: Iterable[str], setting: str
) -> list[str]:
  """Returns the paths of the arrays that the patterns match; each must match one.

  Args:
    patterns: regular expressions for whole paths.
    params: the tree.
    arrays: the paths of its arrays.
    setting: the name of the setting that holds the patterns, for the message.
  Raises:
    ValueError: if a pattern matches nothing, or constants of the function only.
  """
  arrays = list(arrays)
  for pattern in as_patterns(patterns, setting):
    if any(matches(pattern, path) for path in arrays):
      continue
    for path, leaf in weights_with_path(params):
      if matches(pattern, path):
        raise ValueError(
          f"{setting} {pattern!r} matches {path}, which is {leaf!r:.100}, a constant of the "
          f"function and not an array. Make it an array, jnp.asarray({leaf!r:.20}), to train it"
        )
  return select(patterns, arrays, setting)


def _check_numbers(config: LoraConfig, paths: Iterable[str]) -> None:
  """Raises ValueError if `layers` has a number that no targeted weight has."""
  numbers = sorted({layer_number(path) for path in paths} - {None})  # pyright: ignore
  if missing := sorted(set(config.layers or ()) - set(numbers)):
    raise ValueError(
      f"layers={list(config.layers or ())}: no targeted weight is in layer "
      f"{', '.join(map(str, missing))}; they are in {_ranges(numbers)}. Correct `layers`"
    )


def _ranges(numbers: list[int]) -> str:
  """Returns sorted numbers as ranges.

  >>> _ranges([0, 1, 2, 5])
  '0 to 2, 5'
  """
  starts = [n for n in numbers if n - 1 not in numbers]
  ends = [n for n in numbers if n + 1 not in numbers]
  pairs = zip(starts, ends, strict=True)
  return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in pairs)


def _target(config: LoraConfig, path: str, keys: tuple[str, ...], leaf: Any) -> Target | None:
  rule = next((r for r in config.rules if matches(r.pattern, path)), NO_RULE)
  if leaf.ndim < 2 or not _is_signed_float(leaf.dtype):
    remedy = "Fully train it with `extra`, or narrow" if is_float(leaf.dtype) else "Narrow"
    raise ValueError(
      f"{path} cannot be adapted by LoRA: expected an array of at least two axes, of real floating-"
      f"point numbers with a sign, got {leaf.dtype.name} of shape {leaf.shape}. {remedy} `target`"
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
    axes=None if rule.axes is None else LoraAxes(*map(tuple, rule.axes)),
    by_number=config.layers is not None,
    stacked_layers=None if stacked is None else tuple(stacked),
    on_unhandled=rule.on_unhandled,
    variant=config.variant if rule.variant is None else rule.variant,
  )


def _is_signed_float(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.floating) and bool(jnp.finfo(dtype).min < 0)  # not e8m0fnu


def layer_number(path: str) -> int | None:
  """Returns the first integer in a path, which numbers its layer; None if there is none.

  >>> layer_number("h_11/attn/query/kernel"), layer_number("blocks/attn/query/kernel")
  (11, None)
  """
  match = re.search(r"(?:^|[/_.])(\d+)(?=[/_.]|$)", path)
  return int(match[1]) if match else None
