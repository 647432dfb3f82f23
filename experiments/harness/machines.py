"""Several processes, on one machine or more, that do a run together.

All run the same command, and `jax.distributed` connects them by the fields of
`--config.distributed`, or by what SLURM, Open MPI, Kubernetes or a TPU pod tell. Process 0 prints
and writes files; an error in one process ends all of them with its message.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src.distributed import global_state  # the coordinator's store has no public name

from experiments.harness.config import AUTO, Distributed

FAILED = "lora_jax/failed"
INTERVAL, GRACE = 1.0, 5.0  # seconds


def join(settings: Distributed) -> None:
  """Connects this process to the others of its job; it must come before any use of JAX's devices.

  Raises:
    ValueError: if a field is neither given nor detected, or they contradict each other.
    RuntimeError: if the other processes are not there within five minutes.
  """
  if not settings.is_set:
    return
  address = None if settings.coordinator_address == AUTO else settings.coordinator_address
  process_id = None if settings.process_id < 0 else settings.process_id
  try:
    jax.distributed.initialize(address, settings.num_processes or None, process_id)
  except ValueError as error:
    raise ValueError(
      f"distributed: {error} JAX detects SLURM (srun), Open MPI (mpirun), Kubernetes and TPU pods; "
      "elsewhere give coordinator_address=HOST:PORT, num_processes and process_id"
    ) from error
  except RuntimeError as error:
    raise RuntimeError(f"distributed: the processes do not find each other: {error}") from error
  over = threading.Event()
  thread = threading.Thread(target=_end_with_others, args=(over,), daemon=True)
  thread.start()
  atexit.register(lambda: (over.set(), thread.join()))
  if global_state.process_id:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process


def is_joined() -> bool:
  """Tells whether this process is one of several; before any use of JAX's devices, too."""
  return global_state.client is not None and global_state.num_processes > 1


def end_all(message: str) -> NoReturn:
  """Ends all processes of the job with a message; that of the process that calls it first."""
  client = global_state.client
  assert client is not None, "is_joined() holds"
  with contextlib.suppress(Exception):  # another process was first, or the coordinator is gone
    client.key_value_set(FAILED, f"process {global_state.process_id}: {message}")
  time.sleep(2 * GRACE)  # _end_with_others ends this process sooner
  _end(message)


def _end_with_others(over: threading.Event) -> None:
  """Waits for the message of a process that ends all, this one or another; until `over` is set."""
  client = global_state.client
  assert client is not None, "join has connected it"
  while not over.wait(INTERVAL):
    with contextlib.suppress(Exception):  # there is no message; or no coordinator, as others notice
      message = client.key_value_try_get(FAILED)
      with contextlib.suppress(Exception):
        client.wait_at_barrier(f"{FAILED} read", int(1000 * GRACE))  # the coordinator ends last
      _end(message)


def _end(message: str) -> NoReturn:
  """Ends this process at once: a regular end waits for the other processes."""
  try:
    os.write(2, f"{message}\n".encode())
  finally:  # also if nobody reads it
    os._exit(1)
