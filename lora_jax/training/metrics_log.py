"""What a run reports while it trains: `metrics.jsonl`, TensorBoard and a progress line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
  """Writes metrics to `metrics.jsonl` and TensorBoard files of a folder.

  A run that goes on from step N first drops what was written after N.
  """

  def __init__(self, folder: str | Path, first_step: int = 0):
    from tensorboardX import SummaryWriter

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self.path = folder / "metrics.jsonl"
    kept = [line for line in read_metrics(self.path) if line["step"] <= first_step]
    new = self.path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
    os.replace(new, self.path)
    self._file = self.path.open("a", encoding="utf-8")
    self._writer = SummaryWriter(
      str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None
    )

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()
    self._writer.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line; a name like `valid/loss` is a group and a metric."""
    line = {"step": step, **{name: float(value) for name, value in metrics.items()}}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in metrics.items():
      if math.isfinite(value):
        self._writer.add_scalar(name, value, step)


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
