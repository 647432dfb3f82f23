"""Finished runs, read from their folders for reports."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.harness.config import flat
from experiments.harness.methods import Method, find_method
from experiments.harness.workdir import read_result, stored_config


class Run(NamedTuple):
  """A finished run.

  Attributes:
    folder: the run's folder.
    settings: the fields of its config by dotted name.
    result: the content of its `result.json`.
  """

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
    return self.result.get("valid_loss") if name == "valid_loss" else self._scores().get(name)

  def interval(self, name: str) -> tuple[float, float] | None:
    """Returns a score's confidence interval over the inputs; None if the run has none."""
    interval = self.result.get("intervals", {}).get(name)
    return None if interval is None else (interval[0], interval[1])

  @property
  def is_decoded(self) -> bool:
    return bool(self._scores())

  def _scores(self) -> dict[str, Any]:
    return self.result.get("scores", {})


def read_runs(folders: Sequence[str | Path]) -> tuple[list[Run], str]:
  """Returns the finished runs among folders, and a sentence that names the unfinished ones.

  Raises:
    FileNotFoundError: if a folder is not the folder of a run.
    ValueError: if none of the runs is finished, or a result is damaged or has an unknown method.
  """
  runs, unfinished = [], []
  for folder in folders:
    settings, result = flat(stored_config(folder)), read_result(folder)
    if result is None:
      unfinished.append(f"`{folder}`")
      continue
    missing = [name for name in ("seed", "method") if name not in result]
    if missing:
      raise ValueError(
        f"{folder}/result.json lacks {', '.join(missing)}: it is not a result of a run. Remove it "
        "and rerun the command: training is not repeated"
      )
    runs.append(Run(Path(folder), settings, result))
    try:
      find_method(str(result["method"]))
    except ValueError as error:
      raise ValueError(f"{folder}: {error}") from error
  if not runs:
    raise ValueError(f"none of the {len(folders)} runs is finished; there is nothing to report")
  return runs, f"Not finished: {', '.join(unfinished)}." if unfinished else ""


def joined_values(runs: Iterable[Run], name: str) -> str:
  """Returns the distinct values of a field of the results, joined by commas."""
  return ", ".join(sorted({str(run.result[name]) for run in runs if run.result.get(name)}))
