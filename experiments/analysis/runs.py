"""Does runs of an experiment one after another, each in its folder."""

import contextlib
import io
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.comparison.runs import FAILED
from experiments.configs import Config
from experiments.harness.workdir import write_json


def do_runs(configs: Iterable[Config], run: Callable[[Config], Mapping[str, Any]]) -> list[str]:
  """Does the runs that are not finished; returns the folders of those that could not be done.

  A run whose training is not finite has failed: that is a result, and it is not repeated.

  Args:
    configs: of the runs, each with its workdir.
    run: such as `experiments.gpt2_e2e.run`, which resumes an interrupted run and repeats no
      finished one.
  """
  broken = []
  for config in configs:
    print(config.workdir, flush=True)
    if has_failed(config.workdir):
      print("  failed before", flush=True)
      continue
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        result = run(config)
      print(f"  loss {result['valid_loss']:.4f} nats/token", flush=True)
    except FloatingPointError as error:
      write_json(Path(config.workdir) / FAILED, {"reason": str(error)})
      print(f"  failed: {error}", flush=True)
    except Exception:  # the others are still worth doing
      broken.append(config.workdir)
      print(f"  {traceback.format_exc()}", flush=True)
  return broken


def has_failed(folder: str | Path) -> bool:
  """Tells whether a run's training was not finite."""
  return (Path(folder) / FAILED).exists()
