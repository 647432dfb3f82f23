"""An optimizer with state for the trainable leaves only."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from lora_jax.placement import place
from lora_jax.trees import key_parts, leaves_with_path


def freeze(
  optimizer: optax.GradientTransformation, mask: PyTree, shardings: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
  """Restricts `optimizer` to the leaves where `mask` is True.

  - Its state has only these leaves.
  - Gradients of frozen leaves may be None, as `jax.grad` over the trainable part of
    `partition` gives them; any others are ignored. (`optax.masked` passes them through: a raw
    gradient would become the update of a frozen weight.)
  - Clipping by the global norm and weight decay see the trainable leaves only.
  - The update of a frozen leaf is None where its gradient was None, else zero.

  >>> import jax.numpy as jnp, optax
  >>> tree = {"base": jnp.ones(3), "adapter": jnp.ones(2)}
  >>> mask = {"base": False, "adapter": True}
  >>> optimizer = freeze(optax.adam(1e-3), mask)
  >>> [leaf.shape for leaf in jax.tree.leaves(optimizer.init(tree))]  # count, mu, nu
  [(), (2,), (2,)]

  Args:
    optimizer: any optax transformation.
    mask: a tree of bools with the structure of the whole tree, as `trainable_mask` returns it.
    shardings: a tree like the whole or the trainable one, of the `NamedSharding`s that
      gradients, optimizer state and updates are constrained to (`lora_jax.shardings`); None
      leaves them to the compiler.
  Raises:
    ValueError: if `optimizer` lacks `init` or `update`, or `mask` is not a tree of bools with a
      True.
  """
  if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
    raise ValueError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r:.100}")
  inner = optax.with_extra_args_support(optimizer)
  keep = jax.tree.leaves(mask)
  structure = jax.tree.structure(mask)
  for path, leaf in leaves_with_path(mask):
    if not isinstance(leaf, bool | np.bool_):
      raise ValueError(f"mask must be a tree of bools, got {leaf!r:.100} at {path!r}")
  if not any(keep):
    raise ValueError("mask has no True leaf, so that nothing would be trained")

  def trainable_part(tree: PyTree) -> PyTree:
    """Replaces frozen leaves, which may be None already, by None."""
    return jax.tree.unflatten(
      structure,
      [
        leaf if is_trainable else None for leaf, is_trainable in zip(_full(tree), keep, strict=True)
      ],
    )

  def _full(tree: PyTree) -> list[Any]:
    """Returns the leaves in the mask's order, None included."""
    try:
      return structure.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
      raise ValueError(f"expected a tree with the structure of the mask: {error}") from error

  def init(params: PyTree) -> optax.OptState:
    part = trainable_part(params)
    return _constrain_state(inner.init(part), part, specs)

  def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any):
    grads = _constrain(trainable_part(updates), specs)
    part = None if params is None else trainable_part(params)
    inner_updates, state = inner.update(grads, state, part, **extra)
    leaves = zip(_full(_constrain(inner_updates, specs)), _full(updates), keep, strict=True)
    filled = [
      update if is_trainable else None if grad is None else jnp.zeros_like(grad)
      for update, grad, is_trainable in leaves
    ]
    return jax.tree.unflatten(structure, filled), _constrain_state(state, grads, specs)

  specs = None if shardings is None else trainable_part(shardings)

  return optax.GradientTransformationExtraArgs(init, update)


def _constrain(tree: PyTree, specs: PyTree | None) -> PyTree:
  return tree if specs is None else jax.tree.map(place, tree, specs)


def _constrain_state(state: PyTree, trainable: PyTree, specs: PyTree | None) -> PyTree:
  """Constrains the leaves of an optimizer's state that correspond to a trainable leaf.

  Their paths end with its path, after the optimizer's field names, and they have its shape.
  """
  if specs is None:
    return state
  leaves, structure = jax.tree_util.tree_flatten_with_path(trainable)
  trainable_leaves = {
    key_parts(keys): (leaf.shape, sharding)
    for (keys, leaf), sharding in zip(leaves, structure.flatten_up_to(specs), strict=True)
  }

  def constrained(keys: Any, leaf: Any) -> Any:
    parts = key_parts(keys)
    for start in range(len(parts)):
      shape, sharding = trainable_leaves.get(parts[start:], (None, None))
      if shape is not None and shape == jnp.shape(leaf):
        return place(leaf, sharding)
    return leaf

  return jax.tree_util.tree_map_with_path(constrained, state)
