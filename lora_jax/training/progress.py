"""The metrics of the steps since the last line of the log, and the line that shows progress."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax import Array

from lora_jax.extras import require
from lora_jax.training.finite import Diagnosis
from lora_jax.training.metrics_log import Log
from lora_jax.training.step import StepMetrics


class Bar(Protocol):
  """The part of tqdm that is used."""

  def update(self) -> Any: ...

  def unpause(self) -> Any: ...

  def set_postfix_str(self, s: str) -> Any: ...


class NoBar:
  """Shows nothing, and needs no tqdm."""

  def update(self) -> None:
    pass

  def unpause(self) -> None:
    pass

  def set_postfix_str(self, s: str) -> None:
    pass


class Window:
  """The steps since the last line of the log, whose metrics are still on the device."""

  def __init__(
    self,
    num_train_steps: int,
    log: Log,
    bar: Bar,
    progress: bool,
    schedule: Callable[[int], Any] | None,
    diagnosis: Diagnosis,
  ):
    self._num_train_steps, self._schedule = num_train_steps, schedule
    self._log, self._bar = log, bar
    self._prints_lines = progress and isinstance(bar, NoBar)
    self._diagnosis = diagnosis
    self._steps: list[tuple[int, StepMetrics]] = []
    self._timed_tokens: int | Array = 0
    self._compiled_speed = 0.0  # of the first step, compilation included; if no other is timed
    self._compiled: tuple[int, float] | None = None  # the session's first step, and its end
    self.restart()

  def restart(self) -> None:
    """Starts the clock again, after an evaluation or a checkpoint."""
    self._since = time.perf_counter()

  def add(self, step: int, metrics: StepMetrics, tokens: int | Array) -> None:
    self._steps.append((step, metrics))
    self._timed_tokens += tokens
    self._bar.update()
    if self._compiled is None:
      jax.block_until_ready(metrics)
      self._compiled = step, time.perf_counter()
      self._compiled_speed = int(tokens) / (self._compiled[1] - self._since)
      self._bar.unpause()
      self._timed_tokens = 0
      self.restart()

  def flush(self) -> None:
    """Fetches, checks and writes the window's metrics."""
    if not self._steps:
      return
    steps = [(step, jax.device_get(metrics)) for step, metrics in self._steps]
    for step, metrics in steps:
      self._diagnosis.check(float(metrics.loss), "loss", step)
      self._diagnosis.check(float(metrics.grad_norm), "gradient's norm", step)
    speed = self._compiled_speed  # if it is the only step of this session so far
    if timed := int(self._timed_tokens):
      speed = timed / (time.perf_counter() - self._since)
    weight = sum(float(metrics.weight) for _, metrics in steps)
    loss = sum(float(m.loss) * float(m.weight) for _, m in steps) / max(weight, 1)
    step, last = steps[-1]
    line = {
      "train/loss": loss,
      "train/grad_norm": float(last.grad_norm),
      "train/tokens_per_second": speed,
    }
    if self._schedule is not None:
      line["train/learning_rate"] = float(self._schedule(step - 1))
    self._log.write(step, line)
    self._show(step, f"loss {loss:.3f}, {speed:,.0f} tokens/s")
    self._steps, self._timed_tokens = [], 0
    self.restart()

  def _show(self, step: int, text: str) -> None:
    self._bar.set_postfix_str(text)
    if self._prints_lines:
      total = self._num_train_steps
      time_left = self._time_left(step)
      print(f"step {step:,} of {total:,}: {text}{time_left}", file=sys.stderr, flush=True)

  def _time_left(self, step: int) -> str:
    """Returns an estimate from this session's steps after the first, which is compiled."""
    first, since = self._compiled or (step, 0.0)
    if step == first:
      return ""
    seconds = (time.perf_counter() - since) / (step - first)
    remaining = round(seconds * (self._num_train_steps - step))
    return f", {datetime.timedelta(seconds=remaining)} left"


def progress_bar(
  num_train_steps: int, first: int, progress: bool
) -> contextlib.AbstractContextManager[Bar]:
  """Returns the progress line; none where stderr is not a terminal: it would fill a log file."""
  if not (progress and sys.stderr.isatty()):
    return contextlib.nullcontext(NoBar())
  require("tqdm")
  from tqdm import tqdm

  return tqdm(
    total=num_train_steps, initial=first, unit="step", mininterval=1.0, dynamic_ncols=True
  )
