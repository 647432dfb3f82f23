"""Several processes that train together: who writes, and how they agree.

All of them run the same program. Process 0 writes the files that are not made of sharded arrays.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

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
  if not are_several():
    return value()
  text = json.dumps(value()).encode() if is_first() else b""
  wait_for_all()
  size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
  padded = np.frombuffer(text.ljust(size), np.uint8)
  return json.loads(_broadcast(padded if is_first() else np.zeros(size, np.uint8)))


def in_all(condition: bool) -> bool:
  """Tells, in all processes, whether a condition holds in each of them."""
  if not are_several():
    return condition
  return bool(np.all(multihost_utils.process_allgather(np.asarray(condition))))


def _broadcast(array: np.ndarray) -> Any:
  return np.asarray(multihost_utils.broadcast_one_to_all(array)).tobytes()
