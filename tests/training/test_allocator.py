"""`lora_jax.training.allocator`: a step reuses the pages of the step before it."""

import ctypes
import os
import subprocess
import sys

import pytest

from lora_jax.training.allocator import keep_freed_memory

FAULTS = """
import resource, sys
from lora_jax.training.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "kept" else False
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # 64 MB of temporaries
  y = jnp.sin(x[:, None] * jnp.arange(4096.0))
  return jax.lax.optimization_barrier(y).sum()

x = jnp.ones(4096)
for _ in range(10):
  step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
  step(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(mode: str) -> tuple[str, int]:
  prefixes = ("MALLOC_", "XLA_")
  environment = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
  command = [sys.executable, "-c", FAULTS, mode]
  run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  kept, faults = run.stdout.split()
  return kept, int(faults)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_memory_of_a_step_is_kept_for_the_next():
  pages = 30 * 4096 * 4096 * 4 // os.sysconf("SC_PAGE_SIZE")
  kept, faults = _run("kept")
  assert kept == "True"
  assert faults < pages / 4  # the heap may grow by some steps more before it is large enough
  kept, faults = _run("given back")
  assert kept == "False"
  assert faults > pages / 2


@pytest.mark.parametrize(
  ("name", "value"),
  [("MALLOC_ARENA_MAX", "8"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=8")],
)
def test_settings_of_the_environment_are_respected(name, value, monkeypatch):
  monkeypatch.setenv(name, value)
  monkeypatch.setattr(ctypes, "CDLL", None)  # nothing is called
  assert not keep_freed_memory()
