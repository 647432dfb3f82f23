"""A tiny training by two real processes, connected by `jax.distributed`, with two devices each.

python -m tests.two_processes WORKDIR --port 12345 --process_id 0 [--event kill]
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import lora_jax as lj
from experiments.harness.config import Distributed
from experiments.harness.launch import explained
from experiments.harness.machines import join
from lora_jax.data.batches import Batches, as_grain, packed_batches
from lora_jax.models.sharding import sharding_of
from lora_jax.placement import place
from lora_jax.training.checkpoint import restore_adapter, save_adapter
from lora_jax.training.loop import FitConfig, fit
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import local_rows, make_mesh, place_batch
from lora_jax.trees import leaves_with_path

from tests.paths import ROOT
from tests.tiny_training import ROW, examples, method, model

ROWS, STEPS, MICRO, EVENT_AT = 8, 7, 2, 5


def batches(rows: list[int] | None, seed: int | None) -> Batches:
  shape: dict[str, Any] = {"batch_size": ROWS, "row_length": ROW, "loss_length": 20}
  return packed_batches(examples(80), seed=seed, num_epochs=2, local_rows=rows, **shape)


def check_batches(mesh: Mesh) -> None:
  """Checks that a process places the rows of the whole batch that its devices hold."""
  for steps in (1, MICRO):
    whole = batches(None, 0)[0]
    part = batches(local_rows(mesh, ROWS, steps), 0)[0]
    for name, array in place_batch(mesh, part, steps).items():
      expected = (
        whole[name] if steps == 1 else whole[name].reshape(steps, -1, *whole[name].shape[1:])
      )
      assert array.shape == expected.shape
      for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


class Eventful:
  """An iterator of batches to which an event happens when it is asked for one of them."""

  def __init__(self, iterator: Any, event: str):
    self._iterator, self._event, self._count = iterator, event, 0

  def __next__(self) -> Any:
    self._count += 1
    if self._event == "kill" and self._count == EVENT_AT:
      os.kill(os.getpid(), signal.SIGKILL)
    if self._event == "error" and self._count == EVENT_AT:
      raise ValueError("an example that only this process reads is damaged")
    if self._event == "terminate" and self._count >= 2:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.5)  # the processes agree on a step about a second later
    if self._event == "terminate before a step":
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(3.0)  # they have agreed
      self._event = ""
    return next(self._iterator)

  def get_state(self) -> Any:
    return self._iterator.get_state()

  def set_state(self, state: Any) -> None:
    self._iterator.set_state(state)


def loss_and_params() -> tuple[lj.Adaptation, Any]:
  module, params = model(num_layers=1)
  return method("lora")(language_model_loss(module)), params


def arrays(workdir: Path) -> dict[str, np.ndarray]:
  """Returns the arrays of a run's adapter."""
  loss, params = loss_and_params()
  like = jax.eval_shape(loss.init, jax.random.key(2), params, batches(None, 0)[0])
  tree = restore_adapter(workdir / "adapter", like)
  return {path: np.asarray(leaf) for path, leaf in leaves_with_path(tree)}


def train(workdir: Path, mesh: Mesh, event: str = "") -> None:
  """Trains on a mesh of all processes' devices, and saves the adapter."""
  loss, params = loss_and_params()
  params = jax.tree.map(place, params, sharding_of(mesh)(params))
  data = batches(local_rows(mesh, ROWS), 0)
  valid: Any = batches(local_rows(mesh, ROWS), None)
  iterator: Any = iter(as_grain(data))
  fitted = fit(
    loss,
    params,
    loss.init(jax.random.key(2), params, data[0]),
    optax.adamw(jnp.nan if event == "nan" else 1e-2),
    Eventful(iterator, event),
    config=FitConfig(STEPS, 3, 2, 1, 1, 0.0),
    eval_loss=loss,
    eval_batches=lambda: [valid[0]],
    workdir=workdir,
    key=jax.random.key(0),
    mesh=mesh,
  )
  save_adapter(workdir / "adapter", fitted.last)


def free_port() -> int:
  with socket.socket() as server:
    server.bind(("localhost", 0))
    return server.getsockname()[1]


def environment(devices: int, cache: Path) -> dict[str, str]:
  """Returns the variables of a process with emulated devices, and its cache of programs."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def start(commands: list[list[str]], devices: int, cache: Path) -> list[subprocess.Popen[str]]:
  """Starts processes; their output is read by `finish`."""
  files: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  variables = environment(devices, cache)
  return [subprocess.Popen(c, cwd=ROOT, env=variables, **files) for c in commands]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
  """Waits for processes; returns their exit codes and outputs."""
  outputs = [process.communicate(timeout=600)[0] for process in processes]
  return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def run(workdir: Path, cache: Path, *events: str) -> list[tuple[int, str]]:
  """Trains with two processes, to which `events` happen; returns exit codes and outputs."""
  command = [sys.executable, "-m", "tests.two_processes", str(workdir), "--port", str(free_port())]
  pairs = enumerate(events or ("", ""))
  commands = [[*command, "--process_id", str(i), "--event", event] for i, event in pairs]
  return finish(start(commands, 2, cache))


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir", type=Path)
  parser.add_argument("--port", type=int, required=True)
  parser.add_argument("--process_id", type=int, required=True)
  events = ["", "kill", "error", "terminate", "terminate before a step", "nan"]
  parser.add_argument("--event", default="", choices=events)
  options = parser.parse_args()
  with explained():
    join(Distributed(f"localhost:{options.port}", 2, options.process_id))
    for sizes in ((4, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)):
      check_batches(make_mesh(*sizes))
    train(options.workdir, make_mesh(data=2, fsdp=2), options.event)
