"""The C library's memory, kept between the steps of a CPU.

XLA on CPUs allocates a step's temporaries anew each time, in blocks that glibc maps and unmaps:
the system then fills every page with zeros again. Measured on 2 cores, with the step of
`benchmarks/e2e_epoch.py` and glibc's settings before and after:

    embedded base, 4.3 M parameters    208 -> 168 ms    641 -> 962 MB
    GPT-2 small's shape, 124 M         3.3 -> 3.1 s     3.1 -> 6.5 GB
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> bool:
  """Makes glibc keep what is freed for the next allocation, in one heap for all threads.

  Call it before JAX's first computation: threads that run already keep heaps of their own. The
  process holds on to the most memory that it ever had, and up to twice that, where blocks of
  several sizes lie between one another. Where the environment has any of glibc's `MALLOC_*`
  variables or tunables, they apply and nothing is changed; `MALLOC_ARENA_MAX=8`, for instance,
  opts out.

  Returns:
    Whether glibc now keeps it: False without glibc, or if the environment has settings.
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
