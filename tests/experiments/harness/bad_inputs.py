"""A run's own files and folders, damaged or of the wrong kind."""

import json
import os
from pathlib import Path
from typing import Any

from experiments.classification.config import GlueConfig
from experiments.configs.glue import get_config
from experiments.glue import _scores
from experiments.harness.config import read_config, replace_fields
from experiments.harness.restore import check_base
from experiments.harness.runs import read_runs
from experiments.harness.workdir import (
  check_same,
  open_workdir,
  read_finished,
  read_result,
  read_run,
  stored_config,
)
from experiments.nlg.config import E2EConfig, TemplateConfig

from tests.bad_inputs import BadInput

DAMAGE: dict[str, tuple[bytes, tuple[str, ...]]] = {
  "empty": (b"", ("is not JSON",)),
  "cut": (b'{"experiment": "gpt2_', ("is not JSON",)),
  "a list": (b"[1, 2]", ("expected a JSON object, got list",)),
  "a string": (b'"text"', ("expected a JSON object, got str",)),
  "null": (b"null", ("expected a JSON object, got NoneType",)),
  "zeros": (bytes(64), ("is not JSON",)),
  "binary": (bytes(range(128, 256)), ("is not text in UTF-8",)),
  "nested deeply": (b"[" * 100_000, ("nested too deeply",)),
  "a huge integer": (b'{"seed": ' + b"1" * 10_000 + b"}", ("an integer of 10000 digits",)),
  "a key twice": (b'{"seed": 1, "seed": 2}', ("'seed' occurs twice",)),
}
REMEDIES = {
  "result.json": (read_result, "training is not repeated"),
  "config.json": (stored_config, "without it the run cannot be read"),
}


def of_file(name: str, content: bytes, read: Any) -> Any:
  def call(folder: Path) -> None:
    (folder / name).write_bytes(content)
    read(folder)

  return call


def of_inputs(content: bytes) -> Any:
  def call(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    (folder / "examples.json").write_bytes(content)
    check_same(folder / "examples.json", "digest", "examples")

  return call


def opened(workdir: str | Path) -> None:
  with open_workdir(TemplateConfig(workdir=str(workdir))):
    pass


def on_a_file(folder: Path) -> None:
  (folder / "run").write_text("")
  opened(folder / "run")


def through_a_file(folder: Path) -> None:
  (folder / "run").write_text("")
  opened(folder / "run" / "first")


def on_a_fifo(folder: Path) -> None:
  os.mkfifo(folder / "run")
  opened(folder / "run")


def on_a_broken_link(folder: Path) -> None:
  (folder / "run").symlink_to(folder / "nothing")
  opened(folder / "run")


def of_result(result: dict[str, Any], read: Any) -> Any:
  def call(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"experiment": "e2e_template"}))
    (folder / "result.json").write_text(json.dumps(result))
    read(folder)

  return call


def folder_as(name: str, read: Any) -> Any:
  def call(folder: Path) -> None:
    (folder / name).mkdir()
    read(folder)

  return call


def lost_log(folder: Path) -> None:
  config = replace_fields(read_config(GlueConfig, get_config()), {"workdir": str(folder)})
  _scores(config, 2, 4)


ROWS = [
  BadInput("a log without the best step", lost_log, ("metrics.jsonl", "evaluation of step 2")),
  *(
    BadInput(f"{name}: {kind}", of_file(name, content, read), (name, remedy, *words))
    for name, (read, remedy) in REMEDIES.items()
    for kind, (content, words) in DAMAGE.items()
  ),
  *(
    BadInput(f"examples.json: {kind}", of_inputs(DAMAGE[kind][0]), ("examples.json", "Restore it"))
    for kind in ("empty", "cut", "zeros", "binary", "nested deeply")
  ),
  BadInput("examples.json: of another type", of_inputs(b"[1]"), ("with other examples ([1], now",)),
  *(
    BadInput(
      f"{name}: a folder", folder_as(name, read), (name, "is a folder, expected a file", remedy)
    )
    for name, (read, remedy) in REMEDIES.items()
  ),
  *(
    BadInput(f"workdir: {address}", lambda _, a=address: opened(a), (f"{scheme}:// address",))
    for scheme, address in {
      "gs": "gs://bucket/run",
      "s3": "s3://bucket/run",
      "hf": "hf://owner/name",
      "https": "https://host/run",
      "file": "file:///tmp/run",
    }.items()
  ),
  BadInput("result of a bucket", lambda _: read_result("gs://b/run"), ("gs:// address",)),
  BadInput("config of a bucket", lambda _: stored_config("gs://b/run"), ("gs:// address",)),
  BadInput("run of a bucket", lambda _: read_run(E2EConfig, "s3://b/run"), ("s3:// address",)),
  BadInput("runs of a bucket", lambda _: read_runs(["gs://b/run"]), ("gs:// address",)),
  BadInput("base of a bucket", lambda _: check_base("gs://b/run", {}), ("gs:// address",)),
  BadInput("workdir: a file", on_a_file, ("cannot be a folder", "run is a file")),
  BadInput("workdir: through a file", through_a_file, ("run/first cannot be", "run is a file")),
  BadInput("workdir: a fifo", on_a_fifo, ("cannot be a folder", "a fifo")),
  BadInput("workdir: a broken link", on_a_broken_link, ("cannot be a folder", "a broken link")),
  BadInput("workdir: a device", lambda _: opened("/dev/null"), ("cannot be a folder", "a device")),
  BadInput(
    "a folder that is not a run's",
    lambda folder: stored_config(folder),
    ("is not the folder of a run", "config.json does not exist"),
    FileNotFoundError,
  ),
  BadInput(
    "a run of another experiment",
    of_result({}, lambda folder: read_run(E2EConfig, folder)),
    ("is a run of 'e2e_template', expected a run of 'gpt2_e2e'",),
  ),
  BadInput("an unfinished run", read_finished, ("is not finished: rerun its command",)),
  BadInput(
    "a report of a result without a seed",
    of_result({"method": "lora", "valid_loss": 1.0}, lambda folder: read_runs([folder])),
    ("result.json", "lacks seed", "Remove it"),
  ),
  BadInput(
    "a report of an empty result",
    of_result({}, lambda folder: read_runs([folder])),
    ("result.json", "lacks seed, method", "Remove it"),
  ),
  BadInput(
    "a report of an unknown method",
    of_result({"method": "magic", "seed": 1}, lambda folder: read_runs([folder])),
    ("got 'magic'",),
  ),
  BadInput("no runs", lambda _: read_runs([]), ("none of the 0 runs is finished",)),
]
