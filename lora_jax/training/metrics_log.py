"""The metrics of a run: `metrics.jsonl` and TensorBoard files."""

import contextlib
import io
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lora_jax.files import make_folder, parse_json, read_bytes
from lora_jax.training.processes import is_first

logger = logging.getLogger(__name__)


class Log(Protocol):
  """The part of a log that training uses."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None: ...


class NoLog:
  """Writes nothing: process 0 has the log."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    pass


def open_log(folder: str | Path, first_step: int) -> contextlib.AbstractContextManager[Log]:
  """Returns the log of a folder, as `MetricsLog`; of several processes only the first has one."""
  return MetricsLog(folder, first_step) if is_first() else contextlib.nullcontext(NoLog())


class MetricsLog:
  """Writes metrics to `metrics.jsonl` and TensorBoard files of a folder.

  A run that resumes from step N first drops the lines after N. Without the package tensorboardX
  there are no TensorBoard files, and a warning says so.
  """

  def __init__(self, folder: str | Path, first_step: int = 0):
    folder = make_folder(folder)
    self.path = folder / "metrics.jsonl"
    lines = [line for line in read_metrics(self.path) if line["step"] <= first_step]
    rewritten = self.path.with_suffix(".new")
    try:
      rewritten.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    except OSError as error:
      raise _not_written(self.path, error) from error
    os.replace(rewritten, self.path)
    self._file = self.path.open("ab", buffering=0)  # nothing is left to write when it is closed
    self._events = _Events.open(folder / "tensorboard", first_step)

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()
    if self._events is not None:
      self._events.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line; a name such as `valid/loss` is a group and a metric.

    Raises:
      OSError: if it cannot be written, as on a full disk; checkpoints are not touched.
    """
    line = {"step": step, **{name: float(value) for name, value in metrics.items()}}
    _append(self._file, self.path, (json.dumps(line) + "\n").encode())
    if self._events is not None:
      self._events.write(step, metrics)


class _Events:
  """A TensorBoard file, written at once: an interrupted process loses nothing."""

  def __init__(self, folder: Path, first_step: int):
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{first_step}"
    self._path = make_folder(folder) / name
    self._file = self._path.open("ab", buffering=0)
    self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
    if first_step:  # hides what an interrupted session wrote after it
      start = SessionLog(status=SessionLog.START)
      self._append(Event(step=first_step + 1, wall_time=time.time(), session_log=start))

  @classmethod
  def open(cls, folder: Path, first_step: int) -> "_Events | None":
    """Returns a new file in a folder, None without tensorboardX."""
    try:
      import tensorboardX  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError:
      logger.warning("tensorboardX is not installed: there will be no TensorBoard files")
      return None
    return cls(folder, first_step)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
    from tensorboardX.summary import scalar

    for name, value in metrics.items():
      self._append(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))

  def close(self) -> None:
    self._file.close()

  def _append(self, event: Any) -> None:
    """Appends a TFRecord: the length, its checksum, the data, their checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    _append(self._file, self._path, length + checksums[0] + data + checksums[1])


def _append(file: io.FileIO, path: Path, data: bytes) -> None:
  try:
    while data:  # an almost full disk takes a part
      data = data[file.write(data) :]
  except OSError as error:
    raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> OSError:
  return OSError(
    f"{path} could not be written ({error.strerror}). The run's checkpoints are untouched. Make "
    "room, then rerun the same command: it resumes from the last one",
  )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
  """Returns the lines of a `metrics.jsonl`; a truncated last line is left out.

  Raises:
    ValueError: if another line is not a JSON object with a step, naming it.
  """
  path = Path(path)
  if not path.exists():
    return []
  lines = read_bytes(path).splitlines()
  read = []
  for number, line in enumerate(lines, 1):
    where = f"{path}:{number}"
    try:
      value = parse_json(line, where)
    except ValueError:
      if number == len(lines):  # written by a process that was killed
        break
      raise ValueError(_wrong_line(where, line)) from None
    if not isinstance(value, dict) or type(value.get("step")) is not int:
      raise ValueError(_wrong_line(where, line))
    read.append(value)
  return read


def _wrong_line(where: str, line: bytes) -> str:
  shown = line[:80].decode("utf-8", "replace")
  return (
    f"{where}: expected a JSON object with a step, got {shown!r}. Remove this line, or restore the "
    "file; a run resumes without it, but reports lack its losses"
  )
