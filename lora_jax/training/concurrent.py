"""Several runs of one base model trained by one program: the ordinary step, mapped over slots.

Each run has a slot: its adapter, optimizer state, key, step number and settings are entries of
stacked arrays. The base params are not stacked, so that their matmuls are single ones over the rows
of all runs. Runs share nothing else: one whose loss is NaN ends alone.

Adapters of other ranks are padded with zeros. For plain LoRA this changes nothing, exactly: where a
column of A and a row of B are 0, so are their gradients, the optimizer's moments and its updates.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.arithmetic.rows import map_adapters
from lora_jax.training.loop import Batch, Fitted, Steps
from lora_jax.training.step import StepMetrics, TrainState, make_train_step


class Run(NamedTuple):
  """One run of a concurrent training.

  Attributes:
    name: for messages; unique.
    open: starts or resumes the run. Returns its settings, a tree of arrays, and its steps, as
      `lora_jax.training.loop.run_steps` does. The settings are the same tree in all runs; shorter
      arrays are padded with zeros.
  """

  name: str
  open: Callable[[], tuple[PyTree, Steps]]


class Outcome(NamedTuple):
  """The end of a run.

  Attributes:
    name: of the run.
    fitted: the result of its training; None if it did not reach its last step.
    error: the error that ended it alone; None if none did.
  """

  name: str
  fitted: Fitted | None
  error: Exception | None


class Member(NamedTuple):
  """A run in a slot: its name, its settings, its steps, and the inputs of the next one."""

  name: str
  settings: PyTree
  steps: Steps
  state: TrainState
  frozen: PyTree
  batch: Batch


def make_concurrent_step(
  make_loss: Callable[[PyTree], Adaptation],
  make_optimizer: Callable[[PyTree], optax.GradientTransformation],
  like: TrainState,
  accumulation_steps: int = 1,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
  """Returns the jitted step `(states, base, held, batches, settings) -> (states, metrics)`.

  It is the ordinary step, mapped over slots: each leaf of the arguments has a leading axis of them,
  except those of `base`, and `batches` is a list with one for each slot. It donates the states.

  Args:
    make_loss: from one run's settings, which are traced, to its adapted loss.
    make_optimizer: the same for its optimizer.
    like: one run's state, for its sharding.
    accumulation_steps: as in `make_train_step`.
  """

  def step_of_run(state: TrainState, frozen: PyTree, batch: Batch, settings: PyTree):
    loss, optimizer = make_loss(settings), make_optimizer(settings)
    return make_train_step(loss, optimizer, like, accumulation_steps)(state, frozen, batch)

  def step(states: TrainState, base: PyTree, held: PyTree, batches: list[Batch], settings: PyTree):
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    in_axes = (0, {"base": None, "adapter": 0}, 0, 0)
    frozen = {"base": base, "adapter": held}
    return map_adapters(step_of_run, in_axes)(states, frozen, batch, settings)

  return jax.jit(step, donate_argnums=0)


def fit_together(
  runs: Iterable[Run],
  make_loss: Callable[[PyTree], Adaptation],
  make_optimizer: Callable[[PyTree], optax.GradientTransformation],
  *,
  slots: int,
  accumulation_steps: int = 1,
  behind: Callable[[Collection[str]], Collection[str]] = lambda names: (),
) -> Iterator[Outcome]:
  """Trains runs in one program, `slots` at a time; yields each run's outcome when it ends.

  A run that ends frees its slot for the next one. Each writes its own log and checkpoints, from
  which it can be resumed on its own. When no run waits and half of the slots are free, the program
  is compiled again for fewer.

  Args:
    runs: of one base model. Ranks may differ in plain LoRA; give the largest first, so that less is
      compiled.
    make_loss: from a run's settings, which are traced, to its adapted loss.
    make_optimizer: the same for its optimizer; it gets the trainable leaves only.
    slots: the number of runs that are trained at once, at most.
    accumulation_steps: as in `make_train_step`.
    behind: after each step, from the names of the runs in slots to those of the runs to stop.
  Raises:
    ValueError: if batches of two runs have different shapes, or JAX cannot map the model over runs.
  """
  waiting, members = iter(runs), list[Member]()
  program = _Program(make_loss, make_optimizer, accumulation_steps)
  size, is_last = slots, False
  try:
    while True:
      while len(members) < slots and not is_last:
        run = next(waiting, None)
        is_last = run is None
        if run is not None:
          entered = _entered(run)
          if isinstance(entered, Outcome):
            yield entered
          else:
            members.append(entered)
      if not members:
        return
      if is_last and 2 * len(members) <= size:
        size = len(members)
      results = program.run(members, size)
      advanced = list(map(_advanced, members, results))
      members = [member for member in advanced if isinstance(member, Member)]
      yield from (outcome for outcome in advanced if isinstance(outcome, Outcome))
      for name in behind([member.name for member in members]):
        member = next(member for member in members if member.name == name)
        members.remove(member)
        member.steps.close()
        yield Outcome(name, None, None)
  finally:
    for member in members:
      member.steps.close()


def _entered(run: Run) -> Member | Outcome:
  """Returns a run with the inputs of its first step, or its outcome if it has none."""
  try:
    settings, steps = run.open()
    return Member(run.name, settings, steps, *next(steps))
  except StopIteration as end:
    return Outcome(run.name, end.value, None)
  except Exception as error:  # the other runs are still worth training
    return Outcome(run.name, None, error)


def _advanced(member: Member, result: tuple[TrainState, StepMetrics]) -> Member | Outcome:
  """Returns a run with the inputs of its next step, or its outcome if it has ended."""
  try:
    return Member(member.name, member.settings, member.steps, *member.steps.send(result))
  except StopIteration as end:
    return Outcome(member.name, end.value, None)
  except Exception as error:
    return Outcome(member.name, None, error)


class _Program:
  """The compiled step, and the stacked states while the runs in slots are the same."""

  def __init__(self, make_loss: Any, make_optimizer: Any, accumulation_steps: int):
    self._make = functools.partial(make_concurrent_step, make_loss, make_optimizer)
    self._accumulation_steps = accumulation_steps
    self._step: Any = None
    self._names: list[str] = []
    self._shapes: list[tuple[int, ...]] = []

  def run(self, members: Sequence[Member], size: int) -> list[tuple[TrainState, StepMetrics]]:
    """Makes a step of each run; returns their new states and metrics.

    Args:
      members: the runs; their slots are their places in the list.
      size: number of slots; the others repeat the first run, and are ignored.
    """
    _check_batches(members)
    if self._step is None:
      self._step = self._make(members[0].state, self._accumulation_steps)
    names = [member.name for member in members]
    if names != self._names or len(jax.tree.leaves(self._states)[0]) != size:
      self._enter(members, size)
    filled = [*members, *[members[0]] * (size - len(members))]
    batches = [member.batch for member in filled]
    base = members[0].frozen["base"]
    self._states, metrics = self._step(self._states, base, self._held, batches, self._settings)
    results = []
    for slot, member in enumerate(members):
      shapes = tuple(leaf.shape for leaf in jax.tree.leaves(member.state))
      state = _take(self._states, slot, shapes)
      results.append((state, _take(metrics, slot, ((),) * len(metrics))))
    return results

  def _enter(self, members: Sequence[Member], size: int) -> None:
    """Stacks the states of runs, padded to the largest shapes so far."""
    self._names = [member.name for member in members]
    trees = [(member.state, member.frozen["adapter"], member.settings) for member in members]
    for tree in trees:
      shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
      pairs = zip(self._shapes or shapes, shapes, strict=True)
      self._shapes = [tuple(map(max, *pair)) for pair in pairs]
    padded = [_pad(tree, tuple(self._shapes)) for tree in trees]
    filled = [*padded, *padded[:1] * (size - len(members))]
    self._states, self._held, self._settings = _stack(filled)


def _check_batches(members: Sequence[Member]) -> None:
  first, *others = [{name: x.shape for name, x in m.batch.items()} for m in members]
  for member, shapes in zip(members[1:], others, strict=True):
    if shapes != first:
      raise ValueError(
        f"{member.name} has batches of {shapes}, and {members[0].name} of {first}; "
        "expected one shape for runs that are trained together. Train it on its own"
      )


@functools.partial(jax.jit, static_argnames="shapes")
def _pad(tree: PyTree, shapes: tuple[tuple[int, ...], ...]) -> PyTree:
  """Returns a tree with zeros behind the entries of each leaf, up to these shapes."""

  def padded(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if leaf.shape == shape:
      return leaf
    return jnp.pad(leaf, [(0, size - have) for size, have in zip(shape, leaf.shape, strict=True)])

  leaves, structure = jax.tree.flatten(tree)
  return jax.tree.unflatten(structure, map(padded, leaves, shapes))


@jax.jit
def _stack(trees: list[PyTree]) -> PyTree:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnames="shapes")
def _take(stacked: PyTree, slot: int, shapes: tuple[tuple[int, ...], ...]) -> PyTree:
  """Returns a slot's tree, without padding: with leaves of these shapes."""
  leaves, structure = jax.tree.flatten(stacked)
  entries = (leaf[slot][tuple(map(slice, s))] for leaf, s in zip(leaves, shapes, strict=True))
  return jax.tree.unflatten(structure, entries)
