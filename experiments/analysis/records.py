"""Planned measurements, and their results as JSON lines: one is appended when it is finished.

A line has the measure, the arm and the settings, by which a finished measurement is recognized; the
result; and where it comes from: seed, command, commit, device, JAX's version, seconds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.configs.mechanism import SEED
from experiments.harness.workdir import provenance

MEASURES = ("sharpness", "intruders", "capacity")
Record = dict[str, Any]


class Planned(NamedTuple):
  """A measurement: one of `MEASURES` of an arm. The settings are JSON values."""

  measure: str
  arm: str
  settings: Mapping[str, Any]

  @property
  def name(self) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
    return f"{self.measure} of {self.arm} ({settings})"

  def claim(self, path: Path) -> Path:
    """Returns the folder that a process claims while it measures for a file of records."""
    digest = hashlib.sha256(self.name.encode()).hexdigest()[:16]
    return path.parent / ".claims" / digest

  def find(self, records: Iterable[Record]) -> Record | None:
    """Returns its record, if it is finished."""
    wanted = (self.measure, self.arm, dict(self.settings))
    for record in records:
      if (record["measure"], record["arm"], record["settings"]) == wanted:
        return record
    return None


def carry_out(
  planned: Planned, measure: Callable[[Planned], Mapping[str, Any]], command: str, path: Path
) -> Record:
  """Measures, and appends the record to a file of JSON lines.

  A measurement that ends in numbers that are not finite has failed: that is a result, too.

  Args:
    planned: what to measure.
    measure: returns the result's fields.
    command: the command that repeats it.
    path: the file.
  """
  begin = time.perf_counter()
  try:
    result = {"status": "finished", **measure(planned)}
  except FloatingPointError as error:
    result = {"status": "failed", "reason": str(error)}
  record = {
    **planned._asdict(),
    **result,
    "seed": SEED,
    "command": command,
    "seconds": round(time.perf_counter() - begin, 1),
    **provenance(),
  }
  line = json.dumps(record, allow_nan=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a", encoding="utf-8") as file:
    file.write(f"{line}\n")
  return json.loads(line)


def read_records(path: Path) -> list[Record]:
  """Returns the records of a file of JSON lines; none if there is no file.

  Raises:
    ValueError: if a line is not a record, naming it.
  """
  records = []
  lines = path.read_text("utf-8").splitlines() if path.exists() else []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ValueError(
        f"{path}:{number}: {error}. Remove the line: its measurement is then repeated"
      ) from error
    if not isinstance(record, dict) or not {"arm", "settings", "status"} <= record.keys():
      raise ValueError(f"{path}:{number}: expected a measurement's record, got {line[:60]!r}")
    if record.get("measure") not in MEASURES:
      raise ValueError(
        f"{path}:{number}: measure must be one of {', '.join(MEASURES)}, got "
        f"{record.get('measure')!r}"
      )
    records.append(record)
  return records
