"""Draws the report's plot: scores by group, loss by learning rate, and all values by rank."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from experiments.harness import paper as paper_tables
from experiments.nlg.groups import Group, data_name, unrounded
from experiments.nlg.scores import header

LOSS, SLOT_ERRORS = "validation loss, nats/token", "slot error rate, %"
RUNS, PAPER = "tab:blue", "tab:orange"


def draw(
  path: Path,
  groups: Sequence[Group],
  metrics: Sequence[str],
  rates: Mapping[str, Sequence[Group]],
  sweeps: Sequence[Sequence[Group]],
  budgets: Mapping[str, Mapping[int, Group]],
  bits: Mapping[str, Mapping[float, Group]],
) -> None:
  """Writes a PNG file with one row of panels for each view of one data set's groups."""
  rows: list[tuple[float, Callable[[SubFigure], None]]] = []
  if any(group.first.is_decoded for group in groups) or not (rates or sweeps):
    rows.append((1.6 + 0.35 * len(groups), partial(_by_group, groups, metrics)))
  if rates:
    rows.append((4.0, partial(_by_rate, rates)))
  rows += [(3.6, partial(_by_rank, sweep, metrics)) for sweep in sweeps]
  if budgets:
    rows.append((4.0, partial(_by_budget, budgets, metrics)))
  if bits:
    rows.append((4.0, partial(_by_bits, bits, unrounded(groups))))
  heights = [height for height, _ in rows]
  figure = Figure(figsize=(16, sum(heights)), dpi=100, layout="constrained")
  parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)
  for part, (_, fill) in zip(parts[:, 0], rows, strict=True):
    fill(part)
  figure.savefig(path)


def _panels(
  figure: SubFigure, groups: Sequence[Group], metrics: Sequence[str], share: bool
) -> dict[str, Axes]:
  """Returns the axes of the loss and of each metric that some group has."""
  values = ("valid_loss", *metrics)
  names = [name for name in values if any(group.statistic(name) for group in groups)]
  axes = figure.subplots(1, len(names), sharey=share, squeeze=False)[0]
  return dict(zip(names, axes, strict=True))


def _title(name: str) -> str:
  return LOSS if name == "valid_loss" else header(name)


def _by_group(groups: Sequence[Group], metrics: Sequence[str], figure: SubFigure) -> None:
  figure.suptitle("Mean over the seeds, each seed, and the first seed's 95 % interval (inputs)")
  for name, axes in _panels(figure, groups, metrics, share=True).items():
    axes.set_xlabel(_title(name))
    axes.set_yticks(range(len(groups)), [group.label for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    for y, group in enumerate(groups):
      if (statistic := group.statistic(name)) is None:
        continue
      if (interval := group.first.interval(name)) is not None:
        axes.hlines(y, *interval, color=RUNS, alpha=0.4)
      values = [value for run in group.runs if (value := run.value(name)) is not None]
      axes.plot(values, [y] * len(values), ".", color=RUNS, alpha=0.5)
      axes.plot([statistic.mean], [y], "D", color=RUNS, markersize=6)


def _by_rate(rates: Mapping[str, Sequence[Group]], figure: SubFigure) -> None:
  axes = figure.subplots()
  for label, members in rates.items():
    losses = [(group.rate, group.statistic("valid_loss")) for group in members]
    known = [(rate, loss.mean) for rate, loss in losses if rate and loss]
    axes.plot([rate for rate, _ in known], [loss for _, loss in known], "o-", label=label)
  axes.set_xscale("log")
  axes.set_yscale("log")  # a diverged run would hide the others
  axes.yaxis.set_major_formatter(ScalarFormatter())
  axes.yaxis.set_minor_formatter(ScalarFormatter())
  axes.set_xlabel("learning rate")
  axes.set_ylabel(LOSS)
  axes.grid(alpha=0.3)
  axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _by_rank(sweep: Sequence[Group], metrics: Sequence[str], figure: SubFigure) -> None:
  has_paper = data_name(sweep[0].first) == "e2e"
  beside = ", LoRA on the paper's GPT-2 medium, Table 18 (right axes)" if has_paper else ""
  figure.suptitle(f"By rank: {sweep[0].method.label} in these runs (left axes){beside}")
  ranks = [group.settings["lora.rank"] for group in sweep]
  for name, axes in _panels(figure, sweep, metrics, share=False).items():
    statistics = [group.statistic(name) for group in sweep]
    known = [(rank, value) for rank, value in zip(ranks, statistics, strict=True) if value]
    axes.errorbar(
      [rank for rank, _ in known],
      [value.mean for _, value in known],
      yerr=[value.deviation or 0.0 for _, value in known],
      fmt="o-",
      color=RUNS,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("rank")
    axes.set_title(_title(name), fontsize="medium")
    axes.tick_params(axis="y", labelcolor=RUNS)
    if not has_paper or name not in paper_tables.NAMES_18:
      continue
    right = axes.twinx()
    paper = {rank: row[name] for rank, row in paper_tables.TABLE_18.items() if rank <= max(ranks)}
    right.plot(list(paper), list(paper.values()), "s--", color=PAPER, alpha=0.7)
    right.tick_params(axis="y", labelcolor=PAPER)


def _by_budget(
  budgets: Mapping[str, Mapping[int, Group]], metrics: Sequence[str], figure: SubFigure
) -> None:
  figure.suptitle("By the base model's pretraining; leftmost: random weights")
  groups = [group for members in budgets.values() for group in members.values()]
  known = sorted({tokens for members in budgets.values() for tokens in members if tokens})
  panels = _panels(figure, groups, metrics, share=False)
  for name, axes in panels.items():
    for label, members in budgets.items():
      statistics = [(tokens, group.statistic(name)) for tokens, group in members.items()]
      points = [(tokens, value) for tokens, value in statistics if value]
      axes.errorbar(
        [tokens for tokens, _ in points],
        [value.mean for _, value in points],
        yerr=[value.deviation or 0.0 for _, value in points],
        fmt="o-",
        label=label,
      )
    if known:
      axes.set_xscale("symlog", linthresh=known[0])
    axes.set_xlabel("pretraining tokens")
    axes.set_title(_title(name), fontsize="medium")
    axes.grid(alpha=0.3)
  list(panels.values())[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _by_bits(
  families: Mapping[str, Mapping[float, Group]], float_runs: Mapping[str, Group], figure: SubFigure
) -> None:
  figure.suptitle("By the bits of the base model's linear weights; dashed: not rounded")
  names = {"valid_loss": LOSS, "slot_error_rate": SLOT_ERRORS}
  panels = figure.subplots(1, len(names), squeeze=False)[0]
  for axes, (name, title) in zip(panels, names.items(), strict=True):
    for label, members in families.items():
      known = [(bits, value.mean) for bits, g in members.items() if (value := g.statistic(name))]
      axes.plot([bits for bits, _ in known], [mean for _, mean in known], "o-", label=label)
    for i, (label, group) in enumerate(float_runs.items()):
      if (value := group.statistic(name)) is not None:
        style = {"color": f"C{len(families) + i}", "label": f"{label}, not rounded"}
        axes.axhline(value.mean, linestyle="--", **style)
    axes.set_xlabel("bits per weight, scales included")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
  panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
