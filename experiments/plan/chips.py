"""The devices of a pod that is not here, and what its chips can do.

The rates are those that Google publishes: docs.cloud.google.com/tpu/docs/ v5e, v5p and v6e.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
  """What one chip can do, at best.

  Attributes:
    flops: of matmuls in bfloat16, operations per second.
    memory: bytes; the compiler keeps a part of it for itself.
    memory_rate: bytes per second to and from that memory.
    link_rate: bytes per second that it can send to other chips: half of the published rate, which
      counts both directions.
  """

  flops: float
  memory: float
  memory_rate: float
  link_rate: float


CHIPS = {
  "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
  "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9),
}
MOST_EMULATED = 1024  # devices; JAX makes threads and memory for each
QUIET = {  # libtpu asks neither the cloud nor the user about the machine
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def find_devices(topology: str) -> tuple[Sequence[Any], Chip | None]:
  """Returns the devices of a topology, for which programs can be compiled, and their kind.

  Args:
    topology: `v5p:4x4x4`, the kind of a TPU and its chips along each axis of links; or `cpu:8`,
      emulated devices, of which nothing is known.
  Raises:
    ValueError: if there is no such topology.
    RuntimeError: if libtpu is not installed.
  """
  kind, _, size = topology.partition(":")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) or kind not in (*CHIPS, "cpu"):
    raise ValueError(
      f"topology must be one of {', '.join(CHIPS)} and its chips, such as v5p:4x4x4 or v5e:16x16, "
      f"or cpu:8; got {topology!r}"
    )
  if kind == "cpu" and (not size.isdigit() or int(size) > MOST_EMULATED):
    raise ValueError(
      f"topology cpu:N must have a number N of at most {MOST_EMULATED} devices, such as 8, got "
      f"{size!r}"
    )
  with contextlib.suppress(RuntimeError):  # JAX has devices already, in tests
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
      jax.config.update("jax_num_cpu_devices", int(size))
  if kind == "cpu":
    return _emulated(int(size)), None
  if importlib.util.find_spec("libtpu") is None:
    raise RuntimeError(
      "compiling for TPUs needs their compiler, libtpu: pip install 'lora-jax[tpu-plan]' (in a "
      "checkout: pip install -e '.[tpu-plan]'). No TPU is needed. --topology=cpu:8 needs none of "
      "it, and its figures are those of CPUs"
    )
  return _described(topology), CHIPS[kind]


def _emulated(count: int) -> Sequence[Any]:
  devices = jax.devices("cpu")
  if count > len(devices):
    raise ValueError(
      f"topology cpu:N must have a number N of at most {len(devices)} devices, got {count}. "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={count} emulates more"
    )
  return devices[:count]


def _described(topology: str) -> Sequence[Any]:
  from jax.experimental import topologies

  for name, value in QUIET.items():
    os.environ.setdefault(name, value)
  try:
    described: Any = topologies.get_topology_desc(topology, platform="tpu")
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"libtpu has no topology {topology!r}: {error}") from error
  return described.devices
