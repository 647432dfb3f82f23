"""Finished runs, as reports read them from their folders."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.harness.config import flat
from experiments.harness.methods import Method, find_method
from experiments.harness.workdir import read_result, stored_config


class Run(NamedTuple):
  """A finished run: its folder, its config's fields by dotted name, its result."""

  folder: Path
  settings: dict[str, Any]
  result: dict[str, Any]

  @property
  def seed(self) -> int:
    return self.result["seed"]

  @property
  def method(self) -> Method:
    return find_method(self.result["method"])

  def value(self, name: str) -> float | None:
    """Returns the validation loss or a score; None if the run has none."""
    return self.result["valid_loss"] if name == "valid_loss" else self._scores().get(name)

  def interval(self, name: str) -> tuple[float, float] | None:
    """Returns a score's interval over the inputs; None if the run has none."""
    interval = self.result.get("intervals", {}).get(name)
    return None if interval is None else (interval[0], interval[1])

  @property
  def is_decoded(self) -> bool:
    return bool(self._scores())

  def _scores(self) -> dict[str, Any]:
    return self.result.get("scores", {})


def read_runs(folders: Sequence[str | Path]) -> tuple[list[Run], str]:
  """Returns the finished runs among folders, and a sentence that names the others.

  Raises:
    FileNotFoundError: if a folder is not the folder of a run.
    ValueError: if none of the runs is finished, or one has an unknown method.
  """
  runs, others = [], []
  for folder in map(Path, folders):
    settings, result = flat(stored_config(folder)), read_result(folder)
    if result is None:
      others.append(f"`{folder}`")
    else:
      runs.append(Run(folder, settings, result))
      try:
        find_method(str(result.get("method")))
      except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
  if not runs:
    raise ValueError(f"none of the {len(folders)} runs is finished; there is nothing to report")
  return runs, f"Not finished: {', '.join(others)}." if others else ""


def joined_values(runs: Iterable[Run], name: str) -> str:
  """Returns the different values that some runs' results have, as a list in a sentence."""
  return ", ".join(sorted({str(run.result[name]) for run in runs if run.result.get(name)}))
