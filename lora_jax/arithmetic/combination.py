"""Sums of adapters of one base model, and adapters padded to one shape.

An adapter is a pair `(config, trainable)`. Its weights' deltas are `scaling * A B`, so that

    sum of w_i * scaling_i * A_i B_i  =  [A_1 A_2 ...] [w_1 scaling_1 B_1; w_2 scaling_2 B_2; ...]

with the As concatenated along the last axis and the Bs along the first: exact, with rank
r_1 + r_2 + ... and scaling 1. (A_1 + A_2)(B_1 + B_2) would not be their sum: it contains A_1 B_2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.adapters.checks import check_number
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.copies import wide_dtype
from lora_jax.adapters.delta import LoraWeight
from lora_jax.arithmetic.opened import (
  Adapter,
  by_path,
  check_adapters,
  close_adapter,
  open_adapter,
)
from lora_jax.fields import Finite
from lora_jax.trees import leaves_with_path


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float], params: PyTree) -> Adapter:
  """Returns the weighted sum of adapters' deltas as one adapter; exact.

  The ranks add up; `truncate_rank` reduces them. A fully trained leaf is copied unchanged.

  >>> import jax, jax.numpy as jnp, lora_jax
  >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((8, 6))}
  >>> config = lora_jax.LoraConfig(rank=2, alpha=4.0, target="kernel")
  >>> one = lora_jax.lora(fn, config).init(jax.random.key(0), params, jnp.ones((1, 8)))
  >>> both, trainable = weighted_sum([(config, one), (config, one)], [0.5, -1.0], params)
  >>> both.rank, trainable["kernel"].lora_b.shape
  (4, (4, 6))

  Args:
    adapters: `(config, trainable)` of each; ranks, alphas and targets may differ.
    weights: one for each; any finite numbers.
    params: of the base model, or their shapes.

  Returns:
    The sum's config, for `lora_jax.lora`, and its trainable tree.
  Raises:
    ValueError: if an adapter is not for these params, a weight is factored along other axes in
      two of them, or two have fully trained one leaf to different values.
  """
  check_adapters(adapters)
  if isinstance(weights, str | Mapping) or len(weights) != len(adapters):
    raise ValueError(f"expected one weight for each of {len(adapters)} adapters, got {weights!r}")
  for i, weight in enumerate(weights):
    check_number(f"weights[{i}]", weight, Finite)
  opened = [
    open_adapter(*adapter, params, factor)
    for adapter, factor in zip(adapters, weights, strict=True)
  ]
  leaves: dict[str, Any] = {}
  for path, parts_by_number in by_path(opened).items():
    parts = list(parts_by_number.values())
    a = jnp.concatenate([part.lora_a for part in parts], axis=-1)
    b = jnp.concatenate([part.lora_b for part in parts], axis=len(parts[0].axes.batch))
    leaves[path] = parts[0].replace(lora_a=a, lora_b=b)
  for path, leaf in ((path, leaf) for adapter in opened for path, leaf in adapter.extra.items()):
    if not jnp.array_equal(leaves.setdefault(path, leaf), leaf):
      raise ValueError(
        f"{path} is fully trained in several of the adapters, to different values, which have no "
        "sum. Leave it out of all but one"
      )
  return close_adapter(opened, leaves)


def align(adapters: Sequence[Adapter], params: PyTree) -> tuple[LoraConfig, list[PyTree]]:
  """Pads adapters to one config and one shape, so that one compiled function serves them all.

  Exact: smaller ranks, and the weights and layers that an adapter does not adapt, are padded with
  zeros; B is multiplied by the scaling; and an adapter that has not trained a leaf which others
  have fully trained gets the base model's.

      config, (first, second) = lora_jax.align([(config_1, one), (config_2, other)], params)
      apply = jax.jit(lora_jax.lora(fn, config).apply)
      apply(params, first, x), apply(params, second, x)  # compiled once

  Args:
    adapters: `(config, trainable)` of each.
    params: of the base model; shapes suffice if every fully trained leaf is in all adapters.

  Returns:
    The common config, and the trainable trees in the order of `adapters`.
  Raises:
    ValueError: if an adapter is not for these params, or a weight is factored along other axes
      in two of them.
  """
  check_adapters(adapters)
  opened = [open_adapter(*adapter, params) for adapter in adapters]
  base_leaves = dict(leaves_with_path(params))
  leaves: list[dict[str, Any]] = [{} for _ in opened]
  for path, parts_by_number in by_path(opened).items():
    rank = max(part.rank for part in parts_by_number.values())
    zeros = jax.tree.map(jnp.zeros_like, next(iter(parts_by_number.values())))
    for i, tree in enumerate(leaves):
      tree[path] = pad_weight(parts_by_number.get(i) or zeros, rank)
  for path in dict.fromkeys(path for adapter in opened for path in adapter.extra):
    leaf = base_leaves[path]
    for adapter, tree in zip(opened, leaves, strict=True):
      if path not in adapter.extra and isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
          f"{path} is fully trained in some of the adapters; give the base model's params"
        )
      tree[path] = jnp.asarray(adapter.extra.get(path, leaf), wide_dtype(leaf.dtype))
  closed = [close_adapter(opened, tree) for tree in leaves]
  return closed[0][0], [trainable for _, trainable in closed]


def pad_weight(weight: LoraWeight, rank: int) -> LoraWeight:
  """Returns the same delta, padded with zeros to a rank."""
  added, rank_axis = rank - weight.rank, len(weight.axes.batch)
  widths = [(0, 0)] * (weight.lora_b.ndim - 1)
  a = jnp.pad(weight.lora_a, [(0, 0)] * (weight.lora_a.ndim - 1) + [(0, added)])
  b = jnp.pad(weight.lora_b, [*widths[:rank_axis], (0, added), *widths[rank_axis:]])
  return weight.replace(lora_a=a, lora_b=b)
