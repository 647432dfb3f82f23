"""Sets finished runs beside each other and beside the paper: a table, a CSV file and a plot.

    python -m experiments.report FOLDERS... [--out=report] [--against=FOLDER]

Runs that differ in their seed alone are one row. Every figure is read from the runs' folders;
those that are not finished are named as such. OUT.md, OUT.csv and OUT.png are written.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from experiments.gpt2_e2e import decoded_inputs
from experiments.harness import paper as paper_tables
from experiments.harness import table
from experiments.harness.figure import draw
from experiments.harness.groups import BASE, RATE, TOKENS, Group, Run, group, read_runs
from experiments.harness.launch import explained
from experiments.harness.report_csv import write_csv
from experiments.harness.workdir import read_config
from lora_jax.metrics import Difference, differences, measure

VALUES = ("valid_loss", *table.METRICS)
HEADS = ("valid loss", *table.METRICS.values())
INPUTS = ("data.form", "data.source", "decoding.split", "decoding.num_inputs")
PAPER = "Hu et al. 2021, arXiv 2106.09685v2"


def report(
  folders: Sequence[str | Path], out: str | Path, against: str | Path | None = None
) -> str:
  """Writes the report of some runs; returns its text.

  Args:
    folders: of runs.
    out: the files' path without their ending.
    against: the run that the others are compared with; None is the first seed of the LoRA
      group with the smallest validation loss.
  Raises:
    FileNotFoundError: if a folder is not the folder of a run.
    ValueError: if no run is finished, two are the same, or `against` is none of them.
  """
  runs, unfinished = read_runs(folders)
  if not runs:
    raise ValueError(f"none of the {len(folders)} runs is finished; there is nothing to report")
  groups = group(runs)
  rates, sweeps, budgets = by_rate(groups), by_rank(groups), by_budget(groups)
  parts = [f"# {len(runs)} runs in {len(groups)} groups", _unfinished(unfinished), _results(groups)]
  if any(one.first.is_decoded for one in groups):
    parts += [_over_inputs(groups), _compared(groups, runs, against), _paper()]
  elif against is not None:
    raise ValueError("--against compares decoded texts, and none of the runs has any")
  parts += [_rates(rates) if rates else "", *map(_ranks, sweeps)]
  parts += [_budgets(budgets) if budgets else "", _origin(runs)]
  text = "\n\n".join(part for part in parts if part) + "\n"
  out = Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  Path(f"{out}.md").write_text(text, "utf-8")
  write_csv(Path(f"{out}.csv"), groups)
  draw(Path(f"{out}.png"), groups, rates, sweeps, budgets)
  return text


def by_rate(groups: Sequence[Group]) -> dict[str, list[Group]]:
  """Returns the groups that differ in their learning rate alone, by label, from the lowest."""
  families: dict[str, list[Group]] = defaultdict(list)
  for one in groups:
    if one.rate is not None:
      families[one.family].append(one)
  return {
    label: sorted(members, key=lambda one: one.rate or 0.0)
    for label, members in families.items()
    if len({one.rate for one in members}) > 1
  }


def by_rank(groups: Sequence[Group]) -> list[list[Group]]:
  """Returns the sets of LoRA groups that differ in their rank, from the lowest.

  Either alpha is the same in all of a set, or alpha / rank. Of several learning rates, a rank has
  the one with the smallest validation loss.
  """
  sweeps: dict[str, dict[int, Group]] = defaultdict(dict)
  for one in sorted(groups, key=_loss, reverse=True):  # so that the best comes last
    if one.method == "lora":
      rest = {name: value for name, value in one.settings.items() if name != RATE}
      rank = rest.pop("lora.rank")
      sweeps[repr(sorted(rest.items()))][rank] = one
      rest["lora.alpha"] = ("times the rank", rest["lora.alpha"] / rank)
      sweeps[repr(sorted(rest.items(), key=repr))][rank] = one
  return [[sweep[rank] for rank in sorted(sweep)] for sweep in sweeps.values() if len(sweep) > 1]


def by_budget(groups: Sequence[Group]) -> dict[str, dict[int, Group]]:
  """Returns the groups that differ in their base alone, by method and pretraining tokens.

  Groups whose base does not say how many these were are left out, and methods with one base
  alone. Of several learning rates, a base has the one with the smallest validation loss.
  """
  families: dict[tuple[str, str], dict[int, Group]] = defaultdict(dict)
  for one in sorted(groups, key=_loss, reverse=True):  # so that the best comes last
    tokens = one.settings.get(TOKENS)
    if tokens is not None:
      base = {RATE, TOKENS, *BASE}
      rest = {name: value for name, value in one.settings.items() if name not in base}
      families[one.method_label, repr(sorted(rest.items()))][tokens] = one
  order = list(dict.fromkeys(one.method_label for one in groups))
  named = sorted(families.items(), key=lambda item: order.index(item[0][0]))
  several = Counter(label for (label, _), members in named if len(members) > 1)
  found: dict[str, dict[int, Group]] = {}
  for (label, _), members in named:
    if len(members) > 1:
      name = label + (f", {_lines(members)} lines" if several[label] > 1 else "")
      same = sum(other.startswith(name) for other in found)
      found[name + (f" ({same + 1})" if same else "")] = dict(sorted(members.items()))
  return found


def _lines(members: dict[int, Group]) -> str:
  return f"{next(iter(members.values())).first.result['num_train_records']:,}"


def _unfinished(folders: Sequence[Path]) -> str:
  if not folders:
    return ""
  return f"Not finished: {', '.join(f'`{folder}`' for folder in folders)}."


def _results(groups: Sequence[Group]) -> str:
  shown = VALUES if any(one.first.is_decoded for one in groups) else VALUES[:1]
  head = ["what", "trainable", "lines", "learning rate", "seeds", *HEADS[: len(shown)]]
  rows = [
    [
      one.label,
      f"{one.first.result['trainable_parameters']:,}",
      f"{one.first.result['num_train_records']:,}",
      "" if one.rate is None else f"{one.rate:g}",
      str(len(one.runs)),
      *(_statistic(one, name) for name in shown),
    ]
    for one in groups
  ]
  note = (
    "Means over the seeds, ± their sample standard deviation where there are several. Validation "
    "loss in nats a token."
  )
  return f"## Results\n\n{table.aligned([head, *rows])}\n\n{note}"


def _statistic(one: Group, name: str) -> str:
  found = one.statistic(name)
  if found is None:
    return ""
  spread = "" if found.deviation is None else f" ± {table.number(name, found.deviation)}"
  return table.number(name, found.mean) + spread


def _over_inputs(groups: Sequence[Group]) -> str:
  head = ["what", "seed", "inputs", *table.METRICS.values()]
  rows = [
    [
      one.label,
      str(one.first.seed),
      f"{one.first.result['num_inputs']:,}",
      *(_interval(one.first, name) for name in table.METRICS),
    ]
    for one in groups
    if one.first.is_decoded
  ]
  note = (
    "Of each group's first seed alone: its score and the 95 % bootstrap interval over the inputs. "
    "It says how much depends on which inputs were drawn, and nothing about another seed."
  )
  return f"## Over the inputs\n\n{table.aligned([head, *rows])}\n\n{note}"


def _interval(run: Run, name: str) -> str:
  value, found = run.value(name), run.interval(name)
  if value is None or found is None:
    return ""
  low, high = (table.number(name, end) for end in found)
  return f"{table.number(name, value)} [{low}, {high}]"


def _compared(groups: Sequence[Group], runs: Sequence[Run], against: str | Path | None) -> str:
  decoded = [one for one in groups if one.first.is_decoded]
  chosen = _reference(decoded, runs, against)
  if chosen is None:
    return "No LoRA group was decoded; `--against=FOLDER` names a run to compare the others with."
  label, reference = chosen
  wanted = _inputs(reference)
  others = [one.first for one in decoded if one.label != label and _inputs(one.first) == wanted]
  left_out = [one.label for one in decoded if _inputs(one.first) != wanted]
  if not others:
    return ""
  labels = {run.folder: one.label for one in decoded for run in one.runs}
  head = ["what", *table.METRICS.values()]
  found = compare(others, reference)
  rows = [
    [labels[run.folder], *(_difference(name, of_run[name]) for name in table.METRICS)]
    for run, of_run in zip(others, found, strict=True)
  ]
  note = (
    "Differences from it on the same inputs, first seeds, with their 95 % paired bootstrap "
    "intervals; ° marks those that hold zero."
  )
  if left_out:
    note += f" Decoded on other inputs, and left out: {'; '.join(left_out)}."
  title = f"## Against {label}, seed {reference.seed}"
  return f"{title}\n\n{table.aligned([head, *rows])}\n\n{note}"


def compare(runs: Sequence[Run], reference: Run) -> list[dict[str, Difference | None]]:
  """Returns each run's scores minus those of another one, all decoded on the same inputs."""
  inputs = decoded_inputs(read_config(reference.folder))
  texts = [_texts(run, len(inputs)) for run in (*runs, reference)]
  *measured, last = measure(texts, [one.references for one in inputs])
  return [differences(one, last) for one in measured]


def _reference(
  decoded: Sequence[Group], runs: Sequence[Run], against: str | Path | None
) -> tuple[str, Run] | None:
  """Returns the run that the others are compared with, and its group's label."""
  if against is None:
    lora = [one for one in decoded if one.method == "lora"]
    if not lora:
      return None
    best = min(lora, key=_loss)
    return best.label, best.first
  path = Path(against).resolve()
  for one in decoded:
    for run in one.runs:
      if run.folder.resolve() == path:
        return one.label, run
  known = ", ".join(str(run.folder) for run in runs if run.is_decoded)
  raise ValueError(f"--against={against} is none of the given runs with decoded texts: {known}")


def _loss(one: Group) -> float:
  found = one.statistic("valid_loss")
  return float("inf") if found is None else found.mean


def _inputs(run: Run) -> tuple[object, ...]:
  return tuple(run.settings.get(name) for name in INPUTS)


def _texts(run: Run, count: int) -> list[str]:
  path = run.folder / "predictions.txt"
  texts = path.read_text("utf-8").removesuffix("\n").split("\n")
  if len(texts) != count:
    raise ValueError(f"{path}: expected {count} lines, one for each input, got {len(texts)}")
  return texts


def _difference(name: str, found: Difference | None) -> str:
  if found is None:
    return ""
  value, low, high = (
    f"{number:+.{table.DIGITS[name]}f}" for number in (found.difference, found.low, found.high)
  )
  return f"{value} [{low}, {high}]" + ("°" if found.low <= 0 <= found.high else "")


def _paper() -> str:
  head = ["the paper's models", "trainable", *table.METRICS.values()]
  rows = [
    [row.what, row.trainable, *map(_printed, table.METRICS, row[2:])]
    for row in paper_tables.TABLE_3
  ]
  note = (
    f"Table 3 of the paper ({PAPER}): GPT-2 medium (355 M parameters) and large (774 M), trained "
    "on all lines for 5 epochs. Other models than those above, set here as a landmark alone. "
    "* was taken by the paper from earlier work."
  )
  return f"## The paper's Table 3\n\n{table.aligned([head, *rows])}\n\n{note}"


def _printed(name: str, value: paper_tables.Value) -> str:
  """Returns a figure with the digits that the paper prints."""
  digits = 2 if name in ("nist", "cider") else 1
  spread = "" if value.deviation is None else f" ± {value.deviation:.{digits}f}"
  return f"{value.mean:.{digits}f}{spread}"


def _rates(families: dict[str, list[Group]]) -> str:
  cells = {
    label: {one.rate or 0.0: _statistic(one, "valid_loss") for one in members}
    for label, members in families.items()
  }
  best = {label: min(members, key=_loss).rate or 0.0 for label, members in families.items()}
  return f"## By learning rate\n\n{table.by_rate('validation loss', cells, best)}"


def _ranks(sweep: Sequence[Group]) -> str:
  names = [name for name in VALUES if any(one.statistic(name) for one in sweep)]
  heads = dict(zip(VALUES, HEADS, strict=True))
  head = ["rank", "trainable", "learning rate"]
  head += [f"{heads[name]}{whose}" for name in names for whose in ("", " (paper)")]
  rows = []
  for one in sweep:
    rank = one.settings["lora.rank"]
    paper = paper_tables.TABLE_18.get(rank, {})
    cells = [str(rank), f"{one.first.result['trainable_parameters']:,}", f"{one.rate:g}"]
    for name in names:
      cells += [_statistic(one, name), table.number(name, paper.get(name))]
    rows.append(cells)
  note = (
    f"(paper): Table 18 of {PAPER}: GPT-2 medium, LoRA on q and v, 26,000 steps. Another model: "
    "what can be compared is how the values move with the rank, not the values."
  )
  return f"## By rank\n\n{table.aligned([head, *rows])}\n\n{note}"


def _budgets(families: dict[str, dict[int, Group]]) -> str:
  budgets = sorted({tokens for members in families.values() for tokens in members})
  names = [
    name
    for name in ("valid_loss", "bleu")
    if any(one.statistic(name) for members in families.values() for one in members.values())
  ]
  heads = dict(zip(VALUES, HEADS, strict=True))
  rows = [["pretraining tokens", *(f"{label}: {heads[n]}" for n in names for label in families)]]
  for tokens in budgets:
    found = (members.get(tokens) for _ in names for members in families.values())
    cells = zip((name for name in names for _ in families), found, strict=True)
    rows.append([f"{tokens:,}", *("" if one is None else _statistic(one, n) for n, one in cells)])
  parts = ["## By pretraining", table.aligned(rows), _gaps(families, budgets)]
  return "\n\n".join(part for part in parts if part)


def _gaps(families: dict[str, dict[int, Group]], budgets: Sequence[int]) -> str:
  """Returns full fine-tuning less the other methods on each base, over the inputs."""
  of_full = (
    members
    for members in families.values()
    if all(one.method == "full_finetuning" for one in members.values())
  )
  full = next(of_full, {})
  others = {label: members for label, members in families.items() if members is not full}
  rows = [["BLEU of full fine-tuning less that of", *others]]
  for tokens in budgets:
    if tokens not in full or not full[tokens].first.is_decoded:
      continue
    run, cells = full[tokens].first, []
    for members in others.values():
      other = members[tokens].first if tokens in members else None
      if other is None or not other.is_decoded or _inputs(other) != _inputs(run):
        cells.append("")
      else:
        cells.append(_difference("bleu", compare([run], other)[0]["bleu"]))
    rows.append([f"{tokens:,} tokens", *cells])
  note = "First seeds, with 95 % paired bootstrap intervals over the inputs; ° holds zero."
  title = "## Full fine-tuning against the other methods, by pretraining"
  return f"{title}\n\n{table.aligned(rows)}\n\n{note}" if len(rows) > 1 and others else ""


def _origin(runs: Sequence[Run]) -> str:
  def all_of(name: str) -> str:
    return ", ".join(sorted({str(run.result[name]) for run in runs if run.result.get(name)}))

  hours = sum(run.result.get("seconds", 0.0) for run in runs) / 3600
  lines = [f"- devices: {all_of('device')}; JAX {all_of('jax')}; commits {all_of('commit')}"]
  lines += [f"- {hours:.2f} hours in all"]
  missing = {
    f"- no {table.METRICS[name]}: {reason}"
    for run in runs
    for name, reason in run.result.get("scores", {}).get("missing", {}).items()
  }
  return "## How they were made\n\n" + "\n".join([*lines, *sorted(missing)])


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folders", nargs="+", help="of runs, as runs/e2e_budgets/*")
  parser.add_argument("--out", default="report", help="the files to write, without their ending")
  parser.add_argument("--against", help="the run that the others are compared with")
  parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
  given = parser.parse_args(arguments)
  with explained():
    print(report(given.folders, given.out, given.against))
  print(f"wrote {given.out}.md, {given.out}.csv and {given.out}.png")


if __name__ == "__main__":
  main()
