"""Adapters by path, for arithmetic: B multiplied by the scaling; and adapters made from such."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.adapters.checks import check_adapter, check_plain
from lora_jax.adapters.config import LoraConfig, LoraRule, exact_config
from lora_jax.adapters.delta import LoraWeight, adapter_extra, adapter_weights
from lora_jax.adapters.targets import Target, find_leaves
from lora_jax.trees import nest

Adapter = tuple[LoraConfig, PyTree]


class Opened(NamedTuple):
  """An adapter by path, with B multiplied by the scaling.

  Attributes:
    weights: the adapted weights.
    extra: the fully trained leaves.
    targets: the config's settings of the adapted weights.
    keys: of every leaf in nested dicts.
  """

  weights: dict[str, LoraWeight]
  extra: dict[str, Any]
  targets: dict[str, Target]
  keys: dict[str, tuple[str, ...]]


def check_adapters(adapters: Sequence[Adapter]) -> None:
  """Raises ValueError unless there is an adapter, and all are pairs `(config, trainable)`."""
  if not isinstance(adapters, list | tuple) or not adapters:
    raise ValueError(
      f"expected a list of adapters, (config, trainable) each, got {adapters!r:.100}"
    )
  for i, pair in enumerate(adapters):
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], LoraConfig)):
      raise ValueError(f"adapters[{i}] must be a pair (LoraConfig, trainable), got {pair!r:.100}")


def open_adapter(
  config: LoraConfig, trainable: PyTree, params: PyTree, factor: float = 1.0
) -> Opened:
  """Returns an adapter by path, its deltas multiplied by `factor`.

  Raises:
    ValueError: if it is not for these params, or a weight is not adapted by plain LoRA.
  """
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  weights = {}
  for path, weight in adapter_weights(trainable).items():
    check_plain(path, weight, "arithmetic of factors")
    a, b = (jnp.asarray(factor, jnp.float32) for factor in (weight.lora_a, weight.lora_b))
    weights[path] = weight.replace(lora_a=a, lora_b=b * jnp.float32(factor * targets[path].scaling))
  keys = {path: target.keys for path, target in targets.items()}
  keys |= {path: parts for path, (parts, _) in extra.items()}
  return Opened(weights, adapter_extra(trainable), targets, keys)


def by_path(opened: Sequence[Opened]) -> dict[str, dict[int, LoraWeight]]:
  """Returns by path the factors of each adapter that adapts the weight, by the adapter's index.

  Where adapters adapt different layers of a stack, each gets factors of all layers.

  Raises:
    ValueError: if two adapters factor a weight along other axes, or one fully trains a weight that
      another factors.
  """
  factored = {path for adapter in opened for path in adapter.weights}
  if conflicting := sorted(factored & {path for adapter in opened for path in adapter.extra}):
    raise ValueError(
      f"{', '.join(conflicting)} is adapted by factors in one adapter and fully trained in "
      "another, which have no common format. Merge one of them first"
    )
  parts_by_path: dict[str, dict[int, LoraWeight]] = {}
  for i, adapter in enumerate(opened):
    for path, weight in adapter.weights.items():
      parts_by_path.setdefault(path, {})[i] = weight
  for path, parts in parts_by_path.items():
    axes = {part.axes for part in parts.values()}
    if len(axes) > 1:
      raise ValueError(
        f"{path} is factored along {' and along '.join(map(str, sorted(axes)))}; expected the "
        "same axes in all adapters. Train with LoraRule(pattern, axes=LoraAxes(...))"
      )
    if len({part.layers for part in parts.values()}) > 1:
      for i, part in parts.items():
        parts[i] = _on_all_layers(part, opened[i].targets[path].leaf.shape)
  return parts_by_path


def _on_all_layers(weight: LoraWeight, shape: Sequence[int]) -> LoraWeight:
  """Returns factors of all layers of a stack of this shape, zeros in layers without an adapter."""
  if weight.layers is None:
    return weight
  count, layers = shape[weight.axes.batch[0]], jnp.asarray(weight.layers)
  a, b = (
    jnp.zeros((count, *x.shape[1:]), x.dtype).at[layers].set(x)
    for x in (weight.lora_a, weight.lora_b)
  )
  return LoraWeight(a, b, weight.axes)


def close_adapter(opened: Sequence[Opened], leaves: dict[str, Any]) -> Adapter:
  """Returns the adapter with these leaves, by path, and scaling 1."""
  rules, extra = {}, []
  for path, leaf in leaves.items():
    if not isinstance(leaf, LoraWeight):
      extra.append(path)
      continue
    behaviours = {
      adapter.targets[path].on_unhandled for adapter in opened if path in adapter.targets
    }
    rules[path] = LoraRule(
      re.escape(path),
      rank=leaf.rank,
      alpha=float(leaf.rank),
      stacked_layers=leaf.layers,
      on_unhandled="materialize" if "materialize" in behaviours else "raise",
    )
  keys = {path: parts for adapter in opened for path, parts in adapter.keys.items()}
  return exact_config(rules, extra), nest((keys[path], leaf) for path, leaf in leaves.items())
