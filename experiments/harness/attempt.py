"""Attempts a run of a plan: one that cannot be done must not keep the others from being done."""

import contextlib
import io
import traceback
from collections.abc import Callable
from pathlib import Path

from experiments.harness.workdir import write_json

FAILED = "failed.json"
"""In a run's folder, instead of result.json: why its training was not finite."""


def attempt(folder: str | Path, run: Callable[[], str]) -> bool:
  """Does a run and prints the line that it returns; returns whether it could be done.

  A run whose training is not finite has failed: that is a result, and is written into its folder.
  Of any other error the traceback is printed.

  Args:
    folder: of the run.
    run: does it; what it prints is left out.
  """
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      line = run()
    print(f"  {line}", flush=True)
  except FloatingPointError as error:
    write_json(Path(folder) / FAILED, {"reason": str(error)})
    print(f"  failed: {error}", flush=True)
  except Exception:
    print(f"  {traceback.format_exc()}", flush=True)
    return False
  return True


def has_failed(folder: str | Path) -> bool:
  """Tells whether a run's training was not finite."""
  return (Path(folder) / FAILED).exists()
