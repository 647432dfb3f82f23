"""Rows of one batch that use different adapters of a bank.

    bank = lora_jax.bank([(config_1, one), (config_2, other)], params)
    apply = lora_jax.by_row(lora_jax.lora(fn, bank.config).apply)   # fn is of one row
    apply(params, bank.trainable, slots, tokens)                    # row i uses slot slots[i]

The adapters of the rows are gathered once, and `apply` is mapped over rows. The base model is not
mapped, so that each of its matmuls remains one matmul over all rows; a low-rank term is a batched
matmul of each row with its own A and B. The gradient of a bank is the sum over the rows of each
slot, and zero for a slot without rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, PyTree

from lora_jax.adapters.delta import LoraWeight, is_lora_weight
from lora_jax.fields import CountOrZero, read_value


def by_row(apply: Callable[..., Any]) -> Callable[..., Any]:
  """Maps `Adaptation.apply` over rows that each use the adapter of their own slot.

  >>> import jax, jax.numpy as jnp, lora_jax
  >>> fn, params = lambda p, row: row @ p["kernel"], {"kernel": jnp.ones((8, 6))}
  >>> config = lora_jax.LoraConfig(rank=2, alpha=4.0, target="kernel")
  >>> adapted = lora_jax.lora(fn, config)
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones(8))
  >>> bank = lora_jax.bank([(config, trainable)], params, slots=3)
  >>> apply = by_row(lora_jax.lora(fn, bank.config).apply)
  >>> apply(params, bank.trainable, jnp.array([2, 0]), jnp.ones((2, 8))).shape
  (2, 6)

  Args:
    apply: of a function of one row, without the axis of rows: `lambda params, tokens:
      model(params, tokens[None])[0]`.

  Returns:
    `apply(params, trainable, slots, *args, **kwargs)`, with `trainable` of a `Bank`, and slots
    (rows,) of integers. Every array of the further arguments, `lora_key` included, has a leading
    axis of rows, and so have the outputs.
  """

  def apply_rows(params: PyTree, trainable: PyTree, slots: Any, *args: Any, **kwargs: Any) -> Any:
    slots = check_slots(slots, _num_slots(trainable))
    for leaf in jax.tree.leaves((args, kwargs)):
      if np.shape(leaf)[:1] != slots.shape:
        raise ValueError(
          f"expected a leading axis of {slots.size} rows, one for each of the slots, on every "
          f"array argument, got one of shape {np.shape(leaf)}"
        )

    def apply_row(adapter: PyTree, args: Any, kwargs: Any) -> Any:
      return apply(params, adapter, *args, **kwargs)

    adapters = take_adapters(trainable, slots)
    return map_adapters(apply_row, (row_axes(adapters), 0, 0))(adapters, args, kwargs)

  return apply_rows


def map_adapters(fn: Callable[..., Any], in_axes: Any, out_axes: Any = 0) -> Callable[..., Any]:
  """Returns `jax.vmap(fn, in_axes, out_axes)`, over adapters of one base model.

  Raises:
    ValueError: if JAX cannot map an operation of the model.
  """

  def mapped(*args: Any) -> Any:
    try:
      return jax.vmap(fn, in_axes, out_axes)(*args)
    except NotImplementedError as error:
      raise ValueError(
        f"JAX cannot map this model over several adapters ({error}). A mixture of experts has "
        "ragged_dot, which needs one adapter for all rows: use one adapter at a time"
      ) from error

  return mapped


def check_slots(slots: Any, num_slots: int) -> Int[Array, " rows"]:
  """Returns slots as an array.

  Raises:
    ValueError: if they are not a sequence of integers, or one is not in the bank. The values of a
      traced array are not known: one outside the bank yields NaN.
  """
  if isinstance(slots, Tracer | jax.Array | np.ndarray):
    if slots.ndim != 1 or not jnp.issubdtype(slots.dtype, jnp.integer):
      raise ValueError(f"slots must be integers (rows,), got {slots.dtype} {slots.shape}")
    if isinstance(slots, Tracer):
      return slots
    slots = np.asarray(slots).tolist()
  if isinstance(slots, str) or not isinstance(slots, Sequence):
    raise ValueError(f"slots must be a sequence of integers, one for each row, got {slots!r:.100}")
  for row, slot in enumerate(slots):
    read_value(CountOrZero, slot, f"slots[{row}]")
    if slot >= num_slots:
      raise ValueError(
        f"slots[{row}] is {slot}, which is not in the bank: it has slots 0 to {num_slots - 1}"
      )
  return jnp.asarray(slots, jnp.int32)


def take_adapters(trainable: PyTree, slots: Int[Array, " rows"]) -> PyTree:
  """Returns the adapters of rows, with an axis of rows as `row_axes` says.

  In factors it comes after the batch axes: `scan` over layers takes slices along the first axis,
  and would transpose the factors in each step of decoding.

  Args:
    trainable: of a `Bank`, with a leading axis of slots on each leaf.
    slots: of each row.
  """

  num_slots = _num_slots(trainable)
  slots = slots.astype(jnp.int32)
  slots = jnp.where(slots < 0, num_slots, slots)  # `take` counts negative ones from the end

  def take(leaf: Array, axis: int) -> Array:
    return jnp.moveaxis(jnp.take(leaf, slots, axis=0, mode="fill"), 0, axis)

  return jax.tree.map(take, trainable, row_axes(trainable))


def row_axes(trainable: PyTree) -> PyTree:
  """Returns the axis of rows in each leaf of the adapters of rows."""

  def axes(node: Any) -> Any:
    if isinstance(node, LoraWeight):
      return jax.tree.map(lambda _: len(node.axes.batch), node)
    return 0

  return jax.tree.map(axes, trainable, is_leaf=is_lora_weight)


def _num_slots(trainable: PyTree) -> int:
  return jax.tree.leaves(trainable)[0].shape[0]
