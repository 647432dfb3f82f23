"""From the command line to runs: flags, a config file, and its sweep.

--config=FILE.py:VARIANT   the config; --config.a.b=1 overrides one field
--sweep                    one run for each of the config file's sweep(config)
--sweep_shard=0/4          the first of four machines' shares of these runs
"""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.workdir import flat, read_result

Run = Callable[[ConfigDict], dict[str, Any]]


def launch(run: Run, config_file: str) -> None:
  """Runs an experiment as its command line says; `config_file` is its default config."""
  default = str(Path(__file__).parent / "configs" / config_file)
  config = config_flags.DEFINE_config_file("config", default, "the config file", lock_config=True)
  sweep = flags.DEFINE_bool("sweep", False, "run the config file's sweep()")
  shard = flags.DEFINE_string("sweep_shard", "0/1", "i/n: the i-th of n shares of the sweep")

  def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
      raise app.UsageError(f"unexpected arguments {' '.join(arguments[1:])}; see --help")
    file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    if sweep.value:
      _sweep(run, _load(file), config.value, shard.value)
    else:
      run(_with_workdir(config.value, _load(file)))

  logging.set_verbosity(logging.ERROR)
  app.run(main)


def apply(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
  """Returns a copy of a config with some fields changed, by dotted name.

  Raises:
    ValueError: if there is no such field, or the value is of another type.
  """
  new = config.copy_and_resolve_references()
  known = flat(new)
  for name in changes:
    if name not in known:
      raise ValueError(f"the config has no field {name!r}; it has {', '.join(known)}")
  try:
    new.update_from_flattened_dict(changes)
  except TypeError as error:
    raise ValueError(f"{changes} does not fit the config: {error}") from error
  return new


def _sweep(run: Run, module: ModuleType, config: ConfigDict, shard: str) -> None:
  match = re.fullmatch(r"(\d+)/(\d+)", shard)
  index, count = (int(x) for x in match.groups()) if match else (1, 0)
  if index >= count:
    raise app.UsageError(f"--sweep_shard must be i/n with 0 <= i < n, got {shard!r}")
  if not hasattr(module, "sweep"):
    raise app.UsageError(f"{module.__file__} has no function sweep(config)")
  root = Path(config.workdir or "runs") / config.experiment / "sweep"
  if config.workdir:
    root = Path(config.workdir)
  runs = list(module.sweep(config))[index::count]
  failed = []
  for number, changes in enumerate(runs, 1):
    one = apply(config, changes)
    one.workdir = str(root / _name(changes))
    print(f"[{number}/{len(runs)}] {one.workdir}", flush=True)
    if read_result(one.workdir) is not None:
      print("  finished before", flush=True)
      continue
    try:
      run(one)
    except (Exception, SystemExit) as error:  # the others are worth having
      failed.append(one.workdir)
      print(f"  failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
  if failed:
    raise SystemExit(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
  print(f"Done. The table: python -m experiments.report {root}/*")


def _with_workdir(config: ConfigDict, module: ModuleType) -> ConfigDict:
  """Returns a config whose folder, if it names none, is named by what it changes."""
  if config.workdir:
    return config
  default = flat(module.get_config(config.variant).to_dict())
  changes = {n: v for n, v in flat(config.to_dict()).items() if default.get(n) != v}
  name = ",".join([config.variant, *([_name(changes)] if changes else [])])
  new = config.copy_and_resolve_references()
  new.workdir = str(Path("runs") / config.experiment / name)
  return new


def _name(changes: dict[str, Any]) -> str:
  """Returns a folder's name for changed fields; long and odd values by their hash."""

  def text(value: Any) -> str:
    plain = str(value)
    if re.fullmatch(r"[\w.+-]{1,40}", plain):
      return plain
    return hashlib.sha256(plain.encode()).hexdigest()[:8]

  return ",".join(f"{name}={text(value)}" for name, value in changes.items())


def _load(file: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location("experiment_config", file)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
