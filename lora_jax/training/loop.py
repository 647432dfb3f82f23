"""The training loop, for any `Adaptation` of a loss: it knows neither LoRA nor any model."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.fields import Count, NonNegative, check_fields
from lora_jax.files import make_folder
from lora_jax.training.checkpoint import Checkpoints
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.finite import Diagnosis, all_finite, check_initial
from lora_jax.training.held import read_held, write_held
from lora_jax.training.mesh import place_batch
from lora_jax.training.metrics_log import open_log
from lora_jax.training.processes import is_first
from lora_jax.training.progress import Window, progress_bar
from lora_jax.training.step import (
  EvalStep,
  StepMetrics,
  TrainState,
  TrainStep,
  make_eval_step,
  make_train_step,
  start,
  trainable_tree,
)

Batch = Mapping[str, Any]


class Batches(Protocol):
  """An iterator of batches whose position can be saved, such as grain's."""

  def __next__(self) -> Batch: ...

  def get_state(self) -> Any: ...

  def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class FitConfig:
  """The length of a run, and how often it evaluates, saves and logs.

  Attributes:
    num_train_steps: number of updates.
    eval_every_steps: steps between evaluations; each is followed by a checkpoint. The last step
      is always evaluated.
    checkpoint_every_steps: steps between further checkpoints.
    log_every_steps: steps between lines of `metrics.jsonl`.
    accumulation_steps: number of micro-batches that each batch is split into.
    checkpoint_every_seconds: the longest time without a checkpoint, checked at each line of
      `metrics.jsonl`; 0 saves by steps only.
  """

  num_train_steps: Count
  eval_every_steps: Count
  checkpoint_every_steps: Count
  log_every_steps: Count = 10
  accumulation_steps: Count = 1
  checkpoint_every_seconds: NonNegative = 300.0

  def __post_init__(self):
    check_fields(self)


class Evaluation(NamedTuple):
  """The result of evaluating a trainable tree on the validation set.

  Attributes:
    criterion: the checkpoint with the smallest criterion is the best.
    metrics: values for the log, by name.
  """

  criterion: float
  metrics: Mapping[str, float]


class Preempted(KeyboardInterrupt):
  """A SIGTERM has ended a training of several processes, which all stopped at the same step."""


@dataclasses.dataclass(frozen=True)
class Fitted:
  """The result of `fit`.

  Attributes:
    last: the trainable tree after the last step.
    best: the trainable tree of the checkpoint with the smallest validation loss, or criterion.
    best_step: the step of that checkpoint.
    best_loss: its validation loss, nats per token; or its criterion.
    last_loss: the validation loss, or criterion, of the last step.
    seconds: time that this session trained, with compilation and evaluation.
    tokens: number of tokens that this session processed.
    base: the fingerprint of the base params.
  """

  last: PyTree
  best: PyTree
  best_step: int
  best_loss: float
  last_loss: float
  seconds: float
  tokens: int
  base: str


Steps = Generator[tuple[TrainState, PyTree, Batch], tuple[TrainState, StepMetrics], Fitted]
"""A run, as `run_steps` returns it: the inputs of a train step, its outputs, the result."""


def fit(
  loss: Adaptation,
  params: PyTree,
  trainable: PyTree,
  optimizer: optax.GradientTransformation,
  batches: Batches,
  *,
  config: FitConfig,
  eval_loss: Adaptation | None = None,
  eval_batches: Callable[[], Iterable[Batch]] | None = None,
  evaluate: Callable[[PyTree, PyTree], Evaluation] | None = None,
  workdir: str | Path,
  key: jax.Array,
  mesh: Mesh,
  schedule: Callable[[int], Any] | None = None,
  progress: bool = True,
) -> Fitted:
  """Trains the trainable tree, resuming from the last checkpoint in `workdir` if there is one.

  An interrupted and resumed run ends with the same bits as an uninterrupted one.

  Args:
    loss: a method applied to a function `fn(params, batch, *, key=None) -> LossSum`; `key` is
      for the model's own dropout.
    params: the base params, placed on `mesh`.
    trainable: as `loss.init` returns it. It is donated.
    optimizer: any optax transformation.
    batches: the training batches, dicts of arrays; `segment_ids` counts the tokens (0 is
      padding). One of several processes gives its `local_rows` of each batch.
    config: the number of steps.
    eval_loss: the same method applied to the loss of the validation set.
    eval_batches: returns the batches of the validation set, from the first.
    evaluate: instead of these two, a function from `(params, trainable)` to an `Evaluation`, whose
      criterion chooses the best checkpoint: a metric that is not a mean over tokens.
    workdir: the run's folder; `checkpoints/`, `metrics.jsonl` and `tensorboard/` are written
      there.
    key: the key for dropout.
    mesh: as `make_mesh` returns it.
    schedule: the learning rate by step, for the log only.
    progress: whether to show progress: a progress bar, or, if stderr is not a terminal, a line
      for each line of the log.
  Raises:
    FloatingPointError: if a loss, gradient or weight is not finite, saying what to do.
    ValueError: if the batches end early or the checkpoints belong to another run.
    OSError: if a checkpoint or the log cannot be written, as on a full disk.
    Preempted: if one of several processes has received SIGTERM; a checkpoint was saved.
  """
  if (evaluate is None) == (eval_loss is None) or (eval_loss is None) != (eval_batches is None):
    raise ValueError("expected eval_loss and eval_batches, or evaluate; not both")
  workdir = make_folder(workdir)
  base = fingerprint(params)
  state, frozen, optimizer = start(params, trainable, optimizer, key, mesh)
  del trainable
  train_step = make_train_step(loss, optimizer, state, config.accumulation_steps)
  if evaluate is None:
    evaluate = _by_loss(eval_loss, eval_batches, mesh)
  steps = run_steps(
    state,
    frozen,
    batches,
    config=config,
    evaluate=evaluate,
    base=base,
    workdir=workdir,
    mesh=mesh,
    schedule=schedule,
    progress=progress,
  )
  del state
  return _train(steps, train_step)


def _train(steps: Steps, train_step: TrainStep) -> Fitted:
  """Makes each step of a run, and returns its result."""
  try:
    inputs = next(steps)
    while True:
      inputs = steps.send(train_step(*inputs))
  except StopIteration as end:
    return end.value


def run_steps(
  state: TrainState,
  frozen: PyTree,
  batches: Batches,
  *,
  config: FitConfig,
  evaluate: Callable[[PyTree, PyTree], Evaluation],
  base: str,
  workdir: Path,
  mesh: Mesh,
  schedule: Callable[[int], Any] | None = None,
  progress: bool = True,
) -> Steps:
  """Yields the inputs of each step of a run, gets its outputs, and returns the run's result.

  Between steps it logs, evaluates and saves; a run that has a checkpoint is resumed from it.
  `lora_jax.training.concurrent` makes the steps of several runs in one program.

  Args:
    state, frozen: as `start` returns them.
    base: the fingerprint of the base params.

  The other arguments and the errors are those of `fit`.
  """
  started, tokens = time.perf_counter(), 0

  with Checkpoints(workdir / "checkpoints") as checkpoints:
    state, first, last_loss = _resume(checkpoints, state, base, batches, config)
    if first:
      frozen = {**frozen, "adapter": read_held(workdir, frozen["adapter"])}
    else:
      check_initial(state.part)  # compiled once for this and for the checkpoints
      write_held(workdir, frozen["adapter"])
    saved = time.monotonic()
    with (
      open_log(workdir, first) as log,
      progress_bar(config.num_train_steps, first, progress := progress and is_first()) as bar,
    ):
      diagnosis = Diagnosis(checkpoints, frozen["base"])
      window = Window(config.num_train_steps, log, bar, progress, schedule, diagnosis)
      # All stop at the step after the last one named here, also if SIGTERM comes before the first.
      ocp.multihost.reached_preemption(first)
      for step in range(first + 1, config.num_train_steps + 1):
        batch = _next(batches, step, config)
        placed = place_batch(mesh, batch, config.accumulation_steps)
        count = _count_tokens(batch, placed)
        state, metrics = yield state, frozen, placed
        tokens += count
        window.add(step, metrics, count)
        is_last = step == config.num_train_steps
        evaluates = step % config.eval_every_steps == 0 or is_last
        stops = ocp.multihost.reached_preemption(step) and not is_last
        saves = evaluates or stops or step % config.checkpoint_every_steps == 0
        logs = step % config.log_every_steps == 0
        if saves or logs:
          window.flush()
        # At lines of the log only, so that the log does not depend on the clock.
        saves = saves or (logs and _is_due(saved, config))
        if not saves:
          continue
        finite = bool(all_finite(state.part))
        diagnosis.check(0.0 if finite else np.nan, "weights", step)
        last_loss = None
        if evaluates:
          last_loss, values = evaluate(frozen["base"], trainable_tree(state, frozen))
          diagnosis.check(last_loss, "validation loss", step)
          log.write(step, {f"valid/{name}": value for name, value in values.items()})
        checkpoints.save(step, state, batches.get_state(), base, last_loss)
        saved = time.monotonic()
        if stops:
          raise Preempted(f"{workdir} is saved up to step {step:,}")
        window.restart()
    best = checkpoints.restore_best(state, base)
  assert last_loss is not None, "the last step is always evaluated"
  assert best.loss is not None
  return Fitted(
    last=trainable_tree(state, frozen),
    best=trainable_tree(best.state, frozen),
    best_step=best.step,
    best_loss=best.loss,
    last_loss=last_loss,
    seconds=time.perf_counter() - started,
    tokens=int(tokens),
    base=base,
  )


def _count_tokens(batch: Batch, placed: Batch) -> int | jax.Array:
  """Returns the number of tokens of a global batch; of several processes' still on the device."""
  if jax.process_count() == 1:
    return int(np.count_nonzero(batch["segment_ids"]))
  return _count_nonzero(placed["segment_ids"])


@jax.jit
def _count_nonzero(x: Int[Array, "..."]) -> Int[Array, ""]:
  return jnp.count_nonzero(x)


def _is_due(saved: float, config: FitConfig) -> bool:
  """Tells whether it is time for a checkpoint, by the clock of process 0."""
  limit = config.checkpoint_every_seconds
  due = 0 < limit <= time.monotonic() - saved
  if limit and jax.process_count() > 1:
    due = bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))
  return due


def _by_loss(
  loss: Adaptation | None, batches: Callable[[], Iterable[Batch]] | None, mesh: Mesh
) -> Callable[[PyTree, PyTree], Evaluation]:
  """Returns the evaluation by the validation set's mean loss."""
  assert loss is not None, "fit has checked it"
  assert batches is not None, "fit has checked it"
  eval_step = make_eval_step(loss)

  def evaluate(params: PyTree, trainable: PyTree) -> Evaluation:
    mean = evaluate_loss(eval_step, params, trainable, batches(), mesh)
    return Evaluation(mean, {"loss": mean})

  return evaluate


def _resume(
  checkpoints: Checkpoints, state: TrainState, base: str, batches: Batches, config: FitConfig
) -> tuple[TrainState, int, float | None]:
  """Returns the state to resume from, its step, and its validation loss if it has one."""
  restored = checkpoints.restore_last(state, base)
  if restored is None:
    return state, 0, None
  if restored.step > config.num_train_steps - (restored.loss is None):
    raise ValueError(
      f"{checkpoints.folder} belongs to a longer run: its last checkpoint is of step "
      f"{restored.step}, and num_train_steps is {config.num_train_steps}. Give another workdir"
    )
  batches.set_state(restored.data_state)
  return restored.state, restored.step, restored.loss


def evaluate_loss(
  eval_step: EvalStep, params: PyTree, trainable: PyTree, batches: Iterable[Batch], mesh: Mesh
) -> float:
  """Returns the mean loss per token over batches, nats; `eval_step` is `make_eval_step`'s."""
  parts = [eval_step(params, trainable, place_batch(mesh, batch)) for batch in batches]
  if not parts:
    raise ValueError("there are no validation batches; expected one or more")
  total, weight = (sum(map(float, values)) for values in zip(*parts, strict=True))
  if not weight:
    raise ValueError("the validation batches have no supervised token; expected one or more")
  return total / weight


def _next(batches: Iterator[Batch] | Batches, step: int, config: FitConfig) -> Batch:
  try:
    batch: Any = next(batches)  # pyright: ignore[reportArgumentType]
  except StopIteration:
    raise ValueError(
      f"the training batches ended before step {step} of {config.num_train_steps}. Lower "
      "num_train_steps, or give more epochs"
    ) from None
  if not isinstance(batch, Mapping) or "segment_ids" not in batch:
    names = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
      f"a training batch must be a dict of arrays with segment_ids, from which tokens are counted "
      f"(0 is padding), got {names}"
    )
  return batch
