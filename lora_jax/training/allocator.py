"""Keeps the C library's memory between steps on a CPU.

At each step XLA allocates its temporaries again, in blocks that glibc maps and unmaps, so that the
system fills every page with zeros. Measured on 2 cores with the step of `benchmarks/e2e_epoch.py`,
before and after:

    embedded base, 4.3 M parameters    208 -> 168 ms    641 -> 962 MB
    GPT-2 small's shape, 124 M         3.3 -> 3.1 s     3.1 -> 6.5 GB
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> bool:
  """Makes glibc keep freed memory for the next allocation, in one heap for all threads.

  Call it before JAX's first computation: running threads keep heaps of their own. The process keeps
  its peak memory, or up to twice that if it is fragmented. If the environment has any of glibc's
  `MALLOC_*` variables or tunables, nothing is changed; `MALLOC_ARENA_MAX=8`, for instance, opts
  out.

  Returns:
    Whether glibc keeps freed memory: False without glibc, or if the environment has settings.
  """
  configured = any(name.startswith("MALLOC_") for name in os.environ)
  configured = configured or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
  if sys.platform != "linux" or configured:
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:  # another C library
    return False
  no_limit = -1  # as an unsigned number, the largest
  settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, no_limit), (M_ARENA_MAX, 1))
  return all(mallopt(*setting) == 1 for setting in settings)
