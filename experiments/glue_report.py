"""Compares finished runs of `experiments.glue` with each other and with the paper's Table 2.

    python -m experiments.glue_report FOLDERS... [--out=glue.md]

Runs that differ only in their seed are one cell: the median over the seeds of the best epoch's
score, as in the paper, and in brackets that of the last epoch. Tuning runs have their own table.
Every number is read from the runs' folders.

Time: seconds.
Expect: the tables of docs/glue.md, from the runs that are listed there.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from experiments.harness import paper as paper_tables
from experiments.harness import table
from experiments.harness.config import read_output
from experiments.harness.launch import explained, make_parser
from experiments.harness.runs import Run, joined_values, read_runs
from lora_jax.fields import NonEmptyPath, read_value

NAMES = {"matthews": "Matthews", "pearson": "Pearson", "accuracy": "accuracy"}
Cells = dict[tuple[str, str], dict[str, list[Run]]]


def report(folders: Sequence[str | Path]) -> str:
  """Returns the report of some runs, as Markdown.

  Raises:
    FileNotFoundError: if a folder is not the folder of a run.
    ValueError: if no run is finished, two are the same run, or one is of another experiment.
  """
  for folder in folders:
    read_value(NonEmptyPath, str(folder), "the folder of a run")
  runs, unfinished = read_runs(folders)
  for run in runs:
    if run.settings["experiment"] != "glue":
      raise ValueError(f"{run.folder} is a run of {run.settings['experiment']}, expected glue")
  tuning = [run for run in runs if run.settings["data.tuning"]]
  final = [run for run in runs if not run.settings["data.tuning"]]
  parts = [_results(final) if final else "", _tuning(tuning) if tuning else ""]
  return "\n\n".join(part for part in [*parts, unfinished, _origin(runs)] if part) + "\n"


def _results(runs: Sequence[Run]) -> str:
  cells: Cells = defaultdict(lambda: defaultdict(list))
  for run in runs:
    cells[run.result["model"], run.method.label][run.result["task"]].append(run)
  tasks = list(dict.fromkeys(run.result["task"] for run in runs))
  heads = {run.result["task"]: f"{run.result['task']}, {_metric(run)}" for run in runs}
  rows = [["run", "trained", *(heads[task] for task in tasks)]]
  models = list(dict.fromkeys(model for model, _ in cells))
  for model in models:
    for (name, method), by_task in cells.items():
      if name == model:
        counts = sorted({_trained(run) for members in by_task.values() for run in members})
        scores = [_cell(by_task[task]) if task in by_task else "" for task in tasks]
        rows.append([f"{model}, {method}", " to ".join(_span(counts)), *scores])
    for row in paper_tables.TABLE_2:
      if row.model == model:
        scores = [_printed(row.scores.get(task)) for task in tasks]
        rows.append([f"the paper, {row.label}", row.trainable, *scores])
  note = (
    "Dev sets, percent. The median over the seeds of the best epoch, which the dev set chooses, as "
    "in the paper; in brackets the median of the last epoch; then the number of seeds. Trained: "
    "without the head, which all methods train. The order of the rows is not a ranking: other "
    "seeds and machines change a score."
  )
  return f"## Results\n\n{table.aligned(rows)}\n\n{note}"


def _metric(run: Run) -> str:
  name: str = run.result["metric"]
  return NAMES.get(name, name)


def _trained(run: Run) -> int:
  return run.result["trainable_parameters"] - run.result["head_parameters"]


def _span(counts: Sequence[int]) -> list[str]:
  return [f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))]


def _cell(runs: Sequence[Run]) -> str:
  seeds = [run.seed for run in runs]
  if len(set(seeds)) < len(seeds):
    names = ", ".join(str(run.folder) for run in runs)
    raise ValueError(f"two runs of one seed differ in more than that: {names}. Give one of them")
  _check_alike(runs)
  best, last = (median(100 * run.result[name] for run in runs) for name in ("score", "last_score"))
  return f"{best:.1f} [{last:.1f}] {len(runs)}"


def _check_alike(runs: Sequence[Run]) -> None:
  """Raises ValueError if runs differ in more than their seeds."""
  free = ("seed", "workdir", "optimizer.tuned_in")
  first, *settings = ({k: v for k, v in run.settings.items() if k not in free} for run in runs)
  for run, other in zip(runs[1:], settings, strict=True):
    if names := sorted(k for k in first | other if first.get(k) != other.get(k)):
      raise ValueError(
        f"{runs[0].folder} and {run.folder} differ in more than their seed: {', '.join(names)}. "
        "Write a report for each"
      )


def _printed(value: paper_tables.Value | None) -> str:
  if value is None:
    return ""
  spread = "" if value.deviation is None else f" ± {value.deviation:.1f}"
  return f"{value.mean:.1f}{spread}"


def _tuning(runs: Sequence[Run]) -> str:
  scores: dict[str, dict[float, float]] = defaultdict(dict)
  for run in runs:
    label = f"{run.result['model']}, {run.result['task']}, {run.method.label}"
    rate = run.result["learning_rate"]
    if rate in scores[label]:
      raise ValueError(f"{run.folder}: another run of {label} has the same learning rate")
    scores[label][rate] = 100 * run.result["score"]
  cells = {
    label: {rate: f"{score:.1f}" for rate, score in row.items()} for label, row in scores.items()
  }
  best = {label: max(row, key=row.__getitem__) for label, row in scores.items()}
  rates = table.by_rate("model, task, method", cells, best)
  return f"## Learning rates\n\n{rates} Percent, on the part of train that was held out."


def _origin(runs: Sequence[Run]) -> str:
  devices, versions, commits = (joined_values(runs, n) for n in ("device", "jax", "commit"))
  hours = sum(run.result["seconds"] for run in runs) / 3600
  return (
    "## Provenance\n\n"
    f"- {len(runs)} runs, {hours:.2f} hours in total\n"
    f"- devices: {devices}; JAX {versions}; commits {commits}"
  )


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("glue_report", __doc__)
  parser.add_argument("folders", nargs="+", help="the runs' folders, such as runs/glue/cola/*")
  parser.add_argument("--out", help="a file to write the report to as well")
  options = parser.parse_args(arguments)
  with explained():
    out = None if options.out is None else read_output("--out", options.out)
    text = report(options.folders)
    print(text, end="")
    if out is not None:
      out.parent.mkdir(parents=True, exist_ok=True)
      out.write_text(text, "utf-8")


if __name__ == "__main__":
  main()
