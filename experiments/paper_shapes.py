"""The paper's parameter counts, checkpoints, memory and operations, at its models' real shapes.

    python -m experiments.paper_shapes
    python -m experiments.paper_shapes --steps all            # compiles the train steps, too
    python -m experiments.paper_shapes --steps gpt-2_m roberta_base
    python -m experiments.paper_shapes --steps all --out=docs/paper_shapes.md
    python -m experiments.paper_shapes --steps all --save=runs/paper/shapes.json

It prints the page, and writes it to the file that `--out` names; `--save` writes the sizes that the
table of claims of `experiments.paper` reads, and keeps the file's sizes of other models. Nothing of
a model's size is allocated, and nothing is trained.

Time: 15 seconds of a CPU core; with `--steps all` one and a half minutes.
Expect: the counts of docs/paper_shapes.md, which equal the paper's formulae.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from experiments.harness.config import read_output
from experiments.harness.launch import explained, make_parser
from experiments.shapes.models import MODELS
from experiments.shapes.page import RANKS, page, step_sizes
from experiments.shapes.results import Sizes, StepSizes, read, save
from experiments.shapes.steps import METHODS, step_cost
from lora_jax.fields import Count, read_value
from lora_jax.files import make_folder

NAMES = {model.lower().replace(" ", "_"): model for model in MODELS}


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("paper_shapes", __doc__)
  parser.add_argument(
    "--steps", nargs="+", default=[], choices=["all", *NAMES], help="models whose steps to compile"
  )
  parser.add_argument("--batch", type=int, default=1, help="rows of a compiled step")
  parser.add_argument("--length", type=int, default=128, help="tokens of its rows")
  parser.add_argument("--out", default="", help="the file to write; none if it is left out")
  parser.add_argument("--save", default="", help="a JSON file of the sizes; needs --steps")
  options = parser.parse_args(arguments)
  with explained():
    out = read_output("--out", options.out) if options.out else None
    saved = read_output("--save", options.save) if options.save else None
    if saved is not None and not options.steps:
      raise ValueError("--save writes the sizes of compiled steps: add --steps")
    for name in ("batch", "length"):
      read_value(Count, getattr(options, name), f"--{name}")
    for path in (out, saved):
      if path is not None:  # before the work
        make_folder(path.parent)
    chosen = NAMES if "all" in options.steps else options.steps
    models = [NAMES[name] for name in chosen]
    batch = f"{options.batch} x {options.length} tokens"
    kept = () if saved is None else other_steps(saved, models, batch)
    costs = {}
    for model in models:
      print(f"compiling the steps of {model}", flush=True)
      costs[model] = {
        method: step_cost(model, method, RANKS[model], options.batch, options.length)
        for method in METHODS
      }
    flags = ["--steps", *options.steps] if options.steps else []
    flags += [
      f"--{name}={getattr(options, name)}"
      for name in ("batch", "length")
      if getattr(options, name) != parser.get_default(name)
    ]
    command = " ".join(["python -m experiments.paper_shapes", *flags])
    text = page(command, costs, batch)
    print(text, end="")
    if out is not None:
      out.write_text(text, "utf-8")
    if saved is not None:
      save(saved, Sizes(batch, (*kept, *step_sizes(costs))))
      if kept:
        names = ", ".join(dict.fromkeys(step.model for step in kept))
        print(f"{saved} keeps the sizes of {names}, which were not asked for")


def other_steps(path: Path, models: Collection[str], batch: str) -> tuple[StepSizes, ...]:
  """Returns the sizes in a file that are of other models.

  Raises:
    ValueError: if they are of another batch, or the file is not one of `--save`.
  """
  earlier = read(Sizes, path) or Sizes(batch, ())
  steps = tuple(step for step in earlier.steps if step.model not in models)
  if steps and earlier.batch != batch:
    raise ValueError(
      f"{path} has steps of {earlier.batch}, expected {batch}. Move it away, or --save another file"
    )
  return steps


if __name__ == "__main__":
  main()
