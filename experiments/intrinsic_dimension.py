"""Intrinsic dimension of E2E by the base model's pretraining: the idea that LoRA starts from.

    python -m experiments.intrinsic_dimension --plan             # the runs, with their hours
    python -m experiments.intrinsic_dimension                    # all; resumes
    python -m experiments.intrinsic_dimension --bases "20 M tokens" "new weights"
    python -m experiments.intrinsic_dimension --tiny             # all parts in minutes
    python -m experiments.intrinsic_dimension --report           # of the finished runs

Time: 1.9 hours on 2 CPU cores (`--plan`).
Expect: not run yet (docs/subspaces.md).

Trains all weights in random subspaces of rising dimension (`method=random_subspace`), and finds the
smallest with 90 % of full fine-tuning's gain, d90. Aghajanyan et al. (2020, arXiv 2012.13255) find
that more pretraining lowers it. Each run is one of `experiments.gpt2_e2e`, in ROOT/<base model>;
writes ROOT/intrinsic_dimension.md and .png.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import gpt2_e2e
from experiments.analysis.intrinsic import draw, markdown, plan, planned_runs, read_curves
from experiments.analysis.runs import do_runs
from experiments.configs.intrinsic_dimension import BASES, FULL, TINY
from experiments.harness.config import read_output
from experiments.harness.launch import explained, make_parser
from lora_jax.training.allocator import keep_freed_memory


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("intrinsic_dimension", __doc__)
  parser.add_argument("--root", default="", help="the folder of all runs")
  parser.add_argument("--bases", nargs="+", default=[*BASES], choices=[*BASES], metavar="BASE")
  parser.add_argument("--tiny", action="store_true", help="minutes, to see all parts work")
  parser.add_argument("--plan", action="store_true", help="print the runs and hours, and stop")
  parser.add_argument("--report", action="store_true", help="of the runs so far; trains nothing")
  parser.add_argument("--out", default="", help="the files without ending")
  options = parser.parse_args(arguments)
  sizes = TINY if options.tiny else FULL
  root = Path(options.root or f"runs/intrinsic_dimension{'_tiny' if options.tiny else ''}")
  with explained():
    out = read_output("--out", options.out or root / "intrinsic_dimension", ".md", ".png")
    print(plan(sizes, options.bases), flush=True)
    if options.plan:
      return
    broken = list[str]()
    if not options.report:
      keep_freed_memory()
      runs = planned_runs(sizes, options.bases, root)
      broken = do_runs((run for configs in runs.values() for run in configs), gpt2_e2e.run)
    curves, missing = read_curves(sizes, options.bases, root)
    if not curves:
      raise ValueError(
        f"{root} has no base model whose own loss and full fine-tuning are finished yet; leave out "
        "--report"
      )
    text = markdown(curves, missing)
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.md").write_text(f"{text}\n", "utf-8")
    draw(Path(f"{out}.png"), curves)
    print(text)
    print(f"wrote {out}.md and {out}.png")
    if broken:
      raise RuntimeError(f"{len(broken)} runs could not be done: {'; '.join(broken)}")


if __name__ == "__main__":
  main()
