"""A run's folder: it belongs to one config, and is open to one process at a time.

config.json      the run's config             checkpoints/    by Orbax, never the base
model.json       the base's configuration     adapter/        the trained tree only
examples.json    the digest of the examples   peft/, base/    it or the model, for others
metrics.jsonl    losses by step               predictions.txt one text for each input
tensorboard/     the same                     model/          the model, fully trained
                                              result.json     written last: the run is finished
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.harness.config import Config, RunConfig, flat, read_config, with_pattern

EXPORTS = ("adapter", "adapter_frozen", "peft", "base", "model")


@contextlib.contextmanager
def open_workdir(config: RunConfig) -> Iterator[Path]:
  """Makes or reopens a run's folder, and locks it for this process.

  Raises:
    RuntimeError: if another process works there.
    ValueError: if it belongs to a run with another config, naming the fields.
  """
  folder = Path(config.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".lock").open("a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise RuntimeError(
        f"{folder} is in use by another process. Wait for it, or give another --config.workdir"
      ) from None
    stored = read_run(type(config), config.workdir) if has_trained(folder) else config
    if stored != config:
      raise ValueError(
        f"{folder} belongs to a run with another config: {_differences(stored, config)}. "
        "Give another --config.workdir, or remove the folder"
      )
    values = dataclasses.asdict(config)
    del values["workdir"]  # the folder may be moved
    write_json(folder / "config.json", values)
    yield folder


def run_once(config: RunConfig, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
  """Returns a run's stored result; if there is none, makes and stores it.

  Args:
    config: the run's config; `config.workdir` is the folder.
    make: a function from the run's folder to the result.
  Raises:
    RuntimeError, ValueError: as `open_workdir`.
  """
  with open_workdir(config) as workdir:
    result = read_result(workdir)
    if result is not None:
      print(f"{workdir} is finished; this is its result. Remove it to run it again.\n")
      return result
    result = make(workdir)
    write_json(workdir / "result.json", result)
    return result


def check_same(path: Path, value: Any, label: str) -> None:
  """Writes a JSON file about a run's inputs; once the run has trained, compares them.

  Raises:
    ValueError: if they have changed since.
  """
  trained = has_trained(path.parent) and path.exists()
  previous = json.loads(path.read_text("utf-8")) if trained else value
  if previous != value:
    raise ValueError(
      f"{path.parent} was started with other {label} ({previous}, now {value}): it has changed "
      "since. Restore it, or give another --config.workdir"
    )
  write_json(path, value)


def has_trained(folder: Path) -> bool:
  """Returns whether a folder holds anything that a run has trained."""
  return any((folder / name).exists() for name in ("checkpoints", "result.json", *EXPORTS))


def check_model(workdir: Path, config: Any) -> None:
  """Raises ValueError if a run that has trained would resume with another model config."""
  check_same(workdir / "model.json", str(config), "model, by its config.json")


def check_examples(workdir: Path, digest: str) -> None:
  """Raises ValueError if a run that has trained would resume with other examples."""
  check_same(workdir / "examples.json", digest, "examples, by its data or its tokenizer")


def examples_digest(*parts: Iterable[tuple[Any, ...]]) -> str:
  """Returns the SHA-256 of encoded examples, whose fields are arrays or numbers."""
  digest = hashlib.sha256()
  for part in parts:
    for example in part:
      for field in map(np.asarray, example):
        digest.update(f"{field.dtype} {field.shape} ".encode() + field.tobytes())
    digest.update(b"end")
  return digest.hexdigest()


def file_digest(path: str | Path) -> str:
  """Returns the SHA-256 of a file, in hexadecimal."""
  with Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(f".{path.name}.new")
  temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
  os.replace(temporary, path)


def read_result(folder: str | Path) -> dict[str, Any] | None:
  """Returns a run's result; None if the run is not finished."""
  path = Path(folder) / "result.json"
  return json.loads(path.read_text("utf-8")) if path.is_file() else None


def read_finished(folder: str | Path) -> dict[str, Any]:
  """Returns a run's result; raises ValueError if the run is not finished."""
  result = read_result(folder)
  if result is None:
    raise ValueError(f"{folder} is not finished: rerun its command, which resumes it")
  return result


def stored_config(folder: str | Path) -> dict[str, Any]:
  """Returns a run's stored config; raises FileNotFoundError if the folder is not a run's."""
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{folder} is not the folder of a run: {path} does not exist")
  return {**with_pattern(json.loads(path.read_text("utf-8"))), "workdir": str(folder)}


def read_run(kind: type[Config], folder: str | Path) -> Config:
  """Returns the config of a run.

  Raises:
    FileNotFoundError: if the folder is not a run's.
    ValueError: if the run is of another experiment, or its config cannot be read.
  """
  stored = stored_config(folder)
  if stored.get("experiment") != kind.NAME:
    raise ValueError(
      f"{folder} is a run of {stored.get('experiment')!r}, expected a run of {kind.NAME!r}"
    )
  try:
    return read_config(kind, stored)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error


def provenance() -> dict[str, str]:
  """Returns the devices, the version of JAX and the code's commit, for a result."""
  device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  return {"device": device, "jax": jax.__version__, "commit": commit()}


def commit() -> str:
  """Returns the commit that the code is at, with `+` if files differ from it; "" if unknown."""
  here = Path(__file__).parent

  def git(*args: str) -> str:
    return subprocess.run(
      ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
  except (OSError, subprocess.CalledProcessError):
    return ""


def _differences(stored: RunConfig, config: RunConfig) -> str:
  before, now = flat(dataclasses.asdict(stored)), flat(dataclasses.asdict(config))
  names = [name for name in sorted(now) if before[name] != now[name]]
  return ", ".join(f"{name}={before[name]!r} there, {now[name]!r} now" for name in names[:8])
