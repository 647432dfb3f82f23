"""From the command line to runs: flags, a config file, and its sweep.

--config=FILE.py:VARIANT   the config; --config.a.b=1 overrides one field
--sweep                    one run for each of the config file's sweep(config)
--sweep_shard=0/4          the first of four machines' shares of these runs
--traceback                where an error was raised
--dry_run                  prints what would be done, of an experiment that can tell
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import logging as std_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import lora_jax
from experiments.harness.workdir import Config, flat, open_workdir, read_result
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.trees import near

Run = Callable[[ConfigDict], dict[str, Any]]
OURS = (Path(__file__).parents[1], Path(lora_jax.__file__).parent)


def launch(
  run: Run,
  config_file: str,
  shorthands: Mapping[str, str] | None = None,
  plan: Callable[[ConfigDict], None] | None = None,
) -> None:
  """Runs an experiment as its command line says.

  An error that was raised on purpose ends the program with its message alone and exit code 1.

  Args:
    run: the experiment.
    config_file: of its default config.
    shorthands: flags that stand for a field of the config: `{"model": "model.folder"}`.
    plan: prints what `run` would do, for `--dry_run`.
  """
  path = str(Path(__file__).parents[1] / "configs" / config_file)
  for flag, field in (shorthands or {}).items():
    sys.argv = [re.sub(rf"^--?{flag}(?==|$)", f"--config.{field}", a) for a in sys.argv]
  with explained():
    module, default = _chosen(sys.argv[1:], path)
  config = config_flags.DEFINE_config_file("config", path, "the config file", lock_config=True)
  sweep = flags.DEFINE_bool("sweep", False, "run the config file's sweep()")
  shard = flags.DEFINE_string("sweep_shard", "0/1", "i/n: the i-th of n shares of the sweep")
  flags.DEFINE_bool("traceback", False, "show where an error was raised")
  if plan is not None:
    flags.DEFINE_bool("dry_run", False, "print what would be done, and stop")

  def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
      raise app.UsageError(f"unexpected arguments {' '.join(arguments[1:])}; see --help")
    _show_warnings()
    if config.value.get("keep_freed_memory") and _only_cpus():
      keep_freed_memory()
    with explained():
      changes = _changes(config.value, default)
      if plan is not None and flags.FLAGS["dry_run"].value:
        if sweep.value:
          raise ValueError("--dry_run is for one run; leave out --sweep")
        plan(_with_workdir(config.value, changes))
      elif sweep.value:
        _sweep(run, module, config.value, changes, shard.value)
      else:
        run(_with_workdir(config.value, changes))

  app.run(main)


def _only_cpus() -> bool:
  """Tells whether JAX will find no accelerator, without starting it."""
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  accelerators = bool(plugins) or importlib.util.find_spec("libtpu") is not None
  return os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerators


def _chosen(arguments: list[str], path: str) -> tuple[ModuleType, ConfigDict]:
  """Returns the config file's module and its config, before the fields that flags change.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if a flag names a field that the config does not have.
  """
  for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
    if match := re.fullmatch(r"--?config(=.*)?", argument):
      path = following if match[1] is None else match[1][1:]
  file, *variant = path.split(":", 1)
  if not Path(file).is_file():
    raise FileNotFoundError(f"there is no config file {file!r}; expected --config=FILE.py:VARIANT")
  module = _load(file)
  config = module.get_config(*variant)
  names = [match[1] for a in arguments if (match := re.match(r"--?(?:no)?config\.([\w.]+)", a))]
  known = flat(config)
  for name in names:
    if name not in known and not any(field.startswith(f"{name}.") for field in known):
      raise ValueError(f"the config has no field {name!r}; near: {', '.join(near(name, known))}")
  return module, config


def _show_warnings() -> None:
  """Shows this project's warnings, and of the libraries' messages the errors alone."""
  logging.set_verbosity(logging.ERROR)
  handler = std_logging.StreamHandler()
  handler.setFormatter(std_logging.Formatter("%(levelname)s: %(message)s"))
  logger = std_logging.getLogger("lora_jax")
  logger.addHandler(handler)
  logger.setLevel(std_logging.WARNING)
  logger.propagate = False


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Ends the program with an error's message alone, if it says all."""
  try:
    yield
  except Exception as error:
    if not _says_all(error):
      raise
    sys.exit(f"error: {error}\n(--traceback shows where it was raised)")


def _says_all(error: Exception) -> bool:
  """Tells whether an error's message is meant for the user.

  It is if a `raise` in this project raised it with one of the types below, or if it is of the
  operating system. All others are mistakes in the code, which need their traceback.
  """
  if "--traceback" in sys.argv:
    return False
  last = traceback.extract_tb(error.__traceback__)[-1]
  ours = any(Path(last.filename).is_relative_to(folder) for folder in OURS)
  raised = ours and (last.line or "").startswith("raise")
  told = isinstance(error, ValueError | RuntimeError | FloatingPointError)
  return isinstance(error, OSError) or (raised and told)


def apply(config: Config, changes: dict[str, Any]) -> Config:
  """Returns a copy of a config with some fields changed, by dotted name.

  Raises:
    ValueError: if there is no such field, or the value is of another type.
  """
  new = config.copy_and_resolve_references()
  known = flat(new)
  for name in changes:
    if name not in known:
      raise ValueError(f"the config has no field {name!r}; near: {', '.join(near(name, known))}")
  try:
    new.update_from_flattened_dict(changes)
  except TypeError as error:
    raise ValueError(f"{changes} does not fit the config: {error}") from error
  return new


def _sweep(
  run: Run, module: ModuleType, config: ConfigDict, changes: dict[str, Any], shard: str
) -> None:
  match = re.fullmatch(r"(\d+)/(\d+)", shard)
  index, count = (int(x) for x in match.groups()) if match else (1, 0)
  if index >= count:
    raise ValueError(f"--sweep_shard must be i/n with 0 <= i < n, got {shard!r}")
  if not hasattr(module, "sweep"):
    raise ValueError(f"{module.__file__} has no function sweep(config)")
  name = ",".join(["sweep", *_names(changes)])
  root = Path(str(config.workdir)) if config.workdir else _home(config) / name
  runs = list(module.sweep(config))[index::count]
  failed = []
  for number, own in enumerate(runs, 1):
    one = apply(config, own)
    one.workdir = str(root / (",".join(_names(own)) or "unchanged"))
    print(f"[{number}/{len(runs)}] {one.workdir}", flush=True)
    try:
      with open_workdir(one.workdir, one) as workdir:
        finished = read_result(workdir) is not None
      if finished:
        print("  finished before", flush=True)
      with contextlib.redirect_stdout(io.StringIO()) if finished else contextlib.nullcontext():
        run(one)  # of a finished run, only whether its data is still the same
    except Exception as error:  # the others are worth having
      failed.append(one.workdir)
      what = f"{error}" if _says_all(error) else traceback.format_exc()
      print(f"  failed: {what}", file=sys.stderr, flush=True)
  if failed:
    sys.exit(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
  print(f"Done: {len(runs)} runs in {root}")


def _changes(config: ConfigDict, default: ConfigDict) -> dict[str, Any]:
  """Returns the fields that differ from the config file's, by dotted name."""
  before = flat(default)
  return {name: value for name, value in flat(config).items() if before[name] != value}


def _with_workdir(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
  """Returns a config whose folder, if it names none, is named by what it changes."""
  if config.workdir:
    return config
  new = config.copy_and_resolve_references()
  name = ",".join([str(config.variant), *_names(changes)])
  new.workdir = str(_home(config) / name)
  return new


def _home(config: ConfigDict) -> Path:
  return Path("runs") / str(config.experiment)


def _names(changes: dict[str, Any]) -> list[str]:
  """Returns changed fields as parts of a folder's name; long and odd values by their hash."""

  def text(value: Any) -> str:
    plain = str(value)
    return plain if re.fullmatch(r"[\w.+-]{1,40}", plain) else _hash(plain)

  parts = [f"{name}={text(value)}" for name, value in changes.items() if name != "workdir"]
  long = len(",".join(parts)) > 200  # file systems allow 255 bytes
  return [f"{len(parts)} fields={_hash(','.join(parts))}"] if long else parts


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _load(file: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location("experiment_config", file)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
