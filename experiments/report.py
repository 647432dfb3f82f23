"""Compares finished runs with each other and with the paper: a table, a CSV file and a plot.

    python -m experiments.report FOLDERS... [--out=report] [--against=FOLDER] [--losses]

Runs that differ only in their seed are one row, and each data set has tables of its own. Every
number is read from the runs' folders; unfinished runs are listed. Writes OUT.md, OUT.csv and
OUT.png; with several data sets a plot for each, OUT-NAME.png.

Runs that have their losses by input are compared with a control, with verdicts by validation loss
and by BLEU (comparison/verdicts.py). `--losses` measures them where they are missing.

Time: seconds; with Java a few more for METEOR; with `--losses` an evaluation of each run.
Expect: the tables of docs/gpt2_e2e.md, from the runs that are listed there.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.comparison.verdicts import decide, measure
from experiments.harness import paper as paper_tables
from experiments.harness import table
from experiments.harness.config import read_output
from experiments.harness.launch import explained, make_parser
from experiments.harness.runs import Run, joined_values, read_runs
from experiments.nlg.config import E2EConfig, FinetuneConfig, TemplateConfig, Texts
from experiments.nlg.e2e import decoded_inputs, measure_parts, read_predictions
from experiments.nlg.figure import draw
from experiments.nlg.groups import (
  ROUNDED,
  Group,
  by_bits,
  by_budget,
  by_rank,
  by_rate,
  data_name,
  group_runs,
  texts_of,
  unrounded,
)
from experiments.nlg.paper_rows import PAPER, TABLES, PaperTable
from experiments.nlg.report_csv import write_csv
from experiments.nlg.scores import (
  FLOOR,
  digits,
  header,
  model_label,
  number,
  reaches_floor,
)
from experiments.nlg.tasks.table import TASKS, title
from experiments.nlg.tasks.task import by_name
from lora_jax.data.sets.e2e import Split
from lora_jax.fields import NonEmptyPath, read_value
from lora_jax.metrics import Difference, differences

PAPER_MODELS = {"GPT-2 medium", "GPT-2 large"}


def report(
  folders: Sequence[str | Path],
  out: str | Path,
  against: str | Path | None = None,
  losses: bool = False,
) -> str:
  """Writes the report of some runs; returns its text.

  Args:
    folders: the runs' folders.
    out: the files' path without the ending.
    against: the run that the others are compared with; None is the first seed of the group with
      the smallest validation loss among LoRA and its variants.
    losses: whether to measure the losses by input of runs that lack them.
  Raises:
    FileNotFoundError: if a folder is not the folder of a run.
    ValueError: if no run is finished, one is of another experiment, two are the same, `against` is
      none of them, or the files cannot be written.
  """
  out = read_output("--out", out, ".md", ".csv", ".png")
  for folder in folders:
    read_value(NonEmptyPath, str(folder), "the folder of a run")
  if against is not None:
    read_value(NonEmptyPath, str(against), "--against")
  runs, unfinished = read_runs(folders)
  by_data: dict[str, list[Run]] = defaultdict(list)
  for run in runs:
    by_data[_title(run)].append(run)
  holder = _holder(by_data, against)
  parts, groups = [unfinished, measure(runs) if losses else ""], []
  out.parent.mkdir(parents=True, exist_ok=True)
  for name, of_data in by_data.items():
    of_name = group_runs(of_data)
    ending = "" if len(by_data) == 1 else f"-{data_name(of_data[0])}"
    parts.append(
      _section(name, of_name, of_data, against if name == holder else None, f"{out}{ending}.png")
    )
    groups += of_name
  parts.append(_origin(runs))
  text = "\n\n".join(part for part in parts if part) + "\n"
  Path(f"{out}.md").write_text(text, "utf-8")
  metrics = dict.fromkeys(name for group in groups for name in _metrics(group.first))
  whole = set(map(data_name, runs))
  write_csv(Path(f"{out}.csv"), groups, list(metrics), [name for name in TABLES if name in whole])
  return text


def _section(
  name: str, groups: Sequence[Group], runs: Sequence[Run], against: str | Path | None, plot: str
) -> str:
  """Returns the report of one data set's runs, and draws their plot."""
  rates, sweeps, budgets = by_rate(groups), by_rank(groups), by_budget(groups)
  bits = by_bits(groups)
  parts = [f"# {name}: {len(runs)} runs in {len(groups)} groups", _results(groups)]
  if any(group.first.is_decoded for group in groups):
    printed = _paper_table(runs[0])
    parts += [_over_inputs(groups), _compared(groups, runs, against)]
    parts.append(_paper(printed, runs) if printed else "")
  parts += [decide(groups, against), _rates(rates) if rates else "", *map(_ranks, sweeps)]
  parts += [_budgets(budgets) if budgets else "", _bits(bits, groups) if bits else ""]
  draw(Path(plot), groups, _metrics(runs[0]), rates, sweeps, budgets, bits)
  return "\n\n".join(part for part in parts if part)


def _holder(by_data: Mapping[str, Sequence[Run]], against: str | Path | None) -> str | None:
  """Returns the title of the data set that has the run `against`; None without one.

  Raises:
    ValueError: if that run is none of them, or has decoded nothing.
  """
  if against is None:
    return None
  decoded = {
    run.folder.resolve(): (name, run)
    for name, runs in by_data.items()
    for run in runs
    if run.is_decoded
  }
  if not decoded:
    raise ValueError("--against compares decoded texts, and none of the runs has decoded any")
  if Path(against).resolve() not in decoded:
    known = ", ".join(str(run.folder) for _, run in decoded.values())
    raise ValueError(f"--against={against} must be one of the runs that decoded texts: {known}")
  return decoded[Path(against).resolve()][0]


def _title(run: Run) -> str:
  """Returns the name of a run's results: its data set, or finetune.

  Raises:
    ValueError: if the run is of an experiment whose results are not compared here.
  """
  texts, name = texts_of(run), data_name(run)
  if texts is None and name != FinetuneConfig.NAME:
    known = ", ".join(kind.NAME for kind in (E2EConfig, TemplateConfig, FinetuneConfig))
    raise ValueError(f"{run.folder} is a run of {name}; expected one of {known}")
  return name if texts is None else title(texts)


def _metrics(run: Run) -> tuple[str, ...]:
  texts = texts_of(run)
  return () if texts is None else TASKS[texts.name].metrics


def _paper_table(run: Run) -> PaperTable | None:
  """Returns the paper's table of a run's data set; None for an excerpt of it."""
  texts = texts_of(run)
  return None if texts is None or texts.any_size else TABLES.get(texts.name)


def _results(groups: Sequence[Group]) -> str:
  metrics = ["valid_loss"]
  if any(group.first.is_decoded for group in groups):
    metrics += _metrics(groups[0].first)
  head = ["run", "trainable", "examples", "learning rate", "seeds", *map(header, metrics)]
  rows = [
    [
      group.label,
      f"{group.first.result['trainable_parameters']:,}",
      f"{group.first.result['num_train_records']:,}",
      "" if group.rate is None else f"{group.rate:g}",
      str(len(group.runs)),
      *(_statistic(group, name) for name in metrics),
    ]
    for group in groups
  ]
  note = (
    "Means over the seeds, ± their sample standard deviation if there are several. Validation loss "
    "in nats/token. The order of the rows is not a ranking; other machines change values as other "
    "seeds do (docs/gpt2_e2e.md)."
  )
  return f"## Results\n\n{table.aligned([head, *rows])}\n\n{note}"


def _statistic(group: Group, name: str) -> str:
  statistic = group.statistic(name)
  if statistic is None:
    return ""
  deviation = statistic.deviation
  return number(name, statistic.mean) + (
    "" if deviation is None else f" ± {number(name, deviation)}"
  )


def _over_inputs(groups: Sequence[Group]) -> str:
  metrics = _metrics(groups[0].first)
  head = ["run", "seed", "inputs", *map(header, metrics)]
  floors = {_inputs(group.first): group.first for group in groups if group.method.is_floor}
  rows = [
    [
      group.label,
      str(group.first.seed),
      f"{group.first.result['num_inputs']:,}",
      *(_interval(group.first, name, floors.get(_inputs(group.first))) for name in metrics),
    ]
    for group in groups
    if group.first.is_decoded
  ]
  note = (
    "The first seed of each group: its score and the 95 % bootstrap interval over the inputs, "
    "which does not cover other seeds or machines."
  )
  if "slot_error_rate" in metrics:
    note += " SER is the slot error rate, x 100, by patterns (lora_jax/metrics/slots.py)"
    rates = {
      run.result["reference_slot_error_rate"]
      for group in groups
      for run in group.runs
      if "reference_slot_error_rate" in run.result
    }
    note += "".join(f"; the references have {rate:.2f}" for rate in sorted(rates)) + "."
  if floors:
    (floor, *_) = floors.values()
    note += (
      f" The floor needs no model: {floor.result['floor_texts']}. {FLOOR} marks intervals that "
      "reach it: such a score shows nothing that was learned, and has no rank."
    )
    without = [g.label for g in groups if g.first.is_decoded and _inputs(g.first) not in floors]
    if without:
      note += f" Without a floor on the same inputs: {'; '.join(without)}."
  return f"## Over the inputs\n\n{table.aligned([head, *rows])}\n\n{note}"


def _interval(run: Run, name: str, floor: Run | None) -> str:
  value, interval = run.value(name), run.interval(name)
  if value is None or interval is None:
    return ""
  low, high = (number(name, end) for end in interval)
  mark = FLOOR if floor is not None and _reaches(run, name, floor) else ""
  return f"{number(name, value)} [{low}, {high}]{mark}"


def _reaches(run: Run, name: str, floor: Run) -> bool:
  """Tells whether a run's interval reaches the score of the floor on the same inputs."""
  level, interval = floor.value(name), run.interval(name)
  if run is floor or level is None or interval is None:
    return False
  return reaches_floor(name, interval, level)


def _compared(groups: Sequence[Group], runs: Sequence[Run], against: str | Path | None) -> str:
  decoded = [group for group in groups if group.first.is_decoded]
  chosen = _reference(decoded, against)
  if chosen is None:
    return "No LoRA run was decoded; `--against=FOLDER` names a run to compare the others with."
  label, reference = chosen
  inputs = _inputs(reference)
  other_runs = [
    group.first for group in decoded if group.label != label and _inputs(group.first) == inputs
  ]
  left_out = [group.label for group in decoded if _inputs(group.first) != inputs]
  if not other_runs:
    return ""
  labels = {run.folder: group.label for group in decoded for run in group.runs}
  compared = compare(other_runs, reference)
  metrics = [name for name in _metrics(reference) if name in compared[0]]
  rows = [["run", *map(header, metrics)]]
  rows += [
    [labels[run.folder], *(_difference(name, difference[name]) for name in metrics)]
    for run, difference in zip(other_runs, compared, strict=True)
  ]
  note = (
    "Differences from it on the same inputs, first seeds, with 95 % paired bootstrap intervals "
    "over the inputs; ° marks those that contain zero. The intervals do not cover other seeds or "
    "machines, so a difference without ° may be noise too."
  )
  if left_out:
    note += f" Left out, since they decoded other inputs: {'; '.join(left_out)}."
  heading = f"## Against {label}, seed {reference.seed}"
  return f"{heading}\n\n{table.aligned(rows)}\n\n{note}"


def compare(runs: Sequence[Run], reference: Run) -> list[dict[str, Difference | None]]:
  """Returns each run's scores minus those of another one, all decoded on the same inputs."""
  texts, split, count = _inputs(reference)
  inputs = decoded_inputs(texts, split, count)
  systems = [read_predictions(run.folder, len(inputs)) for run in (*runs, reference)]
  *measured, last = measure_parts(systems, inputs, texts, split)
  return [
    by_name({part: differences(parts[part], last[part]) for part in parts}) for parts in measured
  ]


def _reference(decoded: Sequence[Group], against: str | Path | None) -> tuple[str, Run] | None:
  """Returns the run that the others are compared with, and its group's label."""
  if against is None:
    low_rank = [group for group in decoded if group.is_low_rank]
    if not low_rank:
      return None
    best = min(low_rank, key=lambda group: group.loss)
    return best.label, best.first
  path = Path(against).resolve()
  return next(
    (group.label, run) for group in decoded for run in group.runs if run.folder.resolve() == path
  )


def _inputs(run: Run) -> tuple[Texts, Split, int]:
  """Returns what a run has decoded: its data set, split, and the number of inputs."""
  texts = texts_of(run)
  assert texts is not None, "a run without a data set decodes none of its inputs"
  return texts, run.settings["decoding.split"], run.settings["decoding.num_inputs"]


def _difference(name: str, difference: Difference | None) -> str:
  if difference is None:
    return ""
  ends = (difference.difference, difference.low, difference.high)
  value, low, high = (f"{end:+.{digits(name)}f}" for end in ends)
  return f"{value} [{low}, {high}]" + ("°" if difference.low <= 0 <= difference.high else "")


def _paper(printed: PaperTable, runs: Sequence[Run]) -> str:
  head = ["the paper's models", "trainable", *map(header, printed.metrics)]
  rows = [
    [row.label, row.trainable, *(_printed(name, row.scores[name]) for name in printed.metrics)]
    for row in printed.rows
  ]
  note = f"{printed.name} of the paper ({PAPER}): {printed.about}. {_models(runs)}"
  return f"## The paper's {printed.name}\n\n{table.aligned([head, *rows])}\n\n{note}"


def _models(runs: Sequence[Run]) -> str:
  """Returns a sentence on the base models of runs, compared with the paper's."""
  labels = {model_label(run.result["variant"]) for run in runs if run.result.get("variant")}
  if same := sorted(labels & PAPER_MODELS):
    return f"The runs of {' and '.join(same)} above adapt one of these models, the others do not."
  if not labels:
    return "No run above adapts one of these models."
  return f"These are other models than those above: {', '.join(sorted(labels))}."


def _printed(name: str, value: paper_tables.Value) -> str:
  """Returns a figure with the digits that the paper prints."""
  digits = 2 if name in ("nist", "cider") else 1
  spread = "" if value.deviation is None else f" ± {value.deviation:.{digits}f}"
  return f"{value.mean:.{digits}f}{spread}"


def _rates(families: Mapping[str, Sequence[Group]]) -> str:
  cells = {
    label: {group.rate or 0.0: _statistic(group, "valid_loss") for group in members}
    for label, members in families.items()
  }
  best = {
    label: min(members, key=lambda group: group.loss).rate or 0.0
    for label, members in families.items()
  }
  return f"## By learning rate\n\n{table.by_rate('validation loss', cells, best)}"


def _ranks(sweep: Sequence[Group]) -> str:
  values = ("valid_loss", *_metrics(sweep[0].first))
  names = [name for name in values if any(group.statistic(name) for group in sweep)]
  has_paper = data_name(sweep[0].first) == "e2e"
  sources = ("", " (paper)") if has_paper else ("",)
  head = ["rank", "trainable", "learning rate"]
  head += [f"{header(name)}{source}" for name in names for source in sources]
  rows = []
  for group in sweep:
    rank = group.settings["lora.rank"]
    paper = paper_tables.TABLE_18.get(rank, {})
    cells = [str(rank), f"{group.first.result['trainable_parameters']:,}", f"{group.rate:g}"]
    for name in names:
      cells += [_statistic(group, name), number(name, paper.get(name))][: len(sources)]
    rows.append(cells)
  text = f"## By rank: {sweep[0].method.label}\n\n{table.aligned([head, *rows])}"
  if not has_paper:
    return text
  return (
    f"{text}\n\n(paper): Table 18 of {PAPER}: GPT-2 medium, LoRA on q and v, 26,000 steps. It is "
    "another model: compare how the values change with the rank, not the values."
  )


def _budgets(families: Mapping[str, Mapping[int, Group]]) -> str:
  budgets = sorted({tokens for members in families.values() for tokens in members})
  columns = [
    (name, label)
    for name in ("valid_loss", *_metrics(_any_group(families).first)[:1])
    if any(group.statistic(name) for members in families.values() for group in members.values())
    for label in families
  ]
  rows = [["pretraining tokens", *(f"{label}: {header(name)}" for name, label in columns)]]
  for tokens in budgets:
    cells = [
      _statistic(families[label][tokens], name) if tokens in families[label] else ""
      for name, label in columns
    ]
    rows.append([f"{tokens:,}", *cells])
  parts = ["## By pretraining", table.aligned(rows), _gaps(families, budgets)]
  return "\n\n".join(part for part in parts if part)


def _bits(families: Mapping[str, Mapping[float, Group]], groups: Sequence[Group]) -> str:
  head = ["adapter", "weights rounded to", "bits", header("valid_loss"), "SER"]
  rows = [
    [label, group.settings[ROUNDED], f"{bits:.3g}", *_loss_and_errors(group)]
    for label, members in families.items()
    for bits, group in members.items()
  ]
  rows += [[label, "", "", *_loss_and_errors(group)] for label, group in unrounded(groups).items()]
  return f"## By bits of the base model's linear weights\n\n{table.aligned([head, *rows])}"


def _any_group(families: Mapping[str, Mapping[int, Group]]) -> Group:
  return next(group for members in families.values() for group in members.values())


def _loss_and_errors(group: Group) -> list[str]:
  return [_statistic(group, name) for name in ("valid_loss", "slot_error_rate")]


def _gaps(families: Mapping[str, Mapping[int, Group]], budgets: Sequence[int]) -> str:
  """Returns a table of the first metric: full fine-tuning minus other methods, by base model."""
  metrics = _metrics(_any_group(families).first)
  if not metrics:
    return ""
  metric = metrics[0]
  full: Mapping[int, Group] = next(
    (
      members
      for members in families.values()
      if all(group.method.owns_base for group in members.values())
    ),
    {},
  )
  other_families = {label: members for label, members in families.items() if members is not full}
  rows = [[f"{header(metric)} of full fine-tuning minus that of", *other_families]]
  for tokens in budgets:
    if tokens not in full or not full[tokens].first.is_decoded:
      continue
    run, cells = full[tokens].first, []
    for members in other_families.values():
      other = members[tokens].first if tokens in members else None
      if other is None or not other.is_decoded or _inputs(other) != _inputs(run):
        cells.append("")
      else:
        cells.append(_difference(metric, compare([run], other)[0][metric]))
    rows.append([f"{tokens:,} tokens", *cells])
  note = (
    "First seeds, with 95 % paired bootstrap intervals over the inputs, which do not cover other "
    "seeds or machines; ° contains zero."
  )
  heading = "## Full fine-tuning against the other methods, by pretraining"
  return f"{heading}\n\n{table.aligned(rows)}\n\n{note}" if len(rows) > 1 and other_families else ""


def _origin(runs: Sequence[Run]) -> str:
  devices, versions, commits = (joined_values(runs, n) for n in ("device", "jax", "commit"))
  hours = sum(run.result.get("seconds", 0.0) for run in runs) / 3600
  lines = [
    f"- devices: {devices}; JAX {versions}; commits {commits}",
    f"- {hours:.2f} hours in total",
  ]
  missing = {
    f"- no {header(name)}: {reason}"
    for run in runs
    for name, reason in run.result.get("scores", {}).get("missing", {}).items()
  }
  return "## Provenance\n\n" + "\n".join([*lines, *sorted(missing)])


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("report", __doc__)
  parser.add_argument("folders", nargs="+", help="the runs' folders, such as runs/e2e_budgets/*")
  parser.add_argument("--out", default="report", help="the files to write, without the ending")
  parser.add_argument("--against", help="the run that the others are compared with")
  about = "measure the losses by input of runs that lack them"
  parser.add_argument("--losses", action="store_true", help=about)
  options = parser.parse_args(arguments)
  with explained():
    print(report(options.folders, options.out, options.against, options.losses))
  print(
    f"wrote {options.out}.md and {options.out}.csv, and each data set's plot: {options.out}*.png"
  )


if __name__ == "__main__":
  main()
