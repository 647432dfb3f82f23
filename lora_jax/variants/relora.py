"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695, sec. 3) and Chain of LoRA (Xia et al. 2024, arXiv
2401.04151, sec. 3): LoRA trained in cycles. A cycle ends by merging A B into W and starting again
with a new A and with B = 0, so that the change of W after n cycles is a sum:

    h = x W + scaling * (x A1 B1 + ... + x An Bn)

Nothing is merged here: the sum is a LoRA of rank n * rank, of which each cycle trains one block of
columns of A and rows of B. All blocks are in the adapter from the start, with their B = 0; finished
ones are not changed. Hence W is never written, and may be quantized, and the result is an ordinary
LoRA. The cost is that of the larger rank, except for the optimizer's state, which a block has only
while it is trained.

`relora_config` makes the config, and an optimizer chooses the block:

    relora_optimizer    at the start of a cycle most of the optimizer's moments are set to 0, those
                        of the smallest magnitudes; `relora_schedule` warms up again
    chain_of_lora_optimizer      the optimizer is initialized again

As a transformation of updates they work in any training loop, and a run can be resumed from their
state at any step. To merge instead, as a pretraining of many cycles would: `params =
adaptation.merge(params, trainable)`, then `init` with another key.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, PyTree

from lora_jax.adapters.config import LoraConfig, check_config
from lora_jax.adapters.delta import LoraWeight, is_lora_weight
from lora_jax.axes import RANK
from lora_jax.fields import Count, CountOrZero, Within, read_value
from lora_jax.trees import key_parts
from lora_jax.variants.lora import LORA

KeptShare = Annotated[float, Within("[0, 1]")]
Restart = Callable[[PyTree, PyTree], PyTree]


def relora_config(config: LoraConfig, num_cycles: int) -> LoraConfig:
  """Returns a config with `num_cycles` times the rank, and the same scaling.

  >>> config = relora_config(LoraConfig(rank=4, alpha=8.0, target="kernel"), num_cycles=3)
  >>> config.rank, config.alpha
  (12, 24.0)

  Args:
    config: of one cycle, of plain LoRA. It has no dropout: a finished pair counts as part of W,
      whose input is not dropped.
    num_cycles: the number of cycles.
  Raises:
    ValueError: if `num_cycles` is not a positive integer, there is dropout, or a variant.
  """
  check_config(config)
  read_value(Count, num_cycles, "num_cycles")
  if any([config.dropout, *(rule.dropout for rule in config.rules)]):
    raise ValueError(
      "ReLoRA and Chain of LoRA merge finished pairs into the weight, whose input has no dropout. "
      "Give LoraConfig and its rules dropout=0.0"
    )

  for chosen in (config.variant, *(rule.variant for rule in config.rules)):
    if chosen not in (None, LORA):
      raise ValueError(
        f"ReLoRA and Chain of LoRA train cycles of plain LoRA, and the config has {chosen.name}. "
        "Leave it out"
      )

  def times(value: Any) -> Any:
    return None if value is None else value * num_cycles

  rules = [
    dataclasses.replace(rule, rank=times(rule.rank), alpha=times(rule.alpha))
    for rule in config.rules
  ]
  return dataclasses.replace(
    config, rank=times(config.rank), alpha=times(config.alpha), rules=rules
  )


class CyclesState(NamedTuple):
  """The state of `relora_optimizer` and `chain_of_lora_optimizer`.

  Attributes:
    step: number of updates made so far.
    inner: the inner optimizer's state, of the block that is trained.
  """

  step: Int[Array, ""]
  inner: Any


def relora_optimizer(
  optimizer: optax.GradientTransformation,
  *,
  num_cycles: int,
  cycle_steps: int,
  kept_share: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it trains by ReLoRA.

  The learning rate's schedule of the inner optimizer continues over all cycles: see
  `relora_schedule`.

  >>> optimizer = relora_optimizer(optax.adamw(1e-3), num_cycles=4, cycle_steps=500)

  Args:
    optimizer: any optax transformation. It sees the trained block of A and B, and all of the
      fully trained leaves.
    num_cycles: as in `relora_config`.
    cycle_steps: number of updates of a cycle; further updates continue the last one.
    kept_share: of the optimizer's moments of A and B, of each matrix, the share that a new cycle
      keeps: those of the largest magnitudes (sec. 3; the paper prunes 90 to 99 %). 0 keeps none.
  Raises:
    ValueError: if a setting is out of bounds; when it is applied, if a weight is not one of plain
      LoRA with a multiple of `num_cycles` as rank.
  """
  share = read_value(KeptShare, kept_share, "kept_share")

  def restart(inner: PyTree, active: PyTree) -> PyTree:
    return _pruned(inner, active, share)

  return _in_cycles(optimizer, num_cycles, cycle_steps, restart)


def chain_of_lora_optimizer(
  optimizer: optax.GradientTransformation, *, num_cycles: int, cycle_steps: int
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it trains by Chain of LoRA: each cycle initializes it again.

  So does the step of its learning rate's schedule, which is that of one cycle. Arguments and errors
  are those of `relora_optimizer`.
  """

  def restart(inner: PyTree, active: PyTree) -> PyTree:
    del inner
    return optimizer.init(active)

  return _in_cycles(optimizer, num_cycles, cycle_steps, restart)


def relora_schedule(
  schedule: optax.Schedule, *, cycle_steps: int, warmup_steps: int
) -> optax.Schedule:
  """Returns a schedule with a warmup at the start of each cycle but the first (sec. 3).

  >>> schedule = relora_schedule(lambda step: 1.0, cycle_steps=4, warmup_steps=2)
  >>> [float(schedule(step)) for step in range(8)]
  [1.0, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0]

  Args:
    schedule: of the learning rate, over all cycles, with its own first warmup.
    cycle_steps: as in `relora_optimizer`.
    warmup_steps: number of updates in which the learning rate rises from 0 to the schedule's.
  Raises:
    ValueError: if one is not such a number, or the warmup is not shorter than a cycle.
  """
  read_value(Count, cycle_steps, "cycle_steps")
  read_value(CountOrZero, warmup_steps, "warmup_steps")
  if warmup_steps >= cycle_steps:
    raise ValueError(
      f"warmup_steps={warmup_steps} is not shorter than a cycle, cycle_steps={cycle_steps}: the "
      "learning rate would never reach the schedule's. Lower it"
    )

  def warmed(step: Any) -> Any:
    risen = jnp.minimum(1.0, (step % cycle_steps) / max(warmup_steps, 1)) if warmup_steps else 1.0
    return jnp.where(step < cycle_steps, 1.0, risen) * schedule(step)

  return warmed


def _in_cycles(
  optimizer: optax.GradientTransformation, num_cycles: int, cycle_steps: int, restart: Restart
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that each cycle trains one block of A and B.

  Args:
    optimizer: any optax transformation.
    num_cycles, cycle_steps: as in `relora_optimizer`.
    restart: from the inner optimizer's state and the block's initial arrays to the state at the
      start of a cycle.
  """
  read_value(Count, num_cycles, "num_cycles")
  read_value(Count, cycle_steps, "cycle_steps")
  inner = optax.with_extra_args_support(optimizer)

  def init(params: PyTree) -> CyclesState:
    return CyclesState(jnp.zeros((), jnp.int32), inner.init(_block(params, 0, num_cycles)))

  def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any):
    if params is None:
      raise ValueError("training in cycles needs params: optimizer.update(grads, state, params)")
    cycle = jnp.minimum(state.step // cycle_steps, num_cycles - 1)
    active = _block(params, cycle, num_cycles)
    starts = (state.step > 0) & (state.step == cycle * cycle_steps)
    inner_state = lax.cond(starts, restart, lambda inner, active: inner, state.inner, active)
    updates, inner_state = inner.update(
      _block(updates, cycle, num_cycles), inner_state, active, **extra
    )
    whole = jax.tree.map(
      lambda block, node: _placed(block, node, cycle), updates, params, is_leaf=is_lora_weight
    )
    return whole, CyclesState(state.step + 1, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _block(tree: PyTree, cycle: Any, num_cycles: int) -> PyTree:
  """Returns the tree with one cycle's columns of A and rows of B; other leaves are unchanged."""

  def block(node: Any) -> Any:
    if not is_lora_weight(node):
      return node
    if not node.is_plain or node.rank % num_cycles:
      raise ValueError(
        f"training in {num_cycles} cycles is for plain LoRA with a multiple of {num_cycles} as "
        f"rank, got {node.table} of rank {node.rank}. Use lora_jax.relora_config(config, "
        f"num_cycles={num_cycles}), without a variant"
      )
    size = node.rank // num_cycles
    arrays = {
      name: lax.dynamic_slice_in_dim(node.arrays[name], cycle * size, size, axis)
      for name, axis in _rank_axes(node).items()
    }
    return node.replace(**arrays)

  return jax.tree.map(block, tree, is_leaf=is_lora_weight)


def _placed(block: Any, node: Any, cycle: Any) -> Any:
  """Returns a block's updates in the shape of the whole node, 0 elsewhere."""
  if not is_lora_weight(node):
    return block
  arrays = {
    name: lax.dynamic_update_slice_in_dim(
      jnp.zeros(node.arrays[name].shape, block.arrays[name].dtype),
      block.arrays[name],
      cycle * block.rank,
      axis,
    )
    for name, axis in _rank_axes(node).items()
  }
  return node.replace(**arrays)


def _rank_axes(node: LoraWeight) -> dict[str, int]:
  return {spec.name: node.axes.labels(spec.words).index(RANK) for spec in node.table}


def _pruned(state: PyTree, active: PyTree, share: float) -> PyTree:
  """Returns an optimizer's state with its moments of A and B pruned by magnitude.

  The leaves are those whose path ends with that of an array of the block, with its shape.
  """
  arrays = {}
  leaves, _ = jax.tree_util.tree_flatten_with_path(active, is_leaf=is_lora_weight)
  for keys, node in leaves:
    if is_lora_weight(node):
      for name, array in node.arrays.items():
        arrays[*key_parts(keys), name] = array.shape, len(node.axes.batch)

  def pruned(keys: Any, leaf: Any) -> Any:
    parts = key_parts(keys)
    for start in range(len(parts)):
      shape, num_batch_axes = arrays.get(parts[start:], (None, 0))
      if shape is not None and shape == jnp.shape(leaf):
        return _largest(leaf, range(num_batch_axes, leaf.ndim), share)
    return leaf

  return jax.tree_util.tree_map_with_path(pruned, state)


def _largest(moments: jax.Array, axes: range, share: float) -> jax.Array:
  """Returns the moments with all but a share of the entries, the largest, set to 0."""
  magnitudes = jnp.abs(moments)
  bound = jnp.quantile(magnitudes, 1 - share, axis=tuple(axes), keepdims=True)
  keeps = magnitudes >= bound if share == 1 else magnitudes > bound
  return jnp.where(keeps, moments, 0)
