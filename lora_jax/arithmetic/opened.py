"""An adapter taken apart: its factors by path, the scaling multiplied into B, and put together."""

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
  """An adapter by path, its scaling multiplied into B."""

  weights: dict[str, LoraWeight]
  whole: dict[str, Any]
  targets: dict[str, Target]
  keys: dict[str, tuple[str, ...]]


def open_adapter(
  config: LoraConfig, trainable: PyTree, params: PyTree, factor: float = 1.0
) -> Opened:
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
  """Returns by path the factors of each adapter that has any, by its number.

  Where adapters have different layers of a stack, all get all of them.

  Raises:
    ValueError: if there are no adapters, two factor a weight along other axes, or one trains
      whole what another has factors of.
  """
  if not opened:
    raise ValueError("expected adapters, got none")
  factored = {path for adapter in opened for path in adapter.weights}
  if conflicting := sorted(factored & {path for adapter in opened for path in adapter.whole}):
    raise ValueError(
      f"{', '.join(conflicting)} is adapted by factors in one adapter and trained whole in "
      "another, of which there is no common form. Merge one of them first"
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
  """Returns the factors of all layers of a stack of this shape, zeros where it is not adapted."""
  if weight.layers is None:
    return weight
  count, layers = shape[weight.axes.batch[0]], jnp.asarray(weight.layers)
  a, b = (
    jnp.zeros((count, *x.shape[1:]), x.dtype).at[layers].set(x)
    for x in (weight.lora_a, weight.lora_b)
  )
  return LoraWeight(a, b, weight.axes)


def close_adapter(opened: Sequence[Opened], leaves: dict[str, Any]) -> Adapter:
  """Returns the adapter with new leaves at some of the paths, of scaling 1."""
  rules, whole = {}, []
  for path, leaf in leaves.items():
    if not isinstance(leaf, LoraWeight):
      whole.append(path)
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
  return exact_config(rules, whole), nest((keys[path], leaf) for path, leaf in leaves.items())
