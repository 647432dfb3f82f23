"""A run's folder: it belongs to one config, and one process at a time may write to it.

Of several processes that do a run together, that is process 0.

config.json      the run's config             checkpoints/    train states; no base weights
model.json       the base model's config      adapter/        the trainable tree
examples.json    the digest of the examples   peft/, base/    exports for other packages
metrics.jsonl    losses by step               model/          the fully trained model
tensorboard/     the same, for TensorBoard    predictions.txt one text for each input
ranks.json       ranks chosen from data       result.json     written last: the run is finished
concurrent.json  its training with others     adapter_initial/ the start, of LoftQ or from data
stopped.json     why a sweep has stopped it   losses.json     losses by input, of `report --losses`
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.harness.config import Config, RunConfig, flat, read_config, with_pattern
from experiments.harness.interrupt import saved_steps, working_in
from lora_jax.files import local_path, make_folder, parse_json, read_json, read_text
from lora_jax.training.processes import from_first, is_first, wait_for_all

EXPORTS = ("adapter", "adapter_frozen", "peft", "base", "model")
OF_TRAINING = ("train_seconds", "train_tokens")  # fields of a result that outlive its repetition
TRAINED_TOGETHER, STOPPED = "concurrent.json", "stopped.json"
LOSSES = "losses.json"  # of comparison/verdicts.py
FULL_DISK = ("No space left on device", "File too large", "Disk quota exceeded")


@contextlib.contextmanager
def open_workdir(config: RunConfig) -> Iterator[Path]:
  """Makes or reopens a run's folder, and locks it for this process.

  What a killed process left of a file or folder is removed.

  Raises:
    RuntimeError: if another process works there.
    ValueError: if it is not a local folder, or belongs to a run with another config, naming the
      fields. Sections that follow training may differ.
    OSError: if the disk is full, naming what is saved.
  """
  folder = make_folder(config.workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_explained_full_disk(folder))
    if is_first():
      _take(folder, config, stack)
    wait_for_all()
    stack.enter_context(working_in(folder))
    yield folder
    wait_for_all()


def _take(folder: Path, config: RunConfig, stack: contextlib.ExitStack) -> None:
  """Locks a folder until the stack is closed, checks that it is the config's, and prepares it."""
  lock = stack.enter_context((folder / ".lock").open("a"))
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise RuntimeError(
      f"{folder} is in use by another process. Wait for it, or give another --config.workdir"
    ) from None
  stored = read_run(type(config), config.workdir) if has_trained(folder) else config
  if differences := _differences(_trained_by(stored), _trained_by(config)):
    raise ValueError(
      f"{folder} belongs to a run with another config: {differences}. "
      "Give another --config.workdir, or remove the folder"
    )
  _remove_temporaries(folder)
  if read_result(folder) is None:  # else the stored config is that of the result
    write_json(folder / "config.json", config.to_json())


def run_once(config: RunConfig, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
  """Returns a run's stored result; if there is none, makes and stores it.

  If only what follows training has changed in the config, the result is made again from the
  checkpoints. The result of a finished run needs no permission to write.

  Args:
    config: the run's config; `config.workdir` is the folder.
    make: a function from the run's folder to the result.
  Raises:
    RuntimeError, ValueError, OSError: as `open_workdir`.
  """
  folder = local_path(config.workdir)
  result = from_first(lambda: _finished_result(config))
  if result is not None:
    print(f"{folder} is finished; this is its result. Remove it to run it again.\n")
    return result
  with open_workdir(config) as workdir:
    previous = from_first(lambda: _previous_result(config))
    result = make(workdir) | {name: previous[name] for name in OF_TRAINING if name in previous}
    if is_first():
      write_json(workdir / "result.json", result)
      write_json(workdir / "config.json", config.to_json())
    return result


def _finished_result(config: RunConfig) -> dict[str, Any] | None:
  """Returns a run's result, if it is of this config."""
  result = read_result(config.workdir)
  if result is None:
    return None
  stored = read_run(type(config), config.workdir)
  return result if _settings(stored) == _settings(config) else None


def _previous_result(config: RunConfig) -> dict[str, Any]:
  """Returns a run's result, of which what follows training is repeated; empty if it has none."""
  folder = local_path(config.workdir)
  previous = read_result(folder) or {}
  if previous:
    _check_repeatable(folder)
    stored = read_run(type(config), config.workdir)
    changed = _differences(*map(dataclasses.asdict, (stored, config)))
    print(f"{folder} is trained; what follows is repeated: {changed}", flush=True)
  return previous


def _trained_by(config: RunConfig) -> dict[str, Any]:
  """Returns the part of a config that training depends on, other than in its rounding."""
  sections = _settings(config)
  return {name: value for name, value in sections.items() if name not in config.AFTER_TRAINING}


def _settings(config: RunConfig) -> dict[str, Any]:
  """Returns a config without what may differ when a run is resumed on other machines."""
  sections = dataclasses.asdict(config)
  return {name: value for name, value in sections.items() if name not in config.MACHINES}


def _check_repeatable(folder: Path) -> None:
  """Raises ValueError if what follows training cannot be repeated, as the checkpoints are gone."""
  checkpoints = folder / "checkpoints"
  if (folder / "metrics.jsonl").exists() and not any(checkpoints.glob("*[0-9]")):
    raise ValueError(
      f"{folder} is finished, and what follows its training cannot be repeated without "
      f"{checkpoints}, which is gone. Restore it, or give another --config.workdir"
    )


def _remove_temporaries(folder: Path) -> None:
  """Removes what killed processes left of the files and folders that are written as a whole."""
  patterns = (".*.new", "*.orbax-checkpoint-tmp*", *(f".{name}-*" for name in EXPORTS))
  for path in (path for pattern in patterns for path in folder.glob(pattern)):
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()


@contextlib.contextmanager
def _explained_full_disk(folder: Path) -> Iterator[None]:
  """Ends a run on a full disk with one line: which file could not be written, what is saved."""
  try:
    yield
  except Exception as error:
    reason = full_disk(error)
    if not reason or "Make room" in str(error):
      raise
    path = getattr(error, "filename", None) or f"a file in {folder}"
    fault = f"{path} could not be written ({reason})"
    if "could not be written" in str(error):  # it names the path already
      fault = str(error).partition(". ")[0]
    raise OSError(
      f"{fault}; {saved_steps(folder)}. Make room, then rerun the same command: it resumes"
    ) from error


def full_disk(error: Exception) -> str:
  """Returns the system's words for a full disk or quota in an error of any library, or ""."""
  return next((text for text in FULL_DISK if text in str(error)), "")


def check_same(path: Path, value: Any, label: str) -> None:
  """Writes a JSON file about a run's inputs; once the run has trained, compares them.

  Raises:
    ValueError: if they have changed since, or the file cannot be read.
  """
  if not is_first():
    return
  if not (has_trained(path.parent) and path.exists()):
    write_json(path, value)
    return
  with _repairable(f"Restore it, or remove it if the {label} are certainly the same"):
    previous = parse_json(read_text(path), path)
  if previous != value:
    raise ValueError(
      f"{path.parent} was started with other {label} ({previous}, now {value}): it has changed "
      "since. Restore it, or give another --config.workdir"
    )


@contextlib.contextmanager
def _repairable(advice: str) -> Iterator[None]:
  """Adds advice to the message of a run's file that cannot be read."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{error}. {advice}") from error


def has_trained(folder: Path) -> bool:
  """Returns whether a folder has checkpoints, a result or an export."""
  return any((folder / name).exists() for name in ("checkpoints", "result.json", *EXPORTS))


def check_model(workdir: Path, config: Any) -> None:
  """Raises ValueError if a run would resume with another model config."""
  check_same(workdir / "model.json", str(config), "model, by its config.json")


def check_examples(workdir: Path, digest: str) -> None:
  """Raises ValueError if a run would resume with other examples."""
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
  try:
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise OSError(error.errno, error.strerror, str(path)) from error


def read_result(folder: str | Path) -> dict[str, Any] | None:
  """Returns a run's result; None if the run is not finished.

  Raises:
    ValueError: if the file is damaged.
  """
  path = local_path(folder) / "result.json"
  if not path.exists():
    return None
  with _repairable("Remove it and rerun the command: training is not repeated"):
    return read_json(path)


def trained_together(folder: Path) -> dict[str, Any]:
  """Returns the fields of a result about training in a concurrent sweep, if that is how it was."""
  path = folder / TRAINED_TOGETHER
  return read_json(path) if path.exists() else {}


def stopped_early(folder: str | Path) -> str:
  """Returns why a concurrent sweep has stopped a run that is not finished; "" if it has not."""
  path = local_path(folder) / STOPPED
  return read_json(path)["reason"] if path.exists() and read_result(folder) is None else ""


def read_finished(folder: str | Path) -> dict[str, Any]:
  """Returns a run's result; raises ValueError if the run is not finished."""
  result = read_result(folder)
  if result is None:
    raise ValueError(f"{folder} is not finished: rerun its command, which resumes it")
  return result


def stored_config(folder: str | Path) -> dict[str, Any]:
  """Returns a run's stored config.

  Raises:
    FileNotFoundError: if the folder is not a run's.
    ValueError: if the file is damaged.
  """
  path = local_path(folder) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{folder} is not the folder of a run: {path} does not exist")
  with _repairable("Restore it: without it the run cannot be read"):
    return {**with_pattern(read_json(path)), "workdir": str(folder)}


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
  """Returns the devices, JAX's version and the code's commit, for `result.json`."""
  device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  return {"device": device, "jax": jax.__version__, "commit": commit()}


def commit() -> str:
  """Returns the code's commit, with `+` if files differ from it; "" if unknown."""
  here = Path(__file__).parent

  def git(*args: str) -> str:
    return subprocess.run(
      ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
  except (OSError, subprocess.CalledProcessError):
    return ""


def _differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  before, now = flat(stored), flat(config)
  names = [name for name in sorted(now) if before[name] != now[name]]
  return ", ".join(f"{name}={before[name]!r} there, {now[name]!r} now" for name in names[:8])
