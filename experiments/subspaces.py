"""Subspaces of adapters (Hu et al. 2021, sec. 7): Figures 3, 4, 6, 7, 8 and Table 7, with nulls.

    python -m experiments.subspaces --plan                  # the runs, with their hours
    python -m experiments.subspaces                         # all, on the embedded base; resumes
    python -m experiments.subspaces --model=smollm2         # on SmolLM2 (make smollm2)
    python -m experiments.subspaces --tiny                  # all parts in minutes
    python -m experiments.subspaces --report                # of the finished runs, without training
    python -m experiments.subspaces --folders runs/a runs/b # of finished runs of gpt2_e2e

Time: 0.2 hours on 2 CPU cores, 2.5 with `--model=smollm2` (`--plan`).
Expect: not run yet (docs/subspaces.md).

Each run is one of `experiments.gpt2_e2e`, in ROOT/<model>. Writes subspaces.md and figure_*.png
there; of `--folders` in ROOT/folders. All values are of another base model than the paper's, and
are labelled so.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import gpt2_e2e
from experiments.analysis.runs import do_runs
from experiments.analysis.subspaces.figures import draw_figures
from experiments.analysis.subspaces.page import markdown, status_of
from experiments.analysis.subspaces.plan import config_of, plan, planned_runs
from experiments.analysis.subspaces.runs import arrange, load_runs
from experiments.comparison.runs import check_config
from experiments.configs.subspaces import FULL, TINY
from experiments.harness.launch import explained, make_parser
from experiments.harness.workdir import read_result
from lora_jax.files import make_folder
from lora_jax.training.allocator import keep_freed_memory


def report(folders: Sequence[str | Path], out: Path) -> str:
  """Writes the page and the figures of finished runs to a folder; returns the page.

  Raises:
    FileNotFoundError, ValueError: if a run cannot be read, or the runs cannot be compared.
  """
  study = arrange(load_runs(folders))
  make_folder(out)
  status = status_of(study)
  text = markdown(study, draw_figures(study, out, status), status)
  (out / "subspaces.md").write_text(f"{text}\n", "utf-8")
  return text


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("subspaces", __doc__)
  parser.add_argument("--model", default="embedded", choices=["embedded", "smollm2"])
  parser.add_argument("--root", default="", help="the folder of all runs; runs/subspaces")
  parser.add_argument("--tiny", action="store_true", help="minutes, to see all parts work")
  parser.add_argument("--plan", action="store_true", help="print the runs and hours, and stop")
  parser.add_argument("--report", action="store_true", help="of the runs so far; trains nothing")
  parser.add_argument("--folders", nargs="+", default=[], help="finished runs; trains nothing")
  parser.add_argument(
    "--out", default="", help="the folder of page and figures; ROOT/<model>, or ROOT/folders"
  )
  options = parser.parse_args(arguments)
  sizes = TINY if options.tiny else FULL
  root = Path(options.root or f"runs/subspaces{'_tiny' if options.tiny else ''}")
  out = Path(options.out or root / ("folders" if options.folders else options.model))
  root /= options.model
  with explained():
    if options.folders and (options.plan or options.tiny or options.model != "embedded"):
      raise ValueError("--folders takes finished runs; leave out --plan, --tiny and --model")
    folders, broken = list[str](options.folders), list[str]()
    if not folders:
      print(plan(options.model, sizes), flush=True)
      if options.plan:
        return
      configs = [
        config_of(run, options.model, str(root / run.name))
        for run in planned_runs(options.model, sizes)
      ]
      if not options.report:
        keep_freed_memory()
        broken = do_runs(configs, gpt2_e2e.run)
      finished = [config for config in configs if read_result(config.workdir)]
      for config in finished:
        check_config(Path(config.workdir), config)
      folders = [config.workdir for config in finished]
      if not folders:
        raise ValueError(f"{root} has no finished runs yet; leave out --report")
    print(report(folders, out))
    print(f"wrote {out}/subspaces.md and {out}/figure_*.png")
    if broken:
      raise RuntimeError(f"{len(broken)} runs could not be done: {'; '.join(broken)}")


if __name__ == "__main__":
  main()
