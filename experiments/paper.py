"""The experiments of Hu et al. 2021 (arXiv 2106.09685), and a verdict on each of its claims.

    python -m experiments.paper --plan              # the stages, with their hours and their state
    python -m experiments.paper --stage=rank        # runs what is missing of one; resumes
    python -m experiments.paper                     # all, and the report. Start it once for each
                                                    # core: taskset -c 0
    python -m experiments.paper --report            # of the runs so far
    python -m experiments.paper --tiny --stage=rank # all parts in minutes

Time: 38 hours on 2 CPU cores (`--plan`); with `--tiny` about 15 CPU seconds a run.
Expect: docs/paper_report.md, which has the stage `subspaces` so far.

The studies are those of configs/paper.py: runs of `experiments.gpt2_e2e` and `experiments.glue` in
ROOT/STAGE. Two stages are other commands, with their runs in ROOT. Files of data sets are read
from data/ (docs/data_sets.md); a stage without its files or its model is left out and named. Writes
ROOT/paper.html, and ROOT/paper.md with its plots in ROOT/paper_figures.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import glue, gpt2_e2e, intrinsic_dimension, subspaces
from experiments.analysis import intrinsic
from experiments.analysis.subspaces import plan as subspace_plan
from experiments.configs import Config
from experiments.configs import intrinsic_dimension as intrinsic_configs
from experiments.configs import subspaces as subspace_configs
from experiments.configs.paper import STUDIES, Study
from experiments.harness.config import read_output
from experiments.harness.launch import explained, make_parser
from experiments.harness.sharing import PLANNED
from experiments.harness.table import aligned
from experiments.harness.workdir import read_result
from experiments.reproduction.claims import Evidence
from experiments.reproduction.plan import (
  Hours,
  chosen_rates,
  expected,
  losses_of,
  rate_runs,
  reported_runs,
  trains,
)
from experiments.reproduction.report import write_report
from experiments.reproduction.runs import carry_out, collect
from lora_jax.models.checkpoints.pretrained import find_pretrained
from lora_jax.training.allocator import keep_freed_memory

COMMANDS = ("subspaces", "subspaces_smollm2", "intrinsic")
STAGES = (*STUDIES, *COMMANDS)


def run_of(study: Study) -> Callable[[Config], Mapping[str, Any]]:
  """Returns the `run` of a study's experiment."""
  return glue.run if study.base == "minilm" else gpt2_e2e.run


# ---- stages ------------------------------------------------------------------------------


def do_stage(stage: str, root: Path, tiny: bool) -> list[str]:
  """Does what is missing of a stage; returns what could not be done, with the reason."""
  if stage in COMMANDS:
    return do_command(stage, root, tiny)
  study, broken = STUDIES[stage], list[str]()
  if reason := why_impossible(study):
    return [f"{stage}: {reason}"]
  while True:  # until the best learning rate of every arm is bracketed, or many were tried
    losses = losses_of(collect(root), stage)
    runs = [r for r in rate_runs(stage, losses) if str(root / stage / r.name) not in broken]
    if not runs:
      break
    broken += carry_out(runs, root, run_of, tiny=tiny)
  rates = chosen_rates(stage, losses)
  broken += carry_out(reported_runs(stage, rates), root, run_of, tiny=tiny)
  open_arms = [name for name, arm in study.arms.items() if trains(arm) and name not in rates]
  return broken + [f"{root / stage}: {name} (learning rate not bracketed)" for name in open_arms]


def why_impossible(study: Study) -> str:
  """Returns why no run of a study can be done: its files or its model are missing; "" if not."""
  if study.folder and not Path(study.folder).is_dir():
    return f"there is no folder {study.folder} with its files (docs/data_sets.md)"
  if study.base == "smollm2":
    try:
      find_pretrained("smollm2")
    except (FileNotFoundError, ValueError) as error:
      return str(error)
  return ""


def do_command(stage: str, root: Path, tiny: bool) -> list[str]:
  """Does a stage that is another command; returns its message if it could not be done."""
  flags = ["--tiny"] if tiny else []
  try:
    if stage == "intrinsic":
      intrinsic_dimension.main([f"--root={root / 'intrinsic_dimension'}", *flags])
    else:
      subspaces.main([f"--root={root / 'subspaces'}", *flags, f"--model={_model(stage)}"])
  except (Exception, SystemExit) as error:  # the other stages are still worth doing
    return [f"{stage}: {error}"]
  return []


def do_all(stages: Sequence[str], root: Path, tiny: bool) -> list[str]:
  """Does stages one after another; returns what could not be done."""
  broken = []
  for stage in stages:
    print(f"[{stage}]", flush=True)
    broken += do_stage(stage, root, tiny)
  return broken


# ---- the plan ----------------------------------------------------------------------------


def plan(root: Path) -> str:
  """Returns the table of stages: their runs, hours on 2 CPU cores, and state on disk."""
  table = [["stage", "paper", "runs", "CPU minutes each", "hours", "finished"]]
  total = Hours(0.0, 0.0)
  for stage in STAGES:
    hours, done = stage_hours(stage), finished(stage, root)
    cells = [f"{hours.runs:.0f}", f"{hours.minutes_each:.1f}", f"{hours.hours:.1f}"]
    table.append([stage, tables_of(stage), *cells, f"{done:.0f}" if done else "not run"])
    total = Hours(total.runs + hours.runs, total.hours + hours.hours)
  table.append(["all", "", f"{total.runs:.0f}", "", f"{total.hours:.1f}", ""])
  command = "`python -m experiments.paper --stage=STAGE` runs what is missing of a stage."
  return f"{aligned(table)}\n\n{command}"


def tables_of(stage: str) -> str:
  """Returns the paper's tables and figures that a stage is for."""
  if stage in STUDIES:
    return STUDIES[stage].tables
  return "section 4.1" if stage == "intrinsic" else "7; Figures 3, 4, 6 to 8"


def stage_hours(stage: str) -> Hours:
  """Returns a stage's runs and hours, estimates for 2 CPU cores."""
  if stage in STUDIES:
    return expected(stage)
  if stage == "intrinsic":
    count = len(_intrinsic_folders(Path()))
    return Hours(count, count * intrinsic.run_hours(intrinsic_configs.FULL))
  model, sizes = _model(stage), subspace_configs.FULL
  count = len(subspace_plan.planned_runs(model, sizes))
  return Hours(count, count * subspace_plan.run_hours(model, sizes))


def finished(stage: str, root: Path) -> int:
  """Returns the number of a stage's finished or failed runs."""
  if stage in STUDIES:
    return len(list((root / stage).glob(f"*/{PLANNED}")))
  if stage == "intrinsic":
    return sum(read_result(folder) is not None for folder in _intrinsic_folders(root))
  folders = (root / "subspaces" / _model(stage)).glob("*/result.json")
  return len(list(folders))


def _model(stage: str) -> str:
  return "smollm2" if stage.endswith("smollm2") else "embedded"


def _intrinsic_folders(root: Path) -> list[str]:
  sizes, bases = intrinsic_configs.FULL, list(intrinsic_configs.BASES)
  configs = intrinsic.planned_runs(sizes, bases, root / "intrinsic_dimension")
  return [config.workdir for of_base in configs.values() for config in of_base]


# ---- the command line --------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("paper", __doc__)
  parser.add_argument("--root", default="", help="the folder of all runs; default runs/paper")
  parser.add_argument("--stage", default="all", choices=["all", *STAGES])
  parser.add_argument("--tiny", action="store_true", help="minutes, to see all parts work")
  parser.add_argument("--plan", action="store_true", help="print the stages and hours, and stop")
  parser.add_argument("--report", action="store_true", help="write the report, and stop")
  parser.add_argument("--out", default="", help="the report without ending; default ROOT/paper")
  options = parser.parse_args(arguments)
  root = Path(options.root or f"runs/paper{'_tiny' if options.tiny else ''}")
  with explained():
    out = read_output("--out", options.out or root / "paper", ".html", ".md")
    if options.plan:
      print(plan(root))
      return
    broken = list[str]()
    if not options.report:
      keep_freed_memory()
      stages = STAGES if options.stage == "all" else [options.stage]
      broken = do_all(stages, root, options.tiny)
    write_report(Evidence(collect(root), root, options.tiny), out)
    print(f"wrote {out}.html and {out}.md")
    if broken:
      raise RuntimeError("\n".join(["these could not be done:", *broken]))


if __name__ == "__main__":
  main()
