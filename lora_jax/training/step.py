"""The train step: gradients, optimizer state and updates for the trainable leaves only.

The combined tree `{"base": params, "adapter": trainable}` is partitioned into a trainable part and
a frozen part. The state holds the first and is donated; the second is an argument of every step.
`trainable_tree` returns the tree that the method's `apply` takes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.shardings import shardings
from lora_jax.optimizer import freeze
from lora_jax.placement import place
from lora_jax.training.loss import LossSum, mean, per_token
from lora_jax.training.mesh import shard_activations
from lora_jax.trees import combine, leaves_with_path, partition, trainable_mask

Batch = Mapping[str, Any]
MODEL_DROPOUT = 1  # folded into the model's key; LoRA's masks fold in a hash of the path


@struct.dataclass
class TrainState:
  """The part of a run that a step changes.

  Attributes:
    step: number of updates made so far.
    part: the trainable part of the combined tree, as `partition` returns it.
    opt_state: the optimizer's state, for the trainable leaves only.
    key: the run's key; a step's keys are folded from it and the step's number.
  """

  step: Int[Array, ""]
  part: PyTree
  opt_state: PyTree
  key: PRNGKeyArray


class StepMetrics(NamedTuple):
  """The metrics of a step.

  Attributes:
    loss: mean over the supervised tokens, nats.
    weight: number of supervised tokens.
    grad_norm: global norm of the gradient.
  """

  loss: Float[Array, ""]
  weight: Float[Array, ""]
  grad_norm: Float[Array, ""]


TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[PyTree, PyTree, Batch], LossSum]


def start(
  params: PyTree,
  trainable: PyTree,
  optimizer: optax.GradientTransformation,
  key: PRNGKeyArray,
  mesh: Mesh,
) -> tuple[TrainState, PyTree, optax.GradientTransformation]:
  """Partitions base params and a trainable tree into a train state and a frozen part.

  In full fine-tuning of a float32 model the trainable tree is `params` itself: pass the same object
  as both, as `full_finetuning(fn).init` returns it. The frozen part then has no array.

  With `ShapeDtypeStruct`s as trainable leaves the whole state is of `ShapeDtypeStruct`s: nothing is
  allocated, and the step can be lowered and compiled, also for a mesh of devices that are not here.

  Args:
    params: the base params.
    trainable: as a method's `init` returns it. The step donates it.
    optimizer: any optax transformation; it sees the trainable leaves only.
    key: the run's key.
    mesh: arrays without a sharding are replicated over it.

  Returns:
    The state, the frozen part, and the optimizer restricted to the trainable leaves.

  Raises:
    ValueError: if the two trees are different objects that share an array, which the step would
      donate and read.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  is_plan = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trainable))

  def placed(leaf: Any) -> Any:
    if isinstance(getattr(leaf, "sharding", None), NamedSharding):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(sharding=replicated)
    if is_plan:
      return jax.eval_shape(lambda: leaf).update(sharding=replicated)
    return place(leaf, replicated)  # also a NumPy array, or a number

  if trainable is params:
    trainable = params = _without_aliases(jax.tree.map(placed, params))
    base = jax.tree.map(lambda _: None, params)
  else:
    _check_disjoint(params, trainable)
    base = params = jax.tree.map(placed, params)
    trainable = _without_aliases(jax.tree.map(placed, trainable))
  tree = {"base": base, "adapter": trainable}
  mask = trainable_mask(tree)
  specs = {"base": jax.tree.map(lambda _: None, base), "adapter": shardings(trainable, params)}
  part, frozen = partition(tree, mask)
  if is_plan:
    init = functools.partial(jax.eval_shape, optimizer.init)
    optimizer = optax.GradientTransformationExtraArgs(
      init, optax.with_extra_args_support(optimizer).update
    )
  optimizer = freeze(optimizer, mask, specs)
  opt_state = _copied(optimizer.init(part))
  state = TrainState(jnp.zeros((), jnp.int32), part, opt_state, jnp.copy(key))
  return jax.tree.map(placed, state), frozen, optimizer


def trainable_tree(state: TrainState, frozen: PyTree) -> PyTree:
  """Returns the current trainable tree, as the method's `init` returns it and `apply` takes it.

  It includes the arrays that a variant keeps frozen.
  """
  return combine(state.part, frozen)["adapter"]


def _check_disjoint(params: PyTree, trainable: PyTree) -> None:
  base = {buffer for leaf in jax.tree.leaves(params) for buffer in _buffers(leaf)}
  shared = [path for path, leaf in leaves_with_path(trainable) if base & _buffers(leaf)]
  if shared:
    raise ValueError(
      f"the trainable tree shares arrays with params: {', '.join(shared[:5])}. A step donates the "
      "trainable tree, so give it copies; for full fine-tuning pass params itself as trainable"
    )


def _without_aliases(tree: PyTree) -> PyTree:
  """Returns a tree with a copy of each leaf that shares memory with an earlier one (tied weights).

  A step donates every leaf, and memory can be donated only once.
  """
  seen: set[Any] = set()

  def alone(leaf: Any) -> Any:
    buffers = _buffers(leaf)
    if buffers & seen or getattr(leaf, "weak_type", False):
      return _copy(leaf)
    seen.update(buffers)
    return leaf

  return jax.tree.map(alone, tree)


def _copied(opt_state: PyTree) -> PyTree:
  """Returns a copy of an optimizer's initial state, made leaf by leaf to save memory.

  A step donates the state, and a leaf of it may be an array of the trainable tree (Prodigy, DoG)
  or of the optimizer.
  """
  leaves, structure = jax.tree.flatten(opt_state)
  del opt_state
  for i, leaf in enumerate(leaves):
    leaves[i] = _copy(leaf)
  return jax.tree.unflatten(structure, leaves)


def _copy(leaf: Any) -> Any:
  """Returns a copy without a weak type: one from a checkpoint has none, and must compute alike."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf
  dtype = jnp.result_type(leaf)
  is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
  return jnp.copy(leaf) if is_key else jnp.array(leaf, dtype)


def _buffers(leaf: Any) -> set[Any]:
  """Returns the addresses of a leaf's memory, by device."""
  if isinstance(leaf, jax.ShapeDtypeStruct) or not jnp.size(leaf):
    return set()
  if not isinstance(leaf, jax.Array):
    return {id(leaf)} if isinstance(leaf, np.ndarray) else set()
  shards = (shard.data for shard in leaf.addressable_shards)
  return {(next(iter(x.devices())), x.unsafe_buffer_pointer()) for x in shards}


def make_train_step(
  loss: Adaptation,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  accumulation_steps: int = 1,
) -> TrainStep:
  """Returns the jitted step `(state, frozen, batch) -> (state, metrics)`; it donates the state.

  Args:
    loss: a method applied to a function `fn(params, batch, *, key=None) -> LossSum`. A step
      passes a key for the model's own dropout; evaluation leaves it out. An unused key costs
      nothing once compiled.
    optimizer: as `start` returns it.
    state: as `start` returns it; the new state keeps its shardings.
    accumulation_steps: number of micro-batches, along a leading axis of the batch's arrays,
      whose gradients are summed; the result is that of the whole batch at once.
  """
  fold = jax.random.fold_in
  placement: Any = state.step.sharding
  apply = shard_activations(loss.apply, placement.mesh)

  def gradients(part: PyTree, frozen: PyTree, batch: Batch, key: PRNGKeyArray):
    def total(part: PyTree) -> tuple[Array, LossSum]:
      tree = combine(part, frozen)
      keys = {"lora_key": key, "key": fold(key, MODEL_DROPOUT)}
      loss_sum = apply(tree["base"], tree["adapter"], batch, **keys)
      return loss_sum.total, loss_sum

    (_, loss_sum), grads = jax.value_and_grad(total, has_aux=True)(part)
    return loss_sum, grads

  def accumulated(part: PyTree, frozen: PyTree, batch: Batch, key: PRNGKeyArray):
    def add(sums: PyTree, micro_batch: tuple[Array, Batch]) -> tuple[PyTree, None]:
      i, batch = micro_batch
      return jax.tree.map(jnp.add, sums, gradients(part, frozen, batch, fold(key, i))), None

    zero = jnp.zeros(())
    zeros = (LossSum(zero, zero), jax.tree.map(jnp.zeros_like, part))
    return jax.lax.scan(add, zeros, (jnp.arange(accumulation_steps), batch))[0]

  def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, StepMetrics]:
    sum_gradients = gradients if accumulation_steps == 1 else accumulated
    loss_sum, grads = sum_gradients(state.part, frozen, batch, fold(state.key, state.step))
    # JAX's gradient of a complex leaf is the conjugate of the direction of steepest ascent.
    grads = jax.tree.map(lambda g: per_token(jnp.conj(g), loss_sum.weight), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.part)
    next_state = dataclasses.replace(
      state,
      step=state.step + 1,
      part=optax.apply_updates(state.part, updates),
      opt_state=opt_state,
    )
    metrics = StepMetrics(mean(loss_sum), loss_sum.weight, optax.tree.norm(grads))
    return next_state, metrics

  state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def make_eval_step(loss: Adaptation) -> EvalStep:
  """Returns the jitted loss `(params, trainable, batch) -> LossSum`, without dropout."""

  def step(params: PyTree, trainable: PyTree, batch: Batch) -> LossSum:
    return loss.apply(params, trainable, batch, lora_key=None)

  return jax.jit(step)
