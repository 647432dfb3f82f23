"""Several processes that train together: who writes, and how they agree.

All of them run the same program. Process 0 writes the files that are not made of sharded arrays.
"""

import itertools
import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

Value = TypeVar("Value")

WEEK = 7 * 24 * 3600 * 1000  # milliseconds: the longest wait for another process

_barriers = itertools.count()


def are_several() -> bool:
  """Tells whether this is one of several processes; if not, JAX is not initialized."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Tells whether this is process 0, or the only one."""
  return not are_several() or jax.process_index() == 0


def wait_for_all() -> None:
  """Waits until every process is here; by the coordinator, so that devices are not involved."""
  if are_several():
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"lora_jax {next(_barriers)}", timeout_ms=WEEK)


def from_first(value: Callable[[], Value]) -> Value:
  """Returns a JSON value that process 0 computes, in all processes.

  Files may reach the other machines late; what one of them reads decides for all.

  Args:
    value: called in process 0 only, however long it takes.
  """
  return _from(0, value) if are_several() else value()


def first_message(message: str) -> str:
  """Returns, in all processes, the message of the first that has one, and the process's number.

  Args:
    message: of this process; "" is none. A single process gets its own back.
  """
  if not are_several():
    return message
  wait_for_all()
  senders = np.flatnonzero(multihost_utils.process_allgather(np.asarray(bool(message))))
  return f"process {senders[0]}: {_from(int(senders[0]), lambda: message)}" if len(senders) else ""


def _from(process: int, value: Callable[[], Value]) -> Value:
  """Returns a JSON value that one process computes, in all processes."""
  is_source = jax.process_index() == process
  text = json.dumps(value()).encode() if is_source else b""
  wait_for_all()
  size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text)), is_source))
  padded = np.frombuffer(text.ljust(size), np.uint8) if is_source else np.zeros(size, np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded, is_source)).tobytes())
