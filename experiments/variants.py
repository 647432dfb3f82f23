"""A fair comparison of LoRA's variants, on the embedded base model and on SmolLM2.

    python -m experiments.variants --plan                       # the runs, with their hours
    python -m experiments.variants                              # all of them; resumes. Start it
                                                                # once for each core: taskset -c 0
    python -m experiments.variants --stage=rates --arms=lora,dora
    python -m experiments.variants --tiny --arms=lora,dora      # all parts in minutes
    python -m experiments.variants --report                     # the page of the runs so far
    python -m experiments.variants --lines=FILE --out=page      # the page of published runs

Time: 16 hours on 2 CPU cores (`--plan`); `--tiny` with two arms 4 minutes.
Expect: not run yet (docs/variants_comparison.md).

rates -> seeds -> effort on the embedded base model, then smollm2_rates -> smollm2; each run is one
of `experiments.gpt2_e2e`. Writes ROOT/runs.jsonl, and from it the page as HTML and Markdown.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from experiments import gpt2_e2e
from experiments.comparison.costs import measure_costs
from experiments.comparison.lines import read_lines, write_lines
from experiments.comparison.page import write_page
from experiments.comparison.plan import (
  STAGES,
  Planned,
  arms_of,
  best_rate,
  bracketed,
  changes_of,
  config_of,
  default_rate,
  draw_runs,
  frozen_run,
  plan,
  rate_runs,
  reported_runs,
  size_of,
)
from experiments.comparison.runs import (
  carry_out,
  collect,
  costs_file,
  rate_losses,
  read_costs,
)
from experiments.comparison.summary import summarize
from experiments.configs.variants import CONTROL, FULL, TINY, Sizes
from experiments.harness.config import read_output
from experiments.harness.launch import RATE, explained, make_parser
from experiments.harness.sharing import claimed
from experiments.harness.workdir import write_json
from lora_jax.training.allocator import keep_freed_memory

RATE_STAGES = {"seeds": "rates", "smollm2": "smollm2_rates"}  # whose best rates they take


def do_stage(stage: str, sizes: Sizes, root: Path, arms: Sequence[str]) -> list[str]:
  """Does the runs of a stage; returns the folders of those that could not be done.

  An arm whose best learning rate is not bracketed has no reported runs, and is named with them.

  Raises:
    ValueError: if a stage needs learning rates, and the control's are not known yet.
  """
  if stage == "effort":
    return carry_out([frozen_run("rates"), *draw_runs(sizes, arms)], sizes, root, gpt2_e2e.run)
  do = do_reported if stage in RATE_STAGES else do_rates
  return do(stage, sizes, root, arms)


def do_rates(stage: str, sizes: Sizes, root: Path, arms: Sequence[str]) -> list[str]:
  """Tries learning rates until the best of every arm is bracketed, or many were tried."""
  broken = carry_out([frozen_run(stage)], sizes, root, gpt2_e2e.run)
  while True:
    losses = rate_losses(collect(root), stage)
    runs = rate_runs(stage, sizes, losses, arms)
    runs = [run for run in runs if str(root / stage / run.name) not in broken]
    if not runs:
      settled = bracketed(stage, sizes, losses, arms)
      return broken + _left_out(root / stage, arms_of(stage, arms), settled)
    broken += carry_out(runs, sizes, root, gpt2_e2e.run)


def do_reported(stage: str, sizes: Sizes, root: Path, arms: Sequence[str]) -> list[str]:
  """Does the runs of every arm at its best learning rate."""
  losses = rate_losses(collect(root), RATE_STAGES[stage])
  missing = [arm for arm in arms_of(stage, arms) if arm not in losses]
  if CONTROL in missing:
    raise ValueError(
      f"no learning rates of {', '.join(missing)} are known: run --stage={RATE_STAGES[stage]}"
    )
  settled = bracketed(RATE_STAGES[stage], sizes, losses, arms)
  rates = {arm: rate for arm in settled if (rate := best_rate(losses[arm])) is not None}
  broken = carry_out(reported_runs(stage, sizes, rates, arms), sizes, root, gpt2_e2e.run)
  return broken + _left_out(root / stage, arms_of(stage, arms), settled)


def _left_out(folder: Path, arms: Iterable[str], settled: Collection[str]) -> list[str]:
  """Returns the folders of arms without a best learning rate, with the reason."""
  return [f"{folder / arm} (learning rate not bracketed)" for arm in arms if arm not in settled]


def do_costs(base: str, sizes: Sizes, root: Path, arms: Sequence[str]) -> None:
  """Measures the steps of all arms that have trained on a base model, once."""
  stage = next(stage for stage, other in STAGES.items() if other == base)
  losses = rate_losses(collect(root), stage)
  chosen = [arm for arm in arms_of(stage, arms) if arm in losses and best_rate(losses[arm])]
  if CONTROL not in chosen or set(chosen) <= read_costs(root, base).keys():
    return
  configs = {}
  for arm in chosen:
    settings = {RATE: default_rate(arm, base), "data.num_train_records": sizes.rate_lines}
    configs[arm] = config_of(Planned(stage, arm, changes_of(arm, base, settings)), sizes, "")
  with claimed(root) as is_free:
    if is_free:  # else another process measures them
      print(f"[costs] the train steps of {len(chosen)} arms on {base}", flush=True)
      costs = {**read_costs(root, base), **measure_costs(configs, CONTROL)}
      write_json(costs_file(root, base), costs)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("variants", __doc__)
  parser.add_argument("--root", default="", help="the folder of all runs; default runs/variants")
  parser.add_argument("--stage", default="all", choices=["all", *STAGES])
  parser.add_argument("--arms", default="", help="arms, by commas, beside the control; all")
  parser.add_argument("--tiny", action="store_true", help="minutes, to see all parts work")
  parser.add_argument("--plan", action="store_true", help="print the runs and hours, and stop")
  parser.add_argument("--report", action="store_true", help="write the page, and stop")
  parser.add_argument("--lines", default="", help="the page of these JSON lines, without a root")
  parser.add_argument("--out", default="", help="the page without ending; default ROOT/variants")
  options = parser.parse_args(arguments)
  sizes = TINY if options.tiny else FULL
  root = Path(options.root or ("runs/variants_tiny" if options.tiny else "runs/variants"))
  arms = [arm for arm in options.arms.split(",") if arm]
  with explained():
    out = read_output("--out", options.out or root / "variants", ".html", ".md")
    if options.plan:
      print(plan(sizes, arms))
      return
    lines, broken = Path(options.lines or root / "runs.jsonl"), []
    if not options.lines:
      broken = [] if options.report else do_all(options.stage, sizes, root, arms)
      records = collect(root)
      if not records:
        raise ValueError(f"{root} has no finished runs: leave out --report")
      write_lines(lines, records)
    print(write_page(summarize(read_lines(lines), sizes), out))
    print(f"wrote {out}.html and {out}.md from {lines}")
    if broken:
      raise RuntimeError(f"{len(broken)} runs could not be done: {', '.join(broken)}")


def do_all(stage: str, sizes: Sizes, root: Path, arms: Sequence[str]) -> list[str]:
  """Does one stage, or all; returns the folders of the runs that could not be done."""
  if stage != "all" and STAGES[stage] == "smollm2" and not sizes.smollm2:
    raise ValueError(f"--tiny has no --stage={stage}: leave out --tiny")
  keep_freed_memory()
  stages = [s for s in STAGES if sizes.smollm2 or STAGES[s] == "embedded"]
  chosen = stages if stage == "all" else [stage]
  for name in chosen:
    arms_of(name, arms)  # an unknown arm is an error now
  for base in dict.fromkeys(STAGES[name] for name in chosen):
    size_of(CONTROL, base)  # a missing model is an error now, not after hours
  broken = []
  for name in chosen:
    broken += do_stage(name, sizes, root, arms)
    if name in ("rates", "smollm2_rates"):
      do_costs(STAGES[name], sizes, root, arms)
  return broken


if __name__ == "__main__":
  main()
