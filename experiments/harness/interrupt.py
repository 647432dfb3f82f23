"""Ends a command on SIGINT or SIGTERM with one line: what is saved, and how to resume.

A thread does so as soon as the signal comes, also while XLA compiles or a metric runs in another
library, where Python would handle it only afterwards. The process ends as by SIGKILL, which loses
nothing: files of a run appear as a whole, and the next session removes what is left of others.
"""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_open_folders: list[Path] = []  # of runs, the innermost last


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
  """Names the run's folder that an interrupted command speaks of."""
  _open_folders.append(folder)
  try:
    yield
  finally:
    _open_folders.remove(folder)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
  """Inside, a signal ends the process with one line and exit code 130 or 143.

  A signal that the process was started to ignore, as by nohup, stays ignored. Only a process's main
  thread can do this; in another one nothing changes.
  """
  handled = [s for s in SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  read_end, write_end = os.pipe()
  os.set_blocking(write_end, False)
  before = {number: signal.signal(number, _leave_to_the_thread) for number in handled}
  wakeup_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
  thread = threading.Thread(target=_end_on_signal, args=(read_end,), daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup_before)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(write_end)
    thread.join()
    os.close(read_end)


def _leave_to_the_thread(number: int, frame: object) -> None:
  del number, frame


def _end_on_signal(read_end: int) -> None:
  while received := os.read(read_end, 1):
    if received[0] in SIGNALS:
      code = 128 + received[0]
      try:
        newline = "\n" if sys.stderr.isatty() else ""  # after a line of progress
        os.write(2, f"{newline}interrupted: {saved()}\n".encode())
      finally:
        os._exit(code)


def end_preempted(error: BaseException) -> NoReturn:
  """Ends one of several processes that have stopped at the same step, because of a SIGTERM."""
  sys.stderr.write(f"interrupted: {error}. To resume, start all processes again\n")
  sys.exit(128 + signal.SIGTERM)


def saved() -> str:
  """Returns what an interrupted command has saved, and the command that resumes it."""
  command = shlex.join(sys.orig_argv)
  if not _open_folders:
    return f"nothing was written yet. To start again: {command}"
  folder = _open_folders[-1]
  if (folder / "result.json").exists():
    return f"the result in {folder} is complete, and stays as it was. To run again: {command}"
  return f"{saved_steps(folder)}. To resume: {command}"


def saved_steps(folder: Path) -> str:
  """Returns which checkpoint a run's folder has, as a part of a sentence."""
  checkpoints = folder / "checkpoints"
  names = [path.name for path in checkpoints.glob("*")] if checkpoints.is_dir() else []
  steps = [int(name) for name in names if name.isdecimal()]
  if not steps:
    return f"no checkpoint was saved in {folder} yet"
  return f"{folder} is saved up to step {max(steps):,} ({checkpoints / str(max(steps))})"
