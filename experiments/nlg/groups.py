"""Groups finished runs: runs that differ only in their seed are one group."""

import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from experiments.harness.config import ALL_LINEAR
from experiments.harness.methods import Method
from experiments.harness.runs import Run
from experiments.nlg.config import E2EConfig, TemplateConfig, Texts
from experiments.nlg.rounding import bits_per_weight
from experiments.nlg.scores import model_label
from lora_jax.trees import matches

RATE = "optimizer.learning_rate"
LINES = "data.num_train_records"
ROUNDED = "model.rounded_to"
TRAINED_ON = "trained_on"  # of the result: an adapter was evaluated on other, rounded weights
TOKENS = "pretraining_tokens"  # of the result: it names a base better than its folder does
BASE = {"model.folder", "model.start"}
NEWER = {  # fields that older runs were stored without
  f"{section}.{field.name}": field.default
  for section, kind in get_type_hints(E2EConfig).items()
  if dataclasses.is_dataclass(kind)
  for field in dataclasses.fields(kind)
  if field.default is not dataclasses.MISSING
}
HAVE_COLUMNS = {RATE, LINES, "decoding.num_inputs"}  # of the report: in a label only if it must be
LINEAR = ("attn/query", "attn/key", "attn/value", "attn/out", "mlp/up", "mlp/down")
SHORT = ("q", "k", "v", "o", "up", "down")


def texts_of(run: Run) -> Texts | None:
  """Returns the part of a run's config that names its data set; None for experiments without it."""
  if run.settings.get("experiment") not in (E2EConfig.NAME, TemplateConfig.NAME):
    return None
  names = [f"data.{field.name}" for field in dataclasses.fields(Texts)]
  stored = {**NEWER, **run.settings}
  return Texts(*(stored[name] for name in names))


def data_name(run: Run) -> str:
  """Returns the name of a run's data set in files, or of its experiment if it has none."""
  texts = texts_of(run)
  if texts is None:
    return str(run.settings.get("experiment"))
  return f"{texts.name}-excerpt" if texts.any_size else texts.name


class Statistic(NamedTuple):
  """A mean over seeds and their sample standard deviation; None for a single seed."""

  mean: float
  deviation: float | None


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ only in their seed, by seed.

  Attributes:
    label: distinguishes it from the other groups.
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
  def method(self) -> Method:
    return self.first.method

  @property
  def rate(self) -> float | None:
    return self.settings.get(RATE)

  @property
  def is_low_rank(self) -> bool:
    return "lora.rank" in self.settings

  @property
  def method_label(self) -> str:
    """The method, and the rank and the layers of one that has them."""
    if not self.is_low_rank:
      return self.method.label
    layers = target(self.settings["lora.target"])
    return f"{self.method.label}, rank {self.settings['lora.rank']}, {layers}"

  def statistic(self, name: str) -> Statistic | None:
    """Returns a metric over the seeds; None unless every run has it."""
    values = [value for run in self.runs if (value := run.value(name)) is not None]
    if len(values) < len(self.runs):
      return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Statistic(float(np.mean(values)), deviation)

  @property
  def loss(self) -> float:
    """The mean validation loss, to find the best group; infinite if there is none."""
    statistic = self.statistic("valid_loss")
    return float("inf") if statistic is None else statistic.mean


def group_runs(runs: Sequence[Run]) -> list[Group]:
  """Returns the groups of runs: methods in the order in which they first appear, each by rank.

  Raises:
    ValueError: if two runs of a group have the same seed.
  """
  by_settings: dict[str, list[Run]] = defaultdict(list)
  for run in runs:
    by_settings[json.dumps(_settings(run), sort_keys=True)].append(run)
  shared = [_settings(members[0]) for members in by_settings.values()]
  names = [members[0].method.label for members in by_settings.values()]
  labels, families = _labels(names, shared), _labels(names, shared, leave_out={RATE})
  groups = []
  for label, family, settings, members in zip(
    labels, families, shared, by_settings.values(), strict=True
  ):
    members.sort(key=lambda run: run.seed)
    for run, following in itertools.pairwise(members):
      if run.seed == following.seed:
        raise ValueError(f"{run.folder} and {following.folder} are the same run; give one of them")
    groups.append(Group(label, family, settings, tuple(members)))
  order = list(dict.fromkeys(names))
  return sorted(
    groups,
    key=lambda group: (order.index(group.method.label), group.settings.get("lora.rank", 0)),
  )


def by_rate(groups: Sequence[Group]) -> dict[str, list[Group]]:
  """Returns the groups that differ only in their learning rate, by label, in ascending order."""
  families: dict[str, list[Group]] = defaultdict(list)
  for group in groups:
    if group.rate is not None:
      families[group.family].append(group)
  return {
    label: sorted(members, key=lambda group: group.rate or 0.0)
    for label, members in families.items()
    if len({group.rate for group in members}) > 1
  }


def by_rank(groups: Sequence[Group]) -> list[list[Group]]:
  """Returns the sets of groups of one method that differ in their rank, in ascending order.

  All groups of a set have the same alpha, or the same alpha / rank. A rank with several learning
  rates has the one with the smallest validation loss.
  """
  sweeps: dict[str, dict[int, Group]] = defaultdict(dict)
  for group in sorted(groups, key=lambda group: group.loss, reverse=True):  # the best comes last
    if group.is_low_rank:
      rest = {name: value for name, value in group.settings.items() if name != RATE}
      rank = rest.pop("lora.rank")
      sweeps[repr(sorted(rest.items()))][rank] = group
      rest["lora.alpha"] = ("times the rank", rest["lora.alpha"] / rank)
      sweeps[repr(sorted(rest.items(), key=repr))][rank] = group
  return [[sweep[rank] for rank in sorted(sweep)] for sweep in sweeps.values() if len(sweep) > 1]


def by_budget(groups: Sequence[Group]) -> dict[str, dict[int, Group]]:
  """Returns the groups that differ only in their base model, by method and pretraining tokens.

  Left out are base models whose number of tokens is unknown, and methods with a single base model.
  Of several learning rates, a base model has the one with the smallest validation loss.
  """
  families: dict[tuple[str, str], dict[int, Group]] = defaultdict(dict)
  for group in sorted(groups, key=lambda group: group.loss, reverse=True):  # the best comes last
    tokens = group.settings.get(TOKENS)
    if tokens is not None:
      base = {RATE, TOKENS, *BASE}
      rest = {name: value for name, value in group.settings.items() if name not in base}
      families[group.method_label, repr(sorted(rest.items()))][tokens] = group
  order = list(dict.fromkeys(group.method_label for group in groups))
  several = [item for item in families.items() if len(item[1]) > 1]
  several.sort(key=lambda item: order.index(item[0][0]))
  counts = Counter(label for (label, _), _ in several)
  budgets: dict[str, dict[int, Group]] = {}
  for (label, _), members in several:
    examples = next(iter(members.values())).first.result["num_train_records"]
    name = label + (f", {examples:,} examples" if counts[label] > 1 else "")
    same = sum(other.startswith(name) for other in budgets)
    budgets[name + (f" ({same + 1})" if same else "")] = dict(sorted(members.items()))
  return budgets


def by_bits(groups: Sequence[Group]) -> dict[str, dict[float, Group]]:
  """Returns the groups on rounded weights, by method and bits per weight, in ascending order.

  Adapters of rounded weights, and those of the model's own weights that were evaluated on rounded
  ones, are two families. Of several learning rates, a format has the one with the smallest
  validation loss.
  """
  families: dict[str, dict[float, Group]] = defaultdict(dict)
  for group in sorted(groups, key=lambda group: group.loss, reverse=True):  # the best comes last
    if group.settings.get(ROUNDED):
      trained_on = group.settings.get(TRAINED_ON, "the rounded weights")
      bits = bits_per_weight(group.settings[ROUNDED])
      families[f"{group.method_label}, trained on {trained_on}"][bits] = group
  return {label: dict(sorted(families[label].items())) for label in sorted(families)}


def unrounded(groups: Sequence[Group]) -> dict[str, Group]:
  """Returns the groups on the model's own weights, by method; the best learning rate of each."""
  ordered = sorted(groups, key=lambda group: group.loss, reverse=True)  # the best comes last
  return {group.method_label: group for group in ordered if group.settings.get(ROUNDED) == ""}


def _settings(run: Run) -> dict[str, Any]:
  """Returns the fields that the run's method uses, except those that differ within a group."""
  is_gpt2 = run.settings.get("experiment") == E2EConfig.NAME
  stored = {**(NEWER if is_gpt2 else {}), **run.settings}
  settings = {name: value for name, value in stored.items() if run.method.uses(name)}
  settings |= {"method": run.result["method"]}
  for name in ("seed", "workdir"):
    settings.pop(name, None)
  if is_gpt2 and "lora.target" in settings and target(settings["lora.target"]) == "all linear":
    settings["lora.target"] = ALL_LINEAR  # several patterns select these layers
  known = {name: run.result.get(name) for name in (TOKENS, TRAINED_ON)}
  return settings | {name: value for name, value in known.items() if value is not None}


def _labels(
  methods: Sequence[str], shared: Sequence[dict[str, Any]], leave_out: Iterable[str] = ()
) -> list[str]:
  """Returns a label for each group: its method, and the settings that differ between groups."""
  fields = _differing(shared) - {"method"} - HAVE_COLUMNS
  if TOKENS in fields:
    fields -= BASE
  labels = [_label(*group, fields) for group in zip(methods, shared, strict=True)]
  clashes = {label for label, count in Counter(labels).items() if count > 1}
  for clash in clashes:
    members = [i for i, label in enumerate(labels) if label == clash]
    more = _differing([shared[i] for i in members], absent_differs=True) - set(leave_out)
    for i in members:
      labels[i] = _label(methods[i], shared[i], fields | more)
  return labels


def _differing(shared: Sequence[dict[str, Any]], absent_differs: bool = False) -> set[str]:
  """Returns the fields with more than one value among the settings that have them."""
  values: dict[str, set[str]] = defaultdict(set)
  for settings in shared:
    for name, value in settings.items():
      values[name].add(json.dumps(value))
  absent = {name for settings in shared for name in values.keys() - settings.keys()}
  differing = {name for name, different in values.items() if len(different) > 1}
  return differing | absent if absent_differs else differing


def _label(method: str, settings: dict[str, Any], fields: set[str]) -> str:
  order = ("variant", "lora.rank", "lora.target", "model.start")
  names = [name for name in order if name in fields]
  names += sorted(fields - set(order))
  return ", ".join([method, *(_setting(n, settings[n]) for n in names if n in settings)])


def _setting(name: str, value: Any) -> str:
  match name:
    case "variant":
      return model_label(value)
    case "lora.rank":
      return f"rank {value}"
    case "lora.target":
      return target(value)
    case "model.start":
      return f"{value} base"
    case "optimizer.learning_rate":
      return f"rate {value:g}"
    case "model.rounded_to":
      return f"rounded to {value}" if value else "not rounded"
    case "trained_on":
      return f"trained on {value}"
    case "pretraining_tokens":
      return f"base of {value:,} tokens"
    case "data.num_train_records":
      return f"{value} examples"
  return f"{name.rpartition('.')[2]} {value}"


def target(pattern: str) -> str:
  """Returns the layers of GPT-2 that a pattern selects.

  >>> target(r".*/attn/(query|value)/kernel")
  'q,v'
  """
  layers = [
    short
    for layer, short in zip(LINEAR, SHORT, strict=True)
    if matches(pattern, f"h_0/{layer}/kernel")
  ]
  if len(layers) == len(LINEAR):
    return "all linear"
  return ",".join(layers) or pattern
