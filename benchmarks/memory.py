"""Measures the anonymous memory of another process: without the pages of its mapped files.

A model's mapped files are in the resident set too, but the system can drop them at any time. Linux
reports current anonymous memory as `RssAnon`, without a peak, so it is polled. This is done
from the parent process: a thread of the measured process would wait for its interpreter lock.
"""

import ctypes
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

READY, EVERY = "ready", 0.002  # seconds


class Measured(NamedTuple):
  """Measurements of a process between `wait_for_start` and its end.

  Attributes:
    growth: peak anonymous memory, less that at the start, bytes.
    result: the argument of `finish`.
  """

  growth: int
  result: Any


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
  """Runs a command that calls `wait_for_start` and then `finish`.

  Raises:
    RuntimeError: if the command fails.
  """
  pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  env = {**os.environ, **(environment or {})}
  with subprocess.Popen(command, text=True, env=env, **pipes) as process:
    assert process.stdin is not None
    assert process.stdout is not None
    line = "-"
    while line and line.strip() != READY:
      line = process.stdout.readline()
    before = peak = anonymous(process.pid) if line else 0
    if line:
      process.stdin.write("\n")
      process.stdin.flush()
    while line and not select.select([process.stdout], [], [], EVERY)[0]:
      peak = max(peak, anonymous(process.pid))
    last = process.stdout.read().strip()
  if process.returncode or not last:
    raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}")
  return Measured(peak - before, json.loads(last))


def anonymous(pid: int) -> int:
  """Returns the anonymous memory of a process in bytes; 0 if it has ended."""
  for line in Path(f"/proc/{pid}/status").read_text().splitlines():
    if line.startswith("RssAnon:"):
      return int(line.split()[1]) * 1024
  return 0


def wait_for_start() -> float:
  """In the measured process: waits for the measurement to start; returns the time.

  Memory that was freed before goes back to the system: its later use would not count as growth.
  """
  if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
    trim(0)
  print(READY, flush=True)
  sys.stdin.readline()
  return time.perf_counter()


def finish(result: Any) -> None:
  """In the measured process: ends the measurement and sends its result."""
  print(json.dumps(result), flush=True)
