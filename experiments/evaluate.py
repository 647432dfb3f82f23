"""Decodes and scores a finished run of `experiments.gpt2_e2e` anew; nothing is trained.

    python -m experiments.evaluate FOLDER --num_beams=4 --length_penalty=0.8

What is not given stays as it was in the run. The results are written to
FOLDER/evaluations/<what differs>/, which `experiments.report` reads like the folder of a run.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.gpt2_e2e import evaluate
from experiments.harness import table
from experiments.harness.launch import apply, explained
from experiments.harness.workdir import Config, flat, provenance, read_config, read_result, run_once
from experiments.nlg.gpt2 import load_base
from experiments.nlg.restore import restore_params
from lora_jax.training.mesh import make_mesh

SETTINGS = {  # the flag: the field of the config
  "num_beams": "decoding.num_beams",
  "length_penalty": "decoding.length_penalty",
  "no_repeat_ngram_size": "decoding.no_repeat_ngram_size",
  "max_new_tokens": "decoding.max_new_tokens",
  "scoring": "decoding.scoring",
  "num_inputs": "decoding.num_inputs",
  "split": "decoding.split",
  "checkpoint": "fit.keep",
}
KEPT = ("experiment", "variant", "method", "seed", "num_train_records", "base_parameters")
KEPT += ("trainable_parameters", "num_train_steps", "best_step")


def evaluate_run(folder: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
  """Decodes and scores a finished run; returns what the evaluation's `result.json` holds.

  Args:
    folder: of the run.
    settings: values by the names in `SETTINGS`.
  Raises:
    FileNotFoundError: if the folder is no run's, or what was trained is not there any more.
    ValueError: if the run is of another experiment, not finished, or a setting does not fit.
  """
  folder = Path(folder)
  stored = read_config(folder)
  result = read_result(folder)
  if stored.experiment != "gpt2_e2e":
    raise ValueError(f"{folder} is a run of {stored.experiment!r}; only 'gpt2_e2e' can be decoded")
  if result is None:
    raise ValueError(f"{folder} is not finished: start its command again, which goes on with it")
  config: Config = apply(stored, {SETTINGS[name]: value for name, value in settings.items()})
  if not config.decoding.num_inputs:
    raise ValueError("the run decoded nothing; say how many inputs, as --num_inputs=630")
  config.workdir = str(folder / "evaluations" / _name(stored, config))
  found = run_once(config, lambda workdir: _evaluate(config, result, folder, workdir))
  print(table.markdown([found]))
  print(f"\nwrote {config.workdir}")
  return found


def _evaluate(
  config: Config, result: dict[str, Any], folder: Path, workdir: Path
) -> dict[str, Any]:
  begun = time.perf_counter()
  mesh = make_mesh(**config.mesh)
  base = load_base(config, mesh)
  params, loss = restore_params(folder, config.fit.keep, base, mesh)
  return {
    **{name: result[name] for name in KEPT if name in result},
    "valid_loss": loss,
    **evaluate(config, base, params, workdir, mesh),
    "run": str(folder),
    "seconds": time.perf_counter() - begun,
    **provenance(),
  }


def _name(stored: Config, config: Config) -> str:
  """Returns the folder's name for what differs from the run."""
  before, now = flat(stored), flat(config)
  differing = [name for name, field in SETTINGS.items() if before[field] != now[field]]
  return ",".join(f"{name}={now[SETTINGS[name]]}" for name in differing) or "unchanged"


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    argument_default=argparse.SUPPRESS,
  )
  parser.add_argument("folder", help="of a finished run")
  parser.add_argument("--num_beams", type=int, help="1 is greedy")
  parser.add_argument("--length_penalty", type=float, help="the exponent of the length")
  parser.add_argument("--no_repeat_ngram_size", type=int, help="0 allows every repetition")
  parser.add_argument("--max_new_tokens", type=int, help="of a text")
  parser.add_argument("--scoring", help="transformers, or reference: the paper's code's rules")
  parser.add_argument("--num_inputs", type=int, help="the first of the distinct inputs")
  parser.add_argument("--split", choices=("train", "valid", "test"), help="whose inputs")
  parser.add_argument(
    "--checkpoint", choices=("best", "last"), help="the best by validation loss, or the last"
  )
  parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
  given = vars(parser.parse_args(arguments))
  with explained():
    evaluate_run(given["folder"], {name: given[name] for name in SETTINGS if name in given})


if __name__ == "__main__":
  main()
