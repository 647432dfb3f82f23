"""The train step: gradients, state and updates for the trainable leaves alone.

The combined tree `{"base": params, "adapter": trainable}` is partitioned into a trainable and a
frozen part. The state holds the first and is donated; the second is an argument of every step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.shardings import shardings
from lora_jax.optimizer import freeze
from lora_jax.training.loss import LossSum, mean, per_token
from lora_jax.trees import combine, partition, trainable_mask

Batch = Mapping[str, Any]
DROPOUT_KEY = "dropout_key"
OWN_DROPOUT = 1  # sets the model's own masks apart from LoRA's, which fold in a hash of the path


@struct.dataclass
class TrainState:
  """All that a step changes.

  Attributes:
    step: updates made so far.
    trainable: the trainable part of the combined tree; `state.trainable["adapter"]` is what a
      method's `apply` takes.
    opt_state: of the optimizer, for the trainable leaves alone.
    key: of the run; a step's dropout key is folded from it and the step.
  """

  step: Int[Array, ""]
  trainable: PyTree
  opt_state: PyTree
  key: PRNGKeyArray


class StepMetrics(NamedTuple):
  """What a step reports: nats per token, tokens with a loss, and the gradient's global norm."""

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
  """Partitions a base and its adapter into a train state and a frozen part.

  Args:
    params: of the base. Where `trainable` is these arrays themselves (full fine-tuning), they
      are not passed twice.
    trainable: as a method's `init` returns it. The step donates it.
    optimizer: any optax transformation; it gets to see the trainable leaves alone.
    key: of the run.
    mesh: over which what has no sharding of its own is replicated.

  Returns:
    The state, the frozen part, and the optimizer as the step needs it.
  """
  replicated, moved = NamedSharding(mesh, PartitionSpec()), {}

  def placed(leaf: jax.Array) -> jax.Array:
    if isinstance(leaf.sharding, NamedSharding):
      return leaf
    if id(leaf) not in moved:  # what is in both trees stays one array
      moved[id(leaf)] = jax.device_put(leaf, replicated)
    return moved[id(leaf)]

  params, trainable = jax.tree.map(placed, (params, trainable))
  own = {id(leaf) for leaf in jax.tree.leaves(trainable)}
  base = jax.tree.map(lambda leaf: None if id(leaf) in own else leaf, params)
  tree = {"base": base, "adapter": trainable}
  places = {"base": jax.tree.map(lambda _: None, base), "adapter": shardings(trainable, params)}
  mask = trainable_mask(tree)
  optimizer = freeze(optimizer, mask, places)
  part, frozen = partition(tree, mask)
  state = TrainState(jnp.zeros((), jnp.int32), part, optimizer.init(part), jnp.copy(key))
  return jax.tree.map(placed, state), frozen, optimizer


def make_train_step(
  loss: Adaptation,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  accumulation_steps: int = 1,
) -> TrainStep:
  """Returns the jitted step `(state, frozen, batch) -> (state, metrics)`; it donates the state.

  The batch that the loss sees has one entry more, `dropout_key`, for the dropout of the model
  itself: a key of the step, and of the part of the batch. It is not there in evaluation, and a
  loss without dropout leaves it alone, which costs nothing once it is compiled.

  Args:
    loss: a method applied to a function `fn(params, batch) -> LossSum`.
    optimizer: as `start` returns it.
    state: likewise; the new state lies where it does.
    accumulation_steps: parts of the batch, along a leading axis of its arrays, whose gradients
      are added; the result is that of the whole batch at once.
  """

  fold = jax.random.fold_in

  def gradients(state: TrainState, frozen: PyTree, batch: Batch, key: PRNGKeyArray):
    def total(trainable: PyTree) -> tuple[Array, LossSum]:
      tree = combine(trainable, frozen)
      given = {**batch, DROPOUT_KEY: fold(key, OWN_DROPOUT)}
      of_batch = loss.apply(tree["base"], tree["adapter"], given, lora_key=key)
      return of_batch.total, of_batch

    return jax.value_and_grad(total, has_aux=True)(state.trainable)

  def accumulated(state: TrainState, frozen: PyTree, batch: Batch, key: PRNGKeyArray):
    def add(carry: PyTree, part: tuple[Array, Batch]) -> tuple[PyTree, None]:
      i, micro = part
      new = gradients(state, frozen, micro, fold(key, i))
      return jax.tree.map(jnp.add, carry, new), None

    zero = jnp.zeros(())
    first = ((zero, LossSum(zero, zero)), jax.tree.map(jnp.zeros_like, state.trainable))
    return jax.lax.scan(add, first, (jnp.arange(accumulation_steps), batch))[0]

  def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, StepMetrics]:
    key = fold(state.key, state.step)
    of = gradients if accumulation_steps == 1 else accumulated
    (_, of_batch), grads = of(state, frozen, batch, key)
    grads = jax.tree.map(lambda g: per_token(g, of_batch.weight), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    new = dataclasses.replace(
      state,
      step=state.step + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      opt_state=opt_state,
    )
    return new, StepMetrics(mean(of_batch), of_batch.weight, optax.tree.norm(grads))

  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


def make_eval_step(loss: Adaptation) -> EvalStep:
  """Returns the jitted loss `(params, trainable, batch) -> LossSum`, without dropout."""

  def step(params: PyTree, trainable: PyTree, batch: Batch) -> LossSum:
    return loss.apply(params, trainable, batch, lora_key=None)

  return jax.jit(step)


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
  """Returns whether no element of a tree of floats is infinite or NaN."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
