"""Finished runs, grouped by what they are: runs that differ in their seed alone are one group."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.table import METHODS
from experiments.harness.workdir import flat, read_config, read_result
from lora_jax.trees import matches

RATE = "optimizer.learning_rate"
LINES = "data.num_train_records"
TOKENS = "pretraining_tokens"  # of the result: it names a base better than its folder does
BASE = {"model.folder", "model.start"}
HAVE_COLUMNS = {RATE, LINES, "decoding.num_inputs"}  # of the report: in a label only if it must be
UNUSED = {  # a method's runs do not depend on these fields, or on those below them
  "lora": (),
  "full_finetuning": ("lora",),
  "frozen_base": ("lora", "optimizer", "fit", LINES, "data.num_epochs"),
  "template": ("experiment", "variant"),
}
LINEAR = ("attn/query", "attn/key", "attn/value", "attn/out", "mlp/up", "mlp/down")
SHORT = ("q", "k", "v", "o", "up", "down")


class Run(NamedTuple):
  """A finished run: its folder, its config's fields by dotted name, its result."""

  folder: Path
  settings: dict[str, Any]
  result: dict[str, Any]

  @property
  def seed(self) -> int:
    return self.result["seed"]

  def value(self, name: str) -> float | None:
    """Returns the validation loss or a score; None if the run has none."""
    return self.result["valid_loss"] if name == "valid_loss" else self._scores().get(name)

  def interval(self, name: str) -> tuple[float, float] | None:
    """Returns a score's interval over the inputs; None if the run has none."""
    found = self.result.get("intervals", {}).get(name)
    return None if found is None else (found[0], found[1])

  @property
  def is_decoded(self) -> bool:
    return bool(self._scores())

  def _scores(self) -> dict[str, Any]:
    return self.result.get("scores", {})


class Statistic(NamedTuple):
  """A mean over seeds and their sample standard deviation; None for a single seed."""

  mean: float
  deviation: float | None


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in their seed alone, by seed.

  Attributes:
    label: what tells it from the other groups.
    family: the label without the learning rate.
    settings: the fields that the runs share and that matter to their method.
    runs: by seed.
  """

  label: str
  family: str
  settings: dict[str, Any]
  runs: tuple[Run, ...]

  @property
  def first(self) -> Run:
    return self.runs[0]

  @property
  def method(self) -> str:
    return self.first.result["method"]

  @property
  def rate(self) -> float | None:
    return self.settings.get(RATE)

  @property
  def method_label(self) -> str:
    """The method, and LoRA's rank and layers."""
    name = METHODS[self.method]
    if self.method != "lora":
      return name
    return f"{name}, rank {self.settings['lora.rank']}, {target(self.settings['lora.target'])}"

  def statistic(self, name: str) -> Statistic | None:
    """Returns a metric over the seeds; None unless every run has it."""
    values = [run.value(name) for run in self.runs]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
      return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Statistic(float(np.mean(known)), deviation)


def read_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[Path]]:
  """Returns the finished runs among folders, and the folders of the others.

  Raises:
    FileNotFoundError: if a folder is not the folder of a run.
  """
  finished, others = [], []
  for folder in map(Path, folders):
    settings, result = flat(read_config(folder)), read_result(folder)
    if result is None:
      others.append(folder)
    else:
      finished.append(Run(folder, settings, result))
  return finished, others


def group(runs: Sequence[Run]) -> list[Group]:
  """Returns the groups of runs: methods in the order in which they first appear, LoRA by rank.

  Raises:
    ValueError: if two runs of a group have the same seed.
  """
  found: dict[str, list[Run]] = {}
  for run in runs:
    found.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
  shared = [_settings(members[0]) for members in found.values()]
  labels, families = _labels(shared), _labels(shared, leave_out={RATE})
  groups = []
  for label, family, settings, members in zip(
    labels, families, shared, found.values(), strict=True
  ):
    members = sorted(members, key=lambda run: run.seed)
    for one, next_one in itertools.pairwise(members):
      if one.seed == next_one.seed:
        raise ValueError(f"{one.folder} and {next_one.folder} are the same run; give one of them")
    groups.append(Group(label, family, settings, tuple(members)))
  methods = list(dict.fromkeys(one.method for one in groups))
  return sorted(
    groups, key=lambda one: (methods.index(one.method), one.settings.get("lora.rank", 0))
  )


def _settings(run: Run) -> dict[str, Any]:
  """Returns the fields that matter to a run's method, without what tells its group's runs apart."""
  method = run.result.get("method")
  if method not in UNUSED:
    raise ValueError(f"{run.folder}: method must be one of {', '.join(UNUSED)}, got {method!r}")
  unused = ("seed", "workdir", *UNUSED[method])
  settings = {"method": method} | {
    name: value
    for name, value in run.settings.items()
    if not any(name == other or name.startswith(f"{other}.") for other in unused)
  }
  tokens = run.result.get(TOKENS)
  return settings if tokens is None else {**settings, TOKENS: tokens}


def _labels(shared: Sequence[dict[str, Any]], leave_out: Iterable[str] = ()) -> list[str]:
  """Returns a label for the settings of each group: its method and what differs between them."""
  fields = _differing(shared) - {"method"} - HAVE_COLUMNS
  if TOKENS in fields:
    fields -= BASE
  labels = [_label(settings, fields) for settings in shared]
  clashes = {label for label, count in Counter(labels).items() if count > 1}
  for clash in clashes:
    members = [i for i, label in enumerate(labels) if label == clash]
    more = _differing([shared[i] for i in members], absent_differs=True) - set(leave_out)
    for i in members:
      labels[i] = _label(shared[i], fields | more)
  return labels


def _differing(shared: Sequence[dict[str, Any]], absent_differs: bool = False) -> set[str]:
  """Returns the fields with more than one value among the settings that have them."""
  values: dict[str, set[str]] = {}
  for name in {name for settings in shared for name in settings}:
    having = [settings for settings in shared if name in settings]
    values[name] = {json.dumps(settings[name]) for settings in having}
    if absent_differs and len(having) < len(shared):
      values[name].add("absent")
  return {name for name, found in values.items() if len(found) > 1}


def _label(settings: dict[str, Any], fields: set[str]) -> str:
  order = ("variant", "lora.rank", "lora.target", "model.start")
  names = [name for name in order if name in fields]
  names += sorted(fields - set(order))
  described = [_describe(name, settings[name]) for name in names if name in settings]
  return ", ".join([METHODS[settings["method"]], *described])


def _describe(name: str, value: Any) -> str:
  plain = {
    "variant": f"GPT-2 {value}",
    "lora.rank": f"rank {value}",
    "model.start": f"{value} base",
    RATE: f"rate {value:g}" if name == RATE else "",
    TOKENS: f"base of {value:,} tokens" if name == TOKENS else "",
    LINES: f"{value} lines",
  }
  if name == "lora.target":
    return target(value)
  return plain.get(name, f"{name.rpartition('.')[2]} {value}")


def target(pattern: str) -> str:
  """Returns the layers of GPT-2 that a pattern selects.

  >>> target(r".*/attn/(query|value)/kernel")
  'q,v'
  """
  found = [
    short
    for layer, short in zip(LINEAR, SHORT, strict=True)
    if matches(pattern, f"h_0/{layer}/kernel")
  ]
  if len(found) == len(LINEAR):
    return "all linear"
  return ",".join(found) or pattern
