"""From the command line to runs: flags, a config file, and its sweep.

--config=FILE.py:VARIANT   the config; --config.a.b=1 overrides one field
--sweep                    does the runs of the config file's sweep(config)
--sweep_shard=0/4          does the first quarter of these runs, as one of four machines
--concurrent=8             with --sweep: trains up to 8 runs in one program, if the experiment can
--halving_steps=200        with --concurrent: the worse half ends after 200, 400, 800, ... steps
--traceback                shows where an error was raised
--dry_run                  prints what a run would do, if the experiment supports it
--all_rows                 with --dry_run: a row for each weight, not for each kind of weight
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import logging as std_logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

import lora_jax
from experiments.configs import Config
from experiments.harness.concurrent import Trainings, train_together
from experiments.harness.config import Distributed, flat
from experiments.harness.interrupt import end_preempted, resumable
from experiments.harness.machines import end_all, is_joined, join
from experiments.harness.methods import check_used, default_learning_rate, find_method
from experiments.harness.workdir import (
  full_disk,
  has_trained,
  read_result,
  stored_config,
)
from lora_jax.fields import read_section
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.loop import Preempted
from lora_jax.trees import closest_names

RATE = "optimizer.learning_rate"
Run = Callable[[Config], dict[str, Any]]
HERE = Path(__file__).parents[1]
OURS = (HERE, HERE.with_name("benchmarks"), Path(lora_jax.__file__).parent)


def launch(
  run: Run,
  config_file: str,
  shorthands: Mapping[str, str] | None = None,
  plan: Callable[[Config, bool], None] | None = None,
  trainings: Trainings | None = None,
) -> None:
  """Runs an experiment by its command line.

  An error meant for the user ends the program with its message only, and exit code 1.

  Args:
    run: the experiment.
    config_file: the file of its default config.
    shorthands: short flags for fields of the config: `{"model": "model.folder"}`.
    plan: prints what `run` would do, for `--dry_run`; with True a row for each weight.
    trainings: prepares the training of runs of `--concurrent`, as `harness.concurrent` says.
  """
  path = str(Path(__file__).parents[1] / "configs" / config_file)
  for flag, field in (shorthands or {}).items():
    sys.argv = [re.sub(rf"^--?{flag}(?==|$)", f"--config.{field}", a) for a in sys.argv]
  with explained():
    module, default = _chosen(sys.argv[1:], path)
  config = config_flags.DEFINE_config_file("config", path, "the config file", lock_config=True)
  sweep = flags.DEFINE_bool("sweep", False, "run the config file's sweep()")
  shard = flags.DEFINE_string("sweep_shard", "0/1", "i/n: the i-th of n shares of the sweep")
  concurrent = flags.DEFINE_integer("concurrent", 0, "runs of the sweep in one program", 0)
  halving = flags.DEFINE_integer("halving_steps", 0, "first comparison of --concurrent's runs", 0)
  flags.DEFINE_bool("traceback", False, "show where an error was raised")
  if plan is not None:
    flags.DEFINE_bool("dry_run", False, "print what would be done, and stop")
    flags.DEFINE_bool("all_rows", False, "with --dry_run: a row for each weight")

  def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
      raise app.UsageError(f"unexpected arguments {' '.join(arguments[1:])}; see --help")
    _show_warnings()
    if config.value.get("keep_freed_memory") and _only_cpus():
      keep_freed_memory()
    with explained():
      _check_concurrent(concurrent.value, halving.value, sweep.value, trainings)
      _join(config.value, default)
      named = _named_fields(sys.argv[1:])
      if plan is not None and flags.FLAGS["all_rows"].value and not flags.FLAGS["dry_run"].value:
        raise ValueError("--all_rows is for --dry_run; add it, or leave out --all_rows")
      if plan is not None and flags.FLAGS["dry_run"].value:
        if sweep.value:
          raise ValueError("--dry_run is for one run; leave out --sweep")
        plan(single_run(config.value, default, named), bool(flags.FLAGS["all_rows"].value))
      elif sweep.value:
        runs = _part(sweep_runs(module, config.value, default, named), shard.value)
        early = _train_together(runs, trainings, concurrent.value, halving.value)
        _sweep(run, runs, early)
      else:
        run(single_run(config.value, default, named))

  app.run(main)


def _join(config: Config, default: Config) -> None:
  """Connects the processes of the section `distributed`, which a run's settings leave out."""
  if "distributed" in config:
    join(read_section(Distributed, config.distributed.to_dict(), "distributed."))
    config.distributed.update(default.distributed)


def make_parser(name: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
  """Returns the parser of a command without a config file."""
  parser = argparse.ArgumentParser(
    prog=f"python -m experiments.{name}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    **options,
  )
  parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
  return parser


def _only_cpus() -> bool:
  """Tells whether JAX will find no accelerator, without initializing JAX."""
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  accelerators = bool(plugins) or importlib.util.find_spec("libtpu") is not None
  return os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerators


def _chosen(arguments: list[str], path: str) -> tuple[ModuleType, Config]:
  """Returns the config file's module, and its config before any flag changes it.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not a config file or has no variants, or a flag names a field that the
      config does not have.
  """
  for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
    if match := re.fullmatch(r"--?config(=.*)?", argument):
      path = following if match[1] is None else match[1][1:]
  file, *variant = path.split(":", 1)
  if not Path(file).is_file():
    raise FileNotFoundError(f"there is no config file {file!r}; expected --config=FILE.py:VARIANT")
  module = _load(file)
  if not hasattr(module, "get_config"):
    raise ValueError(f"{file} has no function get_config(); expected --config=FILE.py:VARIANT")
  if variant and not inspect.signature(module.get_config).parameters:
    raise ValueError(f"{file} has no variants, got {variant[0]!r}; expected --config={file}")
  config = module.get_config(*variant)
  known = flat(config)
  for name in _named_fields(arguments):
    if name not in known and not any(field.startswith(f"{name}.") for field in known):
      raise ValueError(_no_field(name, known))
  return module, config


def _named_fields(arguments: Sequence[str]) -> set[str]:
  """Returns the fields of the config that a command line names."""
  flags = (re.match(r"--?(?:no)?config\.([\w.]+)", argument) for argument in arguments)
  return {match[1] for match in flags if match}


def _no_field(name: str, known: Iterable[str]) -> str:
  return f"the config has no field {name!r}; did you mean {', '.join(closest_names(name, known))}?"


def _show_warnings() -> None:
  """Shows this project's warnings; of libraries only what they raise.

  After a failed write Orbax and TensorStore print a traceback for each array, before one error is
  raised; TensorStore does it through the hook, in its own threads.
  """
  logging.set_verbosity(logging.FATAL)
  std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
  sys.unraisablehook = _show_in_main_thread
  handler = std_logging.StreamHandler()
  handler.setFormatter(std_logging.Formatter("%(levelname)s: %(message)s"))
  logger = std_logging.getLogger("lora_jax")
  logger.addHandler(handler)
  logger.setLevel(std_logging.WARNING)
  logger.propagate = False


def _show_in_main_thread(unraisable: Any) -> None:
  if threading.current_thread() is threading.main_thread():
    sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Ends the program with one message: an error's if it is meant for the user, or a signal's."""
  with resumable():
    try:
      yield
    except Preempted as error:
      end_preempted(error)
    except Exception as error:
      says_all = _says_all(error)
      text = f"error: {error}\n(--traceback shows where it was raised)"
      if is_joined():
        end_all(text if says_all else traceback.format_exc())
      if not says_all:
        raise
      sys.exit(text)


def _says_all(error: Exception) -> bool:
  """Tells whether an error's message is meant for the user.

  It is if a `raise` statement of this project raised it with one of the types below, or if it comes
  from the operating system. All others are bugs, which need their traceback.
  """
  if "--traceback" in sys.argv:
    return False
  last = traceback.extract_tb(error.__traceback__)[-1]
  raised_here = any(Path(last.filename).is_relative_to(folder) for folder in OURS)
  raised = raised_here and (last.line or "").startswith("raise")
  for_user = isinstance(error, ValueError | RuntimeError | FloatingPointError)
  return isinstance(error, OSError) or bool(full_disk(error)) or (raised and for_user)


def apply(config: Config, changes: Mapping[str, Any]) -> Config:
  """Returns a copy of a config with some fields changed, by dotted name.

  Raises:
    ValueError: if there is no such field, or the value is of another type.
  """
  copy, known = config.copy_and_resolve_references(), flat(config)
  for name in changes:
    if name not in known:
      raise ValueError(_no_field(name, known))
  try:
    copy.update_from_flattened_dict(dict(changes))
  except TypeError as error:
    raise ValueError(f"{changes} does not fit the config: {error}") from error
  return copy


def settle(
  config: Config, default: Config, named: Collection[str]
) -> tuple[Config, dict[str, Any]]:
  """Returns a config with its method's learning rate, and the fields that differ from the defaults.

  A config file's learning rate is for its own method. Another method's default is a multiple of it,
  from `harness.methods`, and applies unless `named` has the learning rate's field.

  Raises:
    ValueError: if the experiment does not have the method.
  """
  usual = flat(default)
  if "method" in config and config.method != default.method:
    find_method(config.method, config.experiment)
    usual[RATE] = default_learning_rate(usual[RATE], default.method, config.method)
    if RATE not in named:
      config = apply(config, {RATE: usual[RATE]})
  return config, {name: value for name, value in flat(config).items() if usual[name] != value}


def _with_stored_rate(
  run: Config, default: Config, named: Collection[str]
) -> tuple[Config, list[str]]:
  """Returns a run with the learning rate that its folder was trained with, and lines to print.

  Older folders were trained with the config file's learning rate, whatever their method.
  """
  if "method" not in run or run.method == default.method or RATE in named:
    return run, []
  rate, reason = run.optimizer.learning_rate, f"the default for {find_method(run.method).label}"
  if has_trained(Path(run.workdir)):
    stored = flat(stored_config(run.workdir))
    same = (stored.get("experiment"), stored.get("method")) == (run.experiment, run.method)
    if same and stored[RATE] != rate:
      line = f"{RATE}={stored[RATE]:g}, with which {run.workdir} was trained; {reason} is {rate:g}"
      return apply(run, {RATE: stored[RATE]}), [line]
  return run, [f"{RATE}={rate:g}, {reason}"] if rate != default.optimizer.learning_rate else []


def single_run(config: Config, default: Config, named: Collection[str]) -> Config:
  """Returns the config of a run; without a workdir, the folder is named after the changed fields.

  That name also replaces `{name}` in a workdir, as in `runs/webnlg/{name}`.

  Prints a learning rate that comes from neither a flag nor the config file.

  Raises:
    ValueError: if a changed field has no effect on the method.
  """
  config, changes = settle(config, default, named)
  if "method" in config:
    check_used(config.method, changes, config.experiment)
  name = ",".join([str(config.variant), *_names(changes)])
  config = apply(config, {"workdir": _named_workdir(config, name)})
  config, lines = _with_stored_rate(config, default, named)
  print("".join(f"{line}\n" for line in lines), end="")
  return config


def sweep_runs(
  module: ModuleType, config: Config, default: Config, named: Collection[str]
) -> list[Config]:
  """Returns the configs of a config file's sweep.

  Raises:
    ValueError: if the file has no sweep, a field that the sweep changes has no effect on that run's
      method, or a field that the command line changes has no effect on any run's method.
  """
  if not hasattr(module, "sweep"):
    raise ValueError(f"{module.__file__} has no function sweep(config)")
  settled, flags = settle(config, default, named)
  name = ",".join(["sweep", *_names(flags)])
  root = Path(_named_workdir(config, name))
  before, runs, printed = flat(settled), [], []
  for changes in module.sweep(settled):
    known = {*named, *changes}
    run, _ = settle(apply(config, changes), default, known)  # another method, another learning rate
    if "method" in run:
      changed = {n: value for n, value in changes.items() if before[n] != value}
      check_used(run.method, changed, run.experiment)
    run = apply(run, {"workdir": str(root / (",".join(_names(changes)) or "unchanged"))})
    run, lines = _with_stored_rate(run, default, known)
    printed += lines
    runs.append(run)
  print("".join(f"{line}\n" for line in dict.fromkeys(printed)), end="")
  methods = [run.method for run in runs if "method" in run]
  for field, value in flags.items():
    if methods and not any(find_method(method).uses(field) for method in methods):
      check_used(methods[0], {field: value}, config.experiment)
  return runs


def _part(runs: Sequence[Config], shard: str) -> Sequence[Config]:
  """Returns the runs of a share i/n of a sweep."""
  match = re.fullmatch(r"(\d+)/(\d+)", shard)
  index, count = (int(x) for x in match.groups()) if match else (1, 0)
  if index >= count:
    raise ValueError(f"--sweep_shard must be i/n with 0 <= i < n, got {shard!r}")
  return runs[index::count]


def _check_concurrent(
  slots: int, halving_steps: int, sweep: bool, trainings: Trainings | None
) -> None:
  if halving_steps and not slots:
    raise ValueError(f"--halving_steps={halving_steps} is for --concurrent; add --concurrent=K")
  if slots and not sweep:
    raise ValueError(f"--concurrent={slots} is for the runs of a sweep; add --sweep")
  if slots and trainings is None:
    raise ValueError(
      f"--concurrent={slots}: this experiment trains one run at a time. Leave out --concurrent, "
      "which gpt2_e2e and the commands of its other data sets have"
    )


def _train_together(
  runs: Sequence[Config], trainings: Trainings | None, slots: int, halving_steps: int
) -> dict[str, Exception | str]:
  """Trains the runs of a sweep that can share a program; returns those that ended early."""
  if not slots or trainings is None:
    return {}
  return train_together(runs, trainings, slots, halving_steps)


def _sweep(run: Run, runs: Sequence[Config], early: Mapping[str, Exception | str]) -> None:
  """Does each run, or completes it; `early` has those whose joint training ended early."""
  failed = []
  for number, config in enumerate(runs, 1):
    print(f"[{number}/{len(runs)}] {config.workdir}", flush=True)
    finished = read_result(config.workdir) is not None
    if finished:
      print("  finished before", flush=True)
    if isinstance(reason := early.get(config.workdir), str):
      print(f"  {reason}. Its own command resumes it", flush=True)
      continue
    try:
      if reason is not None:
        raise reason
      with contextlib.redirect_stdout(io.StringIO()) if finished else contextlib.nullcontext():
        run(config)  # checks that a finished run has this config
    except Exception as error:  # the other runs are still worth doing
      if is_joined() and not isinstance(error, FloatingPointError):
        raise  # another process may not have failed
      failed.append(config.workdir)
      message = f"{error}" if _says_all(error) else traceback.format_exc()
      print(f"  failed: {message}", file=sys.stderr, flush=True)
  if failed:
    sys.exit(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
  stopped = sum(isinstance(early.get(config.workdir), str) for config in runs)
  ends = f", {stopped} of them stopped early" if stopped else ""
  print(f"Done: {len(runs)} runs{f' in {Path(runs[0].workdir).parent}' if runs else ''}{ends}")


def _named_workdir(config: Config, name: str) -> str:
  workdir = str(config.workdir) or f"runs/{config.experiment}/{{name}}"
  return workdir.replace("{name}", name)


def _names(changes: dict[str, Any]) -> list[str]:
  """Returns changed fields as parts of a folder's name; long and odd values are hashed."""

  def text(value: Any) -> str:
    plain = str(value)
    return plain if re.fullmatch(r"[\w.+-]{1,40}", plain) else _hash(plain)

  parts = [f"{name}={text(value)}" for name, value in changes.items() if name != "workdir"]
  is_long = len(",".join(parts)) > 200  # file systems allow 255 bytes
  return [f"{len(parts)} fields={_hash(','.join(parts))}"] if is_long else parts


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _load(file: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location("experiment_config", file)
  if spec is None or spec.loader is None:
    raise ValueError(f"{file} is not a Python file; expected --config=FILE.py:VARIANT")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
