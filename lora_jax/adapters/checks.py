"""Checks that a variant fits a weight, and that a trainable tree fits its params and config."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from lora_jax.adapters.copies import wide_dtype
from lora_jax.adapters.delta import (
  LORA_TABLE,
  LoraWeight,
  Site,
  Table,
  Variant,
  adapter_extra,
  adapter_weights,
  largest_shape,
  shared_arrays,
  shared_path,
)
from lora_jax.adapters.initializers import kaiming_uniform
from lora_jax.adapters.layers import stored_shape
from lora_jax.adapters.targets import Target
from lora_jax.axes import INNER, RANK, LoraAxes
from lora_jax.fields import read_value


def check_site(target: Target, axes: LoraAxes, variant: Variant) -> None:
  """Checks the settings of one weight once its axes are known.

  Raises:
    ValueError: if layers are chosen that the weight does not have, or the rank is too large.
  """
  _check_layers(target, axes)
  sides = axes.counts(stored_shape(target.leaf.shape, axes, target.stacked_layers))
  tables = [set(spec.words.split()) for spec in variant.table]
  has_rank = any("rank" in words and words & {"in", "out"} for words in tables)
  if has_rank and target.rank > min(sides):
    raise ValueError(
      f"{target.path}: rank {target.rank} is larger than the smaller dimension of the weight, "
      f"{sides[0]} inputs by {sides[1]} outputs (shape {target.leaf.shape}). Lower the rank, "
      "or give LoraRule(pattern, rank=...) for it"
    )


def _check_layers(target: Target, axes: LoraAxes) -> None:
  layers, shape = target.stacked_layers, target.leaf.shape
  if target.by_number and axes.batch:
    raise ValueError(
      f"{target.path}: layers= means the number in the path, but the weight is itself a stack "
      f"(axis {axes.batch[0]} of shape {shape}). Give stacked_layers= for the index on that "
      "axis, or select paths by `target` only"
    )
  if layers is None:
    return
  if not axes.batch:
    raise ValueError(
      f"{target.path}: stacked_layers={list(layers)} needs a stacked axis, and shape {shape} has "
      "none. Give layers= for numbers in paths, or narrow `target` to the stacked weights"
    )
  count = shape[axes.batch[0]]
  if max(layers) >= count:
    raise ValueError(f"{target.path}: stacked_layers={list(layers)}, but it stacks {count} layers")


def check_plain(path: str, weight: LoraWeight, operation: str) -> None:
  """Raises ValueError unless a weight is adapted by plain LoRA."""
  if not weight.is_plain:
    raise ValueError(
      f"{path} is adapted by {weight.table}, and {operation} is for plain LoRA: the sum of "
      "two such adapters is not another. Use lora_jax.convert first"
    )


def check_number(name: str, value: Any, kind: Any) -> None:
  """Raises ValueError unless a value is one number within the bounds of an annotation.

  Of a traced value only the shape is checked.
  """
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    if value.shape:
      raise ValueError(f"{name} must be one number, got an array of shape {value.shape}")
    if isinstance(value, Tracer):
      return
    value = value.item()
  read_value(kind, value, name)


def check_adapter(
  trainable: PyTree, targets: Mapping[str, Target], extra: Mapping[str, Any]
) -> None:
  """Checks a trainable tree against the weights it is for.

  Args:
    trainable: the tree to check.
    targets: the adapted weights, by path.
    extra: path to `(keys, leaf)` of the fully trained leaves.
  Raises:
    ValueError: listing every missing, unexpected and mis-shaped leaf, and every other dtype.
  """
  weights, leaves = adapter_weights(trainable), adapter_extra(trainable)
  problems = [f"missing: {path}" for path in targets if path not in weights]
  problems += [f"missing: {path}" for path in extra if path not in leaves]
  problems += [f"unexpected: {path}" for path in weights if path not in targets]
  problems += [f"unexpected: {path}" for path in leaves if path not in extra]
  for path, weight in weights.items():
    if path in targets:
      problems += _misshaped(path, weight, targets[path])
  problems += _shared_problems(trainable, weights, targets)
  for path, leaf in leaves.items():
    if path in extra and jnp.shape(leaf) != jnp.shape(extra[path][1]):
      expected = jnp.shape(extra[path][1])
      problems.append(f"mis-shaped: {path} is {jnp.shape(leaf)}, expected {expected}")
    if path in extra:
      problems += _mistyped(path, leaf, wide_dtype(extra[path][1].dtype))
  if problems:
    raise ValueError(
      "the trainable tree is not for these params and this config:\n  " + "\n  ".join(problems)
    )


def _shared_problems(
  trainable: PyTree, weights: Mapping[str, LoraWeight], targets: Mapping[str, Target]
) -> list[str]:
  """Returns the problems of the shared arrays."""
  nodes = shared_arrays(trainable)
  expected: dict[str, Table] = {}
  users: dict[str, list[tuple[LoraAxes, Sequence[int]]]] = {}
  for path, target in targets.items():
    table = None if target.variant is None else target.variant.shared_table
    if table is not None:
      name = shared_path(table.variant)
      expected[name] = table
      if path in weights:
        users.setdefault(name, []).append((weights[path].axes, target.leaf.shape))
  problems = [f"missing: {path}" for path in expected if path not in nodes]
  problems += [f"unexpected: {path}" for path in nodes if path not in expected]
  for path, node in nodes.items():
    if path not in users:
      continue
    if node.table != expected[path]:
      problems.append(f"other variant: {path} is {node.table}, the config's is {expected[path]}")
      continue
    ranks = [
      w.rank for w in weights.values() if shared_path(w.table.variant) == path and w.has_rank
    ]
    if node.has_rank and ranks and node.rank < max(ranks):
      problems.append(f"mis-shaped: {path} has rank {node.rank}, expected {max(ranks)}")
    problems += _array_problems(path, node, largest_shape(users[path]), {})
  return problems


def _misshaped(path: str, weight: LoraWeight, target: Target) -> list[str]:
  variant, shape = target.variant, tuple(target.leaf.shape)
  expected = LORA_TABLE if variant is None else variant.table
  if weight.table != expected:
    return [
      f"other variant: {path} is {weight.table}, the config's is {expected}. Give the config the "
      "adapter's variant, LoraConfig(variant=...)"
    ]
  axes = weight.axes
  if len(axes.batch) + len(axes.inputs) + len(axes.outputs) != len(shape):
    return [f"mis-shaped: {path} has {axes}, but the weight has shape {shape}"]
  adapted = stored_shape(shape, axes, weight.layers)
  if weight.weight_shape not in (None, adapted):
    return [
      f"mis-shaped: {path} is {adapted}, and its {expected.variant} adapter is for a weight of "
      f"shape {weight.weight_shape}. Give the base model that it was trained on"
    ]
  sizes = {} if variant is None else _inner_sizes(weight, target, variant)
  return _array_problems(path, weight, adapted, sizes)


def _inner_sizes(weight: LoraWeight, target: Target, variant: Variant) -> Mapping[str, int]:
  """Returns the sizes of a variant's inner axes on a weight, for the rank of its arrays."""
  shapes = [(weight.axes.labels(s.words), jnp.shape(weight.arrays[s.name])) for s in weight.table]
  ranks = [
    shape[labels.index(RANK)]
    for labels, shape in shapes
    if RANK in labels and len(shape) == len(labels)
  ]
  rank = ranks[0] if ranks else target.rank
  return variant.sizes(
    Site(target.path, target.leaf, weight.axes, rank, weight.layers, kaiming_uniform)
  )


def _array_problems(
  path: str, weight: LoraWeight, shape: Sequence[int], sizes: Mapping[str, int]
) -> list[str]:
  """Returns the problems of the arrays of a node.

  Args:
    path: of the node.
    weight: the node.
    shape: of its weight.
    sizes: of the inner axes that follow from the shape, by word.
  """
  float32 = jnp.dtype("float32")
  return [
    f"mis-shaped: {path}/{name} is {got}, expected {wanted}"
    for name, got, wanted in _shapes(weight, shape, sizes)
    if got != wanted
  ] + [
    problem
    for name, array in weight.arrays.items()
    for problem in _mistyped(f"{path}/{name}", array, float32)
  ]


def _mistyped(path: str, array: Any, expected: Any) -> list[str]:
  """Returns the problems of a trained array's dtype; narrower floats are none."""
  dtype, kind = jnp.result_type(array), jnp.floating
  if jnp.issubdtype(expected, jnp.complexfloating):
    kind = jnp.complexfloating
  if jnp.issubdtype(dtype, kind):
    return []
  return [f"other dtype: {path} is {dtype}, expected {expected}"]


def _shapes(
  weight: LoraWeight, shape: Sequence[int], known: Mapping[str, int]
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
  """Returns the name, the shape and the expected shape of each array.

  The expected size of an inner axis that is not known is that of the first array that has it.
  """
  sizes = dict(known)
  shapes = []
  for spec in weight.table:
    got, labels = tuple(weight.arrays[spec.name].shape), weight.axes.labels(spec.words)
    for word, inner in INNER.items():
      if inner in labels and len(got) == len(labels):
        sizes.setdefault(word, got[labels.index(inner)])
    wanted = weight.axes.array_shape(spec.words, shape, dict.fromkeys(INNER, -1) | sizes)
    shapes.append((spec.name, got, wanted))
  return shapes
