"""Why do LoRA's variants differ? Sharpness, intruder dimensions and capacity, on the embedded base.

    python -m experiments.mechanism --plan                      # the measurements, with their hours
    python -m experiments.mechanism                             # all of them; resumes. Start it
                                                                # once for each core: taskset -c 0
    python -m experiments.mechanism --measure=sharpness --arms=dora,pissa
    python -m experiments.mechanism --tiny --arms=dora          # all parts in minutes
    python -m experiments.mechanism --report                    # the table of those so far

Time: 4.1 hours on 2 CPU cores (`--plan`); `--tiny` with two arms minutes, mostly of compiling.
Expect: not run yet (docs/mechanism.md).

The best learning rates and the trained weights are those of `experiments.variants`, read from its
folder; the output names those that it does not have. Each measurement is appended to
ROOT/mechanism.jsonl as one line; a table (OUT.md) and a figure (OUT.png) are made of them.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis.capacity import measure_capacity, next_runs
from experiments.analysis.figure import draw
from experiments.analysis.intruders import measure_intruders, plan_intruders
from experiments.analysis.plan import plan
from experiments.analysis.records import MEASURES, Planned, Record, carry_out, read_records
from experiments.analysis.sharpness import measure_sharpness, plan_sharpness
from experiments.analysis.summary import markdown, summarize
from experiments.comparison.plan import arms_of
from experiments.comparison.runs import collect
from experiments.configs.mechanism import FULL, TINY, Sizes
from experiments.harness.config import read_output
from experiments.harness.launch import explained, make_parser
from experiments.harness.sharing import WAIT, claimed
from lora_jax.training.allocator import keep_freed_memory

SEEDS = "python -m experiments.variants --stage=seeds makes them"
Planner = Callable[[Sequence[Record]], list[Planned]]
Measure = Callable[[Planned], Mapping[str, Any]]


def do_measurements(
  measure: str, sizes: Sizes, arms: Sequence[str], runs: Path, path: Path, flags: str
) -> list[str]:
  """Does the measurements of a kind that are not finished; returns those that could not be done.

  Several processes share the measurements of a file: one that another process does now is waited
  for.

  Args:
    measure: one of `MEASURES`.
    sizes: of the measurements.
    arms: of the comparison.
    runs: the comparison's folder.
    path: the file of JSON lines.
    flags: of the command line, for the records.
  """
  compared = collect(runs)
  if measure == "intruders" and not plan_intruders(compared, arms):
    print(f"{runs} has no finished runs of {', '.join(arms)}: {SEEDS}", flush=True)
  planners: dict[str, tuple[Planner, Measure]] = {
    "sharpness": (
      lambda _: plan_sharpness(sizes, arms),
      lambda planned: measure_sharpness(planned, sizes),
    ),
    "intruders": (
      lambda _: plan_intruders(compared, arms),
      lambda planned: measure_intruders(planned, runs),
    ),
    "capacity": (
      lambda records: next_runs(sizes, arms, records),
      lambda planned: measure_capacity(planned, sizes),
    ),
  }
  planner, measured = planners[measure]
  broken = list[str]()
  while True:
    records = read_records(path)
    left = [p for p in planner(records) if p.find(records) is None and p.name not in broken]
    if not left:
      return broken
    taken = 0
    for planned in left:
      command = f"python -m experiments.mechanism --measure={measure} --arms={planned.arm}{flags}"
      with claimed(planned.claim(path)) as is_free:
        if not is_free:
          taken += 1
        elif planned.find(read_records(path)) is None and not _do(planned, measured, command, path):
          broken.append(planned.name)
    if taken == len(left):
      time.sleep(WAIT)


def _do(planned: Planned, measured: Measure, command: str, path: Path) -> bool:
  """Does a measurement; returns whether it could be done. If not, the others are worth doing."""
  print(planned.name, flush=True)
  try:
    record = carry_out(planned, measured, command, path)
  except Exception:
    print(f"  {traceback.format_exc()}", flush=True)
    return False
  print(f"  {record['status']}, {record['seconds']:.0f} s", flush=True)
  return True


def report(
  sizes: Sizes, arms: Sequence[str], runs: Path, path: Path, out: Path, hint: str = ""
) -> str:
  """Writes the table and the figure of the measurements so far; returns the table.

  Raises:
    ValueError: if there are none; it ends with `hint`.
  """
  records = [record for record in read_records(path) if record["arm"] in arms]
  if not records:
    raise ValueError(f"{path} has no measurements of {', '.join(arms)} yet{hint}")
  rows = summarize(sizes, arms, records, collect(runs))
  text = markdown(sizes, rows, records)
  out.parent.mkdir(parents=True, exist_ok=True)
  Path(f"{out}.md").write_text(f"{text}\n", "utf-8")
  draw(Path(f"{out}.png"), sizes, rows)
  return text


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("mechanism", __doc__)
  parser.add_argument("--root", default="", help="the folder of the lines; runs/mechanism")
  parser.add_argument("--runs", default="", help="the folder of experiments.variants")
  parser.add_argument("--measure", default="all", choices=["all", *MEASURES])
  parser.add_argument("--arms", default="", help="arms, by commas, beside LoRA; all")
  parser.add_argument("--tiny", action="store_true", help="minutes, to see all parts work")
  parser.add_argument("--plan", action="store_true", help="print the measurements, and stop")
  parser.add_argument("--report", action="store_true", help="write the table, and stop")
  parser.add_argument("--out", default="", help="the files without ending; ROOT/mechanism")
  options = parser.parse_args(arguments)
  sizes, ending = (TINY, "_tiny") if options.tiny else (FULL, "")
  root = Path(options.root or f"runs/mechanism{ending}")
  runs = Path(options.runs or f"runs/variants{ending}")
  with explained():
    out = read_output("--out", options.out or root / "mechanism", ".md", ".png")
    arms = arms_of("rates", [arm for arm in options.arms.split(",") if arm])
    print(plan(sizes, arms), flush=True)
    if options.plan:
      return
    path, broken = root / "mechanism.jsonl", list[str]()
    if not options.report:
      keep_freed_memory()
      flags = " --tiny" if options.tiny else ""
      for measure in MEASURES if options.measure == "all" else [options.measure]:
        broken += do_measurements(measure, sizes, arms, runs, path, flags)
    hint = "; leave out --report" if options.report else ""
    print(report(sizes, arms, runs, path, out, hint))
    print(f"wrote {out}.md and {out}.png from {path}")
    if broken:
      raise RuntimeError(f"{len(broken)} measurements could not be done: {'; '.join(broken)}")


if __name__ == "__main__":
  main()
