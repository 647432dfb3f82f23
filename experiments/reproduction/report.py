"""Writes the report: a section for each of the paper's tables, then the table of its claims.

The paper's values have tables of their own: results of another base model share no column and no
axis with them. Every row of ours ends with its status.
"""

import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.comparison.plan import best_rate, next_rate
from experiments.configs.paper import MARGIN, STUDIES, WIDTH, Study
from experiments.harness.methods import find_method
from experiments.harness.paper import TABLE_1
from experiments.nlg.scores import FLOOR
from experiments.reproduction.blocks import Block, Heading, Image, Table, Text, markdown, page
from experiments.reproduction.claims import Decided, Evidence, decide_all
from experiments.reproduction.decisions import (
  Reported,
  at_any_floor,
  in_words,
  loss_differences,
  metric_differences,
  reported,
  seed_differences,
  unfit,
)
from experiments.reproduction.plan import Losses, losses_of, num_seeds, trains
from experiments.reproduction.printed import column_header, printed_blocks
from experiments.reproduction.real_shapes import LATENCY, latency_rows
from experiments.reproduction.runs import Record

BASES = {
  "embedded": "the embedded GPT-2 of 6.9 M parameters",
  "smollm2": "SmolLM2-135M-Instruct",
  "minilm": "MiniLM",
}
NOT_RUN = "not run"
TITLE = "The experiments of Hu et al. 2021"


NOTES = (
  "Status of a row: *reproduced* (the paper's model and data, within its error), *real shape* (the "
  "paper's sizes with random weights), *another base* (the model is named), *not run*.",
  "Loss is that on the validation examples, nats per token, mean over the seeds ± its standard "
  "deviation. Differences to the control are in brackets with simultaneous 95 % intervals, by a "
  "bootstrap crossed over seeds and inputs, and with the smallest difference that 80 % of such "
  f"experiments would detect. The margin is {MARGIN:g} nats per token; on GLUE, where scores are "
  f"compared over seeds only, it is {100 * MARGIN:g} points of 100.",
  f"{FLOOR} marks a score whose interval reaches the floor, a score that needs no model. It is not "
  "ranked: no difference is given.",
  "Not run, and not in the plan: the paper's recipes on GPT-2, RoBERTa, DeBERTa and GPT-3, whose "
  "weights were not at hand. No row is *reproduced* yet.",
)


def blocks(evidence: Evidence) -> Iterator[Block]:
  """Yields the parts of the report."""
  yield Heading(TITLE, 1)
  for note in NOTES:
    yield Text(note)
  yield Heading("Claims", 2)
  yield from claim_blocks(decide_all(evidence))
  yield Heading("Table 1: latency of a forward pass, GPT-2 M's shape", 2)
  yield from latency_blocks(evidence.root)
  for name, study in STUDIES.items():
    yield Heading(_section(study), 2)
    yield from printed_blocks(name, study.tables)
    yield from study_blocks(name, evidence.records)
  for stage, title in OTHER_STAGES.items():
    yield Heading(title, 2)
    yield from _other_blocks(stage, evidence.root)
  yield Text(_provenance(evidence.records))


def _section(study: Study) -> str:
  number = study.tables
  if not number[0].isdigit():
    return f"{number.capitalize()}: {study.title}"
  return f"Table{'s' if ',' in number else ''} {number}: {study.title}"


# ---- claims ------------------------------------------------------------------------------


def claim_blocks(decided: Sequence[Decided]) -> Iterator[Block]:
  """Yields the table of claims, and each condition of each claim with what decides it."""
  head = ["claim", "the paper's evidence", "verdict", "first condition", "decided by", "failed"]
  rows = [head]
  for item in decided:
    condition, outcome = item.claim.conditions[0], item.outcomes[0]
    cells = [item.claim.text, item.claim.evidence, item.word, condition.words]
    rows.append([*cells, outcome.interval or NOT_RUN, item.failures])
  yield Table(rows)
  yield Heading("All conditions", 3)
  rows = [["claim", "condition", "stage", "function", "outcome", "decided by"]]
  for item in decided:
    for condition, outcome in zip(item.claim.conditions, item.outcomes, strict=True):
      cells = [item.claim.text, condition.words, condition.stage, condition.function]
      rows.append([*cells, outcome.word, outcome.interval])
  yield Table(rows)


# ---- latency -----------------------------------------------------------------------------


def latency_blocks(root: Path) -> Iterator[Block]:
  """Yields Table 1: the paper's times, and our ratios of times."""
  yield Text("Table 1, as printed (arXiv 2106.09685v2):")
  yield Table(TABLE_1)
  yield Text(
    f"`python -m benchmarks.latency --save={root / LATENCY}`: the base model's pass, and the "
    "others' times in the same turn relative to it, median [95 % interval by a bootstrap over the "
    "turns]:"
  )
  rows = latency_rows(root)
  if len(rows) > 1:
    yield Table(rows)
  else:
    yield Text(f"Status: *{NOT_RUN}*.")


# ---- our values --------------------------------------------------------------------------


def study_blocks(name: str, records: Sequence[Record]) -> Iterator[Block]:
  """Yields a study's results: its table, its plot, and its learning rates."""
  study, runs = STUDIES[name], reported(records, name)
  yield Text(f"`python -m experiments.paper --stage={name}`, on {BASES[study.base]}:")
  yield Table(_rows(study, runs))
  if any(_losses(of_arm) or _scores(of_arm, study.metrics) for of_arm in runs.values()):
    yield Image(_plot(study, runs), f"{study.title}: another base, {BASES[study.base]}")
  known = losses_of(records, name)
  rates = {arm: known[arm] for arm in study.arms if arm in known}
  if rates:
    yield Text("Learning rates, by one seed that is not reported:")
    unit = "score, reversed" if study.base == "minilm" else "nats/token"
    yield Table(_rate_rows(rates, unit))


def _rate_rows(losses: Losses, unit: str) -> list[list[str]]:
  """Returns the values of the runs that chose learning rates, by arm and learning rate."""
  rates = sorted({rate for row in losses.values() for rate in row})
  rows = [[unit, *(f"{rate:g}" for rate in rates), "best", "bracketed"]]
  for arm, row in losses.items():
    cells = [f"{row[rate]:.3f}" if rate in row else "" for rate in rates]
    best = best_rate(row)
    ends = ["none", "no"] if best is None else [f"{best:g}", "no" if next_rate(row) else "yes"]
    rows.append([arm, *cells, *ends])
  return rows


def _rows(study: Study, runs: Reported) -> list[list[str]]:
  losses = study.base != "minilm"
  head = ["arm", "r/d", "learning rate", "trained"] + (["nats/token"] if losses else [])
  head += [f"against {study.control}"] if losses else []
  for metric in study.metrics:
    head += [column_header(metric), f"{metric}, against {study.control}"]
  head += ["Wikipedia, nats/token"] if study.forgetting else []
  differences = {metric: _differences(study, runs, metric) for metric in ("", *study.metrics)}
  rows = [[*head, "status"]]
  for name, arm in study.arms.items():
    of_arm = runs.get(name, [])
    rank, rate = arm.changes.get("lora.rank"), of_arm[0]["rate"] if of_arm else None
    cells = [name, f"{int(str(rank)) / WIDTH[study.base]:.3g}" if rank else ""]
    cells += [NOT_RUN if not of_arm else "" if rate is None else f"{rate:g}"]
    cells += [NOT_RUN if not of_arm else f"{of_arm[0].get('parameters', 0):,}"]
    if losses:
      cells += [_spread(_losses(of_arm), 4, of_arm), differences[""].get(name, "")]
    for metric in study.metrics:
      mark = f" {FLOOR}" if at_any_floor(runs, name, metric) else ""
      cells += [_spread(_scores(of_arm, [metric]), 2, of_arm) + mark]
      cells += [differences[metric].get(name, "")]
    if study.forgetting:
      values = [r["wikipedia_loss"] for r in of_arm if "wikipedia_loss" in r]
      cells.append(_spread(values, 3, of_arm))
    rows.append([*cells, _status(study, name, of_arm)])
  return rows


def _status(study: Study, name: str, of_arm: Sequence[Record]) -> str:
  wanted, done = num_seeds(study, study.arms[name]), len(of_arm)
  if not done:
    return NOT_RUN
  failed = sum(record["status"] == "failed" for record in of_arm)
  text = "another base" if trains(study.arms[name]) or failed else "another base, not trained"
  if find_method(str(study.arms[name].changes["method"])).is_floor:
    text = "a floor, without a model"
  text += f", {failed} failed" if failed else ""
  return text if done == wanted else f"{text}, {done} of {wanted} seeds"


def _losses(of_arm: Sequence[Record]) -> list[float]:
  return [record["valid_loss"] for record in of_arm if record.get("valid_loss") is not None]


def _scores(of_arm: Sequence[Record], metrics: Sequence[str]) -> list[float]:
  scores = [record.get("scores", {}).get(metric) for record in of_arm for metric in metrics[:1]]
  return [score for score in scores if score is not None]


def _spread(values: Sequence[float], digits: int, of_arm: Sequence[Record]) -> str:
  if not values:
    return NOT_RUN if not of_arm else ""
  mean = f"{np.mean(values):.{digits}f}"
  return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _differences(study: Study, runs: Reported, metric: str = "") -> dict[str, str]:
  """Returns the differences to the control, in words, of the arms that can be compared with it.

  Args:
    study: of the runs.
    runs: reported ones.
    metric: of the task; "" is the validation loss.
  """

  def can_be_compared(arm: str) -> bool:
    if unfit(runs, (study.control, arm), counts) is not None:
      return False
    of_arm = runs[arm]
    if of_glue:
      return bool(metric)
    if not metric:
      return all("input_losses" in record for record in of_arm)
    return all(metric in r.get("rows", {}) for r in of_arm) and not at_any_floor(runs, arm, metric)

  of_glue = study.base == "minilm"
  counts = {name: num_seeds(study, arm) for name, arm in study.arms.items()}
  arms = [arm for arm in study.arms if arm != study.control and can_be_compared(arm)]
  if not arms or not can_be_compared(study.control):
    return {}
  if of_glue:
    differences = seed_differences(runs, lambda run: run["scores"][metric], study.control, arms)
  elif metric:
    differences = metric_differences(runs, metric, study.control, arms)
  else:
    differences = loss_differences(runs, study.control, arms)
  return {arm: in_words(x, 2 if metric else 4) for arm, x in differences.items()}


def _plot(study: Study, runs: Reported) -> bytes:
  """Returns a PNG of each arm's runs: by trained parameters, or one line for each arm."""
  metric = study.metrics[0] if study.metrics else ""
  points = {
    arm: _scores(of_arm, [metric]) if metric else _losses(of_arm) for arm, of_arm in runs.items()
  }
  points = {arm: values for arm, values in points.items() if values}
  figure = Figure(figsize=(7, max(3.0, 0.3 * len(points))), dpi=100, layout="constrained")
  axes = figure.subplots()
  axes.grid(alpha=0.3)
  label = column_header(metric) if metric else "validation loss, nats/token"
  if study.by_size:
    for arm, values in points.items():
      size = runs[arm][0]["parameters"]
      if size:
        axes.plot([size] * len(values), values, "o")
        axes.annotate(arm, (size, values[0]), fontsize="x-small")
      else:  # of no size; its loss would set the scale
        axes.plot([], [], " ", label=f"{arm}: {values[0]:.3f}")
        axes.legend()
    axes.set(xlabel="trained parameters", ylabel=label, xscale="log")
  else:
    for i, values in enumerate(points.values()):
      axes.plot(values, [i] * len(values), "o")
    axes.set_yticks(range(len(points)), list(points))
    axes.invert_yaxis()
    axes.set_xlabel(label)
  axes.set_title(f"another base: {BASES[study.base]}", fontsize="medium")
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


# ---- stages that are other commands ------------------------------------------------------

OTHER_STAGES = {
  "subspaces/embedded": "Figures 3, 4, 6 to 8 and Table 7: subspaces, embedded base model",
  "subspaces/smollm2": "Figures 3, 4, 6 to 8 and Table 7: subspaces, SmolLM2",
  "intrinsic_dimension": "Intrinsic dimension by pretraining, embedded shape",
}


def _other_blocks(stage: str, root: Path) -> Iterator[Block]:
  """Yields the page of another command, in the root, with its figures."""
  folder = root / stage
  pages = sorted(folder.glob("*.md"))
  if not pages:
    yield Text(f"Status: *{NOT_RUN}*.")
    return
  table: list[list[str]] = []
  for line in [*pages[0].read_text("utf-8").splitlines(), ""]:
    if line.startswith("|"):
      cells = [cell.strip() for cell in line.strip("|").split("|")]
      if not all(set(cell) <= set(":-") and cell for cell in cells):
        table.append(cells)
      continue
    if table:
      yield Table(table)
      table = []
    if line and not line.startswith("!["):
      yield Text(line.lstrip("# -"))
  for path in sorted(folder.glob("*.png")):
    yield Image(path.read_bytes(), f"{path.stem}: another base")


def _provenance(records: Sequence[Record]) -> str:
  if not records:
    return f"No run of the studies is finished; {NOT_RUN} until then."
  origin = {
    name: sorted({str(r[name]) for r in records if r.get(name)}) for name in ("device", "commit")
  }
  hours = sum(record.get("train_seconds", 0.0) for record in records) / 3600
  words = "; ".join(f"{name}s {', '.join(values)}" for name, values in origin.items())
  return f"{len(records)} runs; {words}; {hours:.2f} hours of training."


# ---- files -------------------------------------------------------------------------------


def write_report(evidence: Evidence, out: Path) -> None:
  """Writes OUT.md, with its plots in OUT_figures, and OUT.html, with its plots in the file."""
  parts = list(blocks(evidence))
  out.parent.mkdir(parents=True, exist_ok=True)
  figures = Path(f"{out}_figures")
  shutil.rmtree(figures, ignore_errors=True)  # those of an earlier report
  Path(f"{out}.md").write_text(markdown(parts, figures), "utf-8")
  Path(f"{out}.html").write_text(page(parts, TITLE), "utf-8")
