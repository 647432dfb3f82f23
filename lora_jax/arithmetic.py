"""Adapters of one base, added, cut to a rank, and brought to one shape.

An adapter is a pair `(config, trainable)`. Its weights' deltas are `scaling * A B`, so that

    sum of w_i * scaling_i * A_i B_i  =  [A_1 A_2 ...] [w_1 scaling_1 B_1; w_2 scaling_2 B_2; ...]

with As side by side and Bs one below another: exact, of rank r_1 + r_2 + ..., and of scaling 1.
Adding As to As and Bs to Bs would be another thing: (A_1 + A_2)(B_1 + B_2) has A_1 B_2 in it.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.adapter import (
  LoraWeight,
  adapter_extra,
  adapter_weights,
  check_adapter,
  weight_factors,
)
from lora_jax.config import LoraConfig, LoraRule, Target, exact_config, find_leaves
from lora_jax.trees import leaves_with_path, nest

PyTree = Any
Adapter = tuple[LoraConfig, PyTree]


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float], params: PyTree) -> Adapter:
  """Returns the adapter whose deltas are the weighted sums of others' deltas; exact.

  The ranks add up; `truncate_rank` brings them down again. A leaf that is trained whole goes
  over as it is.

  >>> import jax, jax.numpy as jnp, lora_jax
  >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((8, 6))}
  >>> config = lora_jax.LoraConfig(rank=2, alpha=4.0, target="kernel")
  >>> one = lora_jax.lora(fn, config).init(jax.random.key(0), params, jnp.ones((1, 8)))
  >>> both, trainable = weighted_sum([(config, one), (config, one)], [0.5, -1.0], params)
  >>> both.rank, trainable["kernel"].lora_b.shape
  (4, (4, 6))

  Args:
    adapters: `(config, trainable)` of each; ranks, alphas and targets may differ.
    weights: one for each; any numbers.
    params: of the base, or their shapes.

  Returns:
    The config that `lora_jax.lora` applies the sum by, and its trainable tree.
  Raises:
    ValueError: if an adapter is not for these params, a weight is factored along other axes in
      two of them, or two have trained one leaf whole, to different values.
  """
  if len(adapters) != len(weights):
    raise ValueError(f"expected one weight for each adapter, got {len(weights)}, {len(adapters)}")
  opened = [_open(*one, params, by) for one, by in zip(adapters, weights, strict=True)]
  new: dict[str, Any] = {}
  for path, having in _by_path(opened).items():
    parts = list(having.values())
    a = jnp.concatenate([part.lora_a for part in parts], axis=-1)
    b = jnp.concatenate([part.lora_b for part in parts], axis=len(parts[0].axes.batch))
    new[path] = dataclasses.replace(parts[0], lora_a=a, lora_b=b)
  for path, leaf in ((path, leaf) for one in opened for path, leaf in one.whole.items()):
    if not jnp.array_equal(new.setdefault(path, leaf), leaf):
      raise ValueError(
        f"{path} is trained whole in several of the adapters, to different values, of which there "
        "is no sum. Leave it out of all but one"
      )
  return _closed(opened, new)


def truncate_rank(
  config: LoraConfig, trainable: PyTree, params: PyTree, rank: int
) -> tuple[LoraConfig, PyTree, dict[str, Float[Array, ""]]]:
  """Returns the nearest adapter of a smaller rank, by truncated singular value decompositions.

  With A = Q_a R_a and B^T = Q_b R_b, the singular values of A B are those of R_a R_b^T, a matrix
  of rank x rank: no array of a weight's size is formed. Layers of a stack and experts are cut
  one by one. A weight whose rank is not above `rank` keeps its delta.

  Args:
    config: of the adapter.
    trainable: its tree.
    params: of the base, or their shapes.
    rank: of the result, at most.

  Returns:
    The config, the trainable tree, and by path the relative error of the delta in the
    Frobenius norm, |new - old| / |old|, over all layers of a stack.
  Raises:
    ValueError: if the adapter is not for these params, or the rank is no positive integer.
  """
  if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
    raise ValueError(f"rank must be a positive integer, got {rank!r}")
  opened = _open(config, trainable, params)
  with jax.default_matmul_precision("float32"):
    cut = {path: _truncated(weight, rank) for path, weight in opened.weights.items()}
  weights = {path: weight for path, (weight, _) in cut.items()}
  errors = {path: error for path, (_, error) in cut.items()}
  return *_closed([opened], weights | opened.whole), errors


def align(adapters: Sequence[Adapter], params: PyTree) -> tuple[LoraConfig, list[PyTree]]:
  """Brings adapters to one config and one shape, so that one compiled function serves them all.

  Exact: smaller ranks, and weights and layers that an adapter leaves alone, are filled up with
  zeros; the scaling goes into B; and a leaf that only others have trained whole is the base's own.

      config, (first, second) = lora_jax.align([(config_1, one), (config_2, other)], params)
      apply = jax.jit(lora_jax.lora(fn, config).apply)
      apply(params, first, x), apply(params, second, x)  # compiled once

  Args:
    adapters: `(config, trainable)` of each.
    params: of the base; their shapes do if no leaves are trained whole, or the same in all.

  Returns:
    The config of all, and the trainable trees in the order of `adapters`.
  Raises:
    ValueError: if an adapter is not for these params, or a weight is factored along other axes
      in two of them.
  """
  opened = [_open(*one, params) for one in adapters]
  own = dict(leaves_with_path(params))
  new: list[dict[str, Any]] = [{} for _ in opened]
  for path, having in _by_path(opened).items():
    rank = max(part.rank for part in having.values())
    zeros = jax.tree.map(jnp.zeros_like, next(iter(having.values())))
    for i, tree in enumerate(new):
      tree[path] = _padded(having.get(i) or zeros, rank)
  for path in dict.fromkeys(path for one in opened for path in one.whole):
    for one, tree in zip(opened, new, strict=True):
      tree[path] = one.whole.get(path, own[path])
      if isinstance(tree[path], jax.ShapeDtypeStruct):
        raise ValueError(f"{path} is trained whole in some of the adapters; give the base's params")
  closed = [_closed(opened, tree) for tree in new]
  return closed[0][0], [trainable for _, trainable in closed]


class _Opened(NamedTuple):
  """An adapter by path, its scaling multiplied into B."""

  weights: dict[str, LoraWeight]
  whole: dict[str, Any]
  targets: dict[str, Target]
  keys: dict[str, tuple[str, ...]]


def _open(config: LoraConfig, trainable: PyTree, params: PyTree, by: float = 1.0) -> _Opened:
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  weights = {}
  for path, weight in adapter_weights(trainable).items():
    a, b = (jnp.asarray(factor, jnp.float32) for factor in (weight.lora_a, weight.lora_b))
    b = b * jnp.float32(by * targets[path].scaling)
    weights[path] = dataclasses.replace(weight, lora_a=a, lora_b=b)
  keys = {path: target.keys for path, target in targets.items()}
  keys |= {path: parts for path, (parts, _) in extra.items()}
  return _Opened(weights, adapter_extra(trainable), targets, keys)


def _by_path(opened: Sequence[_Opened]) -> dict[str, dict[int, LoraWeight]]:
  """Returns by path the factors of each adapter that has any, by its number.

  Where adapters have different layers of a stack, all get all of them.

  Raises:
    ValueError: if there are no adapters, two factor a weight along other axes, or one trains
      whole what another has factors of.
  """
  if not opened:
    raise ValueError("expected adapters, got none")
  factored = {path for one in opened for path in one.weights}
  if both := sorted(factored & {path for one in opened for path in one.whole}):
    raise ValueError(
      f"{', '.join(both)} is adapted by factors in one adapter and trained whole in another, of "
      "which there is no common form. Merge one of them first"
    )
  found: dict[str, dict[int, LoraWeight]] = {}
  for i, one in enumerate(opened):
    for path, weight in one.weights.items():
      found.setdefault(path, {})[i] = weight
  for path, parts in found.items():
    axes = {part.axes for part in parts.values()}
    if len(axes) > 1:
      raise ValueError(
        f"{path} is factored along {' and along '.join(map(str, sorted(axes)))}; expected the "
        "same axes in all adapters. Train with LoraRule(pattern, axes=LoraAxes(...))"
      )
    if len({part.layers for part in parts.values()}) > 1:
      for i, part in parts.items():
        a, b = weight_factors(part, opened[i].targets[path].leaf.shape)
        parts[i] = LoraWeight(a.array, b.array, part.axes)
  return found


def _closed(opened: Sequence[_Opened], new: dict[str, Any]) -> Adapter:
  """Returns the adapter with new leaves at some of the paths, of scaling 1."""
  rules, whole = {}, []
  for path, leaf in new.items():
    if not isinstance(leaf, LoraWeight):
      whole.append(path)
      continue
    how = {one.targets[path].on_unhandled for one in opened if path in one.targets}
    rules[path] = LoraRule(
      re.escape(path),
      rank=leaf.rank,
      alpha=float(leaf.rank),
      stacked_layers=leaf.layers,
      on_unhandled="materialize" if "materialize" in how else "raise",
    )
  keys = {path: parts for one in opened for path, parts in one.keys.items()}
  return exact_config(rules, whole), nest((keys[path], leaf) for path, leaf in new.items())


def _padded(weight: LoraWeight, rank: int) -> LoraWeight:
  """Returns the same delta, with zeros up to a rank."""
  more, at = rank - weight.rank, len(weight.axes.batch)
  widths = [(0, 0)] * (weight.lora_b.ndim - 1)
  a = jnp.pad(weight.lora_a, [(0, 0)] * (weight.lora_a.ndim - 1) + [(0, more)])
  b = jnp.pad(weight.lora_b, [*widths[:at], (0, more), *widths[at:]])
  return dataclasses.replace(weight, lora_a=a, lora_b=b)


def _truncated(weight: LoraWeight, rank: int) -> tuple[LoraWeight, Float[Array, ""]]:
  """Returns the best approximation of a rank, and its relative error."""
  a, b, own = weight.lora_a, weight.lora_b, weight.rank
  if own <= rank:
    return weight, jnp.zeros(())
  batch = a.shape[: len(weight.axes.batch)]
  q_a, r_a = jnp.linalg.qr(a.reshape(*batch, -1, own))
  q_b, r_b = jnp.linalg.qr(b.reshape(*batch, own, -1).mT)
  u, values, v = jnp.linalg.svd(r_a @ r_b.mT, full_matrices=False)
  rank = min(rank, values.shape[-1])
  half = jnp.sqrt(values[..., :rank])
  new_a = q_a @ (u[..., :rank] * half[..., None, :])
  new_b = (half[..., None] * v[..., :rank, :]) @ q_b.mT
  lost, all_of_it = jnp.linalg.norm(values[..., rank:]), jnp.linalg.norm(values)
  error = jnp.where(all_of_it > 0, lost / jnp.maximum(all_of_it, jnp.finfo(a.dtype).tiny), 0.0)
  a, b = new_a.reshape(*a.shape[:-1], rank), new_b.reshape(*batch, rank, *b.shape[len(batch) + 1 :])
  return dataclasses.replace(weight, lora_a=a, lora_b=b), error
