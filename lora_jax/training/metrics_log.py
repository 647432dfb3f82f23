"""What a run writes down while it trains: `metrics.jsonl` and TensorBoard files."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class MetricsLog:
  """Writes metrics to `metrics.jsonl` and TensorBoard files of a folder.

  A run that goes on from step N first drops what was written after N. Without the package
  tensorboardX there are no TensorBoard files, and a warning says so.
  """

  def __init__(self, folder: str | Path, first_step: int = 0):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self.path = folder / "metrics.jsonl"
    lines = [line for line in read_metrics(self.path) if line["step"] <= first_step]
    rewritten = self.path.with_suffix(".new")
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    os.replace(rewritten, self.path)
    self._file = self.path.open("a", encoding="utf-8")
    self._writer = _tensorboard(folder / "tensorboard", first_step)

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()
    if self._writer is not None:
      self._writer.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line; a name like `valid/loss` is a group and a metric."""
    line = {"step": step, **{name: float(value) for name, value in metrics.items()}}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    if self._writer is not None:
      for name, value in metrics.items():
        self._writer.add_scalar(name, value, step)


def _tensorboard(folder: Path, first_step: int) -> Any:
  """Returns a writer of TensorBoard files, None without tensorboardX."""
  try:
    from tensorboardX import SummaryWriter
  except ModuleNotFoundError:
    logger.warning("tensorboardX is not installed: there will be no TensorBoard files")
    return None
  return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
  """Returns the lines of a `metrics.jsonl`; a last line that was cut off is left out."""
  path = Path(path)
  if not path.is_file():
    return []
  lines = path.read_text("utf-8").splitlines()
  read = []
  for number, line in enumerate(lines, 1):
    try:
      read.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number < len(lines):
        raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:80]!r}") from error
  return read
