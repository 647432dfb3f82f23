"""`--sweep --concurrent=K`: runs of a sweep that are trained in one program, K at a time.

Runs that differ in the fields of `VARYING` only share the base model and the compiled step. Each
writes the checkpoints and the log of an ordinary run; its ordinary command, which follows, finds
its training complete, and decodes, scores and writes `result.json`.

With `--halving_steps=N` runs are compared after N, 2 N, 4 N, ... steps by their validation loss,
and the worse half of those that got there ends (successive halving without waiting, Li et al. 2018,
arXiv 1810.05934). Such a run has `stopped.json`; its ordinary command resumes it.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import lora_jax as lj
from experiments.configs import Config
from experiments.harness.config import AdaptationConfig, flat
from experiments.harness.fit import Training, fit_config, run_key
from experiments.harness.methods import find_method, lora_config
from experiments.harness.optimizer import make_optimizer, run_optimizer
from experiments.harness.workdir import (
  STOPPED,
  TRAINED_TOGETHER,
  read_result,
  stopped_early,
  write_json,
)
from lora_jax.adapters.targets import find_leaves
from lora_jax.data.batches import as_grain
from lora_jax.training.concurrent import Outcome, Run, fit_together
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.loop import Evaluation, Steps, evaluate_loss, run_steps
from lora_jax.training.loss import LossSum
from lora_jax.training.metrics_log import read_metrics
from lora_jax.training.step import start

VARYING = (
  *("workdir", "seed", "lora.rank", "lora.alpha", "lora.dropout", "lora.init", "decoding"),
  *("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.schedule"),
  *("optimizer.warmup_steps", "optimizer.warmup_share", "fit.num_train_steps", "data.num_epochs"),
)
"""The fields and sections in which runs that are trained together may differ."""

Trainings = Callable[[Config], Callable[[Config], contextlib.AbstractContextManager[Training]]]
"""From one run of a group, loads the base model; returns a function that opens each run's folder
and prepares its training."""


def groups(runs: Sequence[Config]) -> tuple[list[list[Config]], dict[str, str]]:
  """Returns the runs to train together, and by folder why each other run is trained on its own.

  Within a group the largest rank is first. Finished and stopped runs are in neither; the last run
  of a group that is left is still compared with them.
  """
  reasons = {run.workdir: reason for run in runs if (reason := _why_alone(run))}
  by_shared: dict[str, list[Config]] = {}
  for run in runs:
    if run.workdir not in reasons:
      by_shared.setdefault(_shared(run), []).append(run)
  together = []
  for group in by_shared.values():
    if len(group) == 1:
      reasons[group[0].workdir] = "no other run has the same base model, data and batches"
    elif left := [run for run in group if not _has_ended(run)]:
      together.append(sorted(left, key=lambda run: -run.lora.rank))
  ended = {run.workdir for run in runs if _has_ended(run)}
  return together, {name: reason for name, reason in reasons.items() if name not in ended}


def _has_ended(run: Config) -> bool:
  """Tells whether a run is finished, or was stopped early."""
  return read_result(run.workdir) is not None or bool(stopped_early(run.workdir))


def _partners(run: Config, runs: Sequence[Config]) -> list[str]:
  """Returns the folders of a group's runs, finished and stopped ones included."""
  shared = _shared(run)
  return [other.workdir for other in runs if not _why_alone(other) and _shared(other) == shared]


def _shared(run: Config) -> str:
  """Returns the settings that all runs of a group have, as text."""
  fields = {
    name: value
    for name, value in flat(run).items()
    if not any(name == varying or name.startswith(f"{varying}.") for varying in VARYING)
  }
  if run.model.get("start") == "random":
    fields["seed"] = run.seed  # of the base model
  return json.dumps(fields, sort_keys=True, default=str)


def _why_alone(run: Config) -> str:
  """Returns why a run cannot share a program with others; "" if it can."""
  method = find_method(run.method, run.experiment)
  if not method.shares_step:
    return f"method={run.method} is not plain LoRA, whose ranks can be padded with zeros"
  if run.lora.tokens:
    return "lora.tokens trains rows of the embedding, which are not plain LoRA"
  if run.mesh.data * run.mesh.fsdp * run.mesh.tensor > 1:
    return "the mesh has several devices, and runs are trained together on one"
  return ""


def train_together(
  runs: Sequence[Config], trainings: Trainings, slots: int, halving_steps: int = 0
) -> dict[str, Exception | str]:
  """Trains the runs of a sweep that can share a program, up to their last steps.

  Args:
    runs: the configs of the sweep.
    trainings: of the experiment.
    slots: the number of runs that are trained at once, at most.
    halving_steps: the first comparison's number of steps; 0 compares none.
  Returns:
    By folder the error, or the reason for which it was stopped, of each run that has ended early.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f"--concurrent={slots} is for one process, and there are {jax.process_count()}. Leave "
      "it out; --sweep_shard divides a sweep"
    )
  together, reasons = groups(runs)
  for group in together:
    _check_halving(group[0], halving_steps)
  for workdir, reason in reasons.items():
    print(f"{workdir} is trained on its own: {reason}", flush=True)
  early: dict[str, Exception | str] = {}
  for number, group in enumerate(together, 1):
    print(
      f"group {number} of {len(together)}: {len(group)} runs, up to {slots} in one program",
      flush=True,
    )
    rungs = _Rungs(halving_steps, _partners(group[0], runs))
    left = {run.workdir for run in group}
    try:
      for outcome in _Group(group, trainings, slots, rungs).train():
        left.remove(outcome.name)
        if outcome.error is not None:
          early[outcome.name] = outcome.error
        if outcome.fitted is not None:
          print(f"  trained {outcome.name}: {outcome.fitted.best_loss:.4f}", flush=True)
    except Exception as error:  # the other groups are still worth training
      early |= dict.fromkeys(left, error)
  for run in runs:
    if reason := stopped_early(run.workdir):
      early[run.workdir] = reason
  return early


def _check_halving(run: Config, halving_steps: int) -> None:
  every = run.fit.eval_every_steps
  if halving_steps % every:
    raise ValueError(
      f"--halving_steps={halving_steps} must be a multiple of fit.eval_every_steps={every}: runs "
      "are compared by their validation loss"
    )


class _Group:
  """The runs of one program."""

  def __init__(self, runs: Sequence[Config], trainings: Trainings, slots: int, rungs: "_Rungs"):
    self._runs, self._slots, self._rungs = runs, min(slots, len(runs)), rungs
    self._open_training = trainings(runs[0])
    self._drops = any(run.lora.dropout for run in runs)
    self._first: Training | None = None
    self._base = ""
    self._num_steps, self._shown = 0, time.monotonic()

  def train(self) -> Iterator[Outcome]:
    runs = (Run(run.workdir, functools.partial(self._open, run)) for run in self._runs)
    return fit_together(
      runs,
      self._loss,
      self._optimizer,
      slots=self._slots,
      accumulation_steps=self._runs[0].fit.accumulation_steps,
      behind=self._behind,
    )

  def _open(self, run: Config) -> tuple[PyTree, Steps]:
    """Opens a run's folder, and prepares or resumes its training."""
    with contextlib.ExitStack() as stack:
      training = stack.enter_context(self._open_training(run))
      if self._first is None:
        self._first, self._base = training, fingerprint(training.params)
      config, count = training.config, training.num_train_steps
      optimizer, schedule = run_optimizer(
        config, training.method, training.params, training.trainable, count
      )
      scalings = _scalings(config, training.params)
      settings = {
        "scaling": scalings,
        "dropout": jnp.float32(config.lora.dropout),
        "weight_decay": jnp.float32(config.optimizer.weight_decay),
        "learning_rate": jax.vmap(schedule)(jnp.arange(count)),
      }
      state, frozen, _ = start(
        training.params, training.trainable, optimizer, run_key(config), training.mesh
      )
      steps = run_steps(
        state,
        frozen,
        iter(as_grain(training.batches)),  # pyright: ignore[reportArgumentType]
        config=fit_config(config.fit, count),
        evaluate=functools.partial(self._evaluate, training, scalings),
        base=self._base,
        workdir=Path(config.workdir),
        mesh=training.mesh,
        schedule=schedule,
        progress=False,
      )
      return settings, self._steps(stack.pop_all(), Path(config.workdir), steps)

  def _steps(self, stack: contextlib.ExitStack, workdir: Path, steps: Steps) -> Steps:
    """Keeps a run's folder open for its steps."""
    with stack, contextlib.closing(steps):
      fitted = yield from steps
      about = {"train_seconds": fitted.seconds, "train_tokens": fitted.tokens}
      if fitted.tokens:  # else an earlier session has trained it
        write_json(workdir / TRAINED_TOGETHER, about | {"concurrent_runs": self._slots})
    return fitted

  def _loss(self, settings: PyTree) -> lj.Adaptation:
    assert self._first is not None, "a run was opened"
    loss = self._first.loss
    rate = settings["dropout"] if self._drops else 0.0
    options = {"scaling": settings["scaling"], "dropout_rate": rate}
    return loss._replace(apply=functools.partial(loss.apply, **options))

  def _optimizer(self, settings: PyTree) -> Any:
    assert self._first is not None, "a run was opened"
    config = dataclasses.replace(
      self._first.config.optimizer, weight_decay=settings["weight_decay"]
    )
    rates = settings["learning_rate"]
    return make_optimizer(config, len(rates), schedule=lambda count: rates[count])[0]

  def _evaluate(
    self, training: Training, scalings: PyTree, params: PyTree, trainable: PyTree
  ) -> Evaluation:
    """Returns a run's validation loss; runs of one rank share the compiled function."""
    step = functools.partial(self._eval_step, scalings)
    batches = training.eval_batches
    assert batches is not None, "runs are compared by their validation loss"
    loss = evaluate_loss(step, params, trainable, batches(), training.mesh)
    self._rungs.evaluated.add(training.config.workdir)
    return Evaluation(loss, {"loss": loss})

  @functools.cached_property
  def _eval_step(self) -> Callable[..., LossSum]:
    assert self._first is not None, "a run was opened"
    loss = self._first.eval_loss
    assert loss is not None, "runs are compared by their validation loss"

    def step(scaling: PyTree, params: PyTree, trainable: PyTree, batch: Any) -> LossSum:
      return loss.apply(params, trainable, batch, lora_key=None, scaling=scaling)

    return jax.jit(step)

  def _behind(self, workdirs: Collection[str]) -> Collection[str]:
    """Shows progress; returns the runs that successive halving stops."""
    self._num_steps += 1
    if time.monotonic() - self._shown > 30 or self._num_steps == 1:
      self._shown = time.monotonic()
      print(f"  step {self._num_steps:,} of the program: {len(workdirs)} runs", flush=True)
    return self._rungs.stop(workdirs)


class _Rungs:
  """Successive halving: the validation losses of runs after N, 2 N, 4 N, ... steps.

  They are read from the logs, so that a resumed sweep compares with the runs of earlier sessions.

  Args:
    first: N; 0 stops no run.
    workdirs: the folders of all runs that are compared, finished and stopped ones included.
  """

  def __init__(self, first: int, workdirs: Sequence[str]):
    self._first, self._workdirs = first, workdirs
    self.evaluated: set[str] = set()

  def stop(self, workdirs: Collection[str]) -> list[str]:
    """Returns the folders of runs that end, of those that were evaluated since the last call."""
    reached = sorted(self.evaluated.intersection(workdirs)) if self._first else []
    self.evaluated.clear()
    steps = {workdir: max(_valid_losses(workdir)) for workdir in reached}
    steps = {workdir: step for workdir, step in steps.items() if self._compares_at(step)}
    by_run = {name: _valid_losses(name) for name in self._workdirs} if steps else {}
    ended = []
    for workdir, step in steps.items():
      losses = {name: losses[step] for name, losses in by_run.items() if step in losses}
      best = sorted(losses, key=losses.__getitem__)[: math.ceil(len(losses) / 2)]
      if workdir not in best:
        reason = (
          f"stopped at step {step:,}, where its validation loss, {losses[workdir]:.4f}, was not in "
          f"the better half of {len(losses)} runs"
        )
        write_json(Path(workdir) / STOPPED, {"step": step, "reason": reason})
        ended.append(workdir)
    return ended

  def _compares_at(self, step: int) -> bool:
    """Tells whether runs are compared after this step: N, 2 N, 4 N, ..."""
    multiple, rest = divmod(step, self._first)
    return not rest and multiple.bit_count() == 1


def _valid_losses(workdir: str) -> dict[int, float]:
  """Returns the validation losses in a run's log, by step."""
  lines = read_metrics(Path(workdir) / "metrics.jsonl")
  return {line["step"]: line["valid/loss"] for line in lines if "valid/loss" in line}


def _scalings(config: AdaptationConfig, params: PyTree) -> dict[str, jax.Array]:
  """Returns alpha / rank of a run's weights, by path."""
  targets, _ = find_leaves(lora_config(config), params)
  return {path: jnp.float32(target.scaling) for path, target in targets.items()}
