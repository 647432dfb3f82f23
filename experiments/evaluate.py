"""Decodes and scores a finished run of `experiments.gpt2_e2e` again, without training.

    python -m experiments.evaluate FOLDER --num_beams=4 --length_penalty=0.8

Other settings are the run's own. Results are written to FOLDER/evaluations/<changed settings>/,
which `experiments.report` reads like the folder of a run.

Time: 41 s for 630 inputs with the embedded base model and 10 beams on 2 CPU cores, and the metrics.
Expect: without settings, the texts and scores of the run itself.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.harness.config import flat, replace_fields
from experiments.harness.launch import explained, make_parser
from experiments.harness.methods import check_used, find_method
from experiments.harness.workdir import provenance, read_finished, read_run, run_once
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import decode_and_score, load_data, validation_loss
from experiments.nlg.restore import check_has_model, restore_params
from experiments.nlg.rounding import rounded
from experiments.nlg.scores import markdown
from experiments.nlg.tasks.table import TASKS, title
from lora_jax.fields import NonEmptyPath, read_value

SETTINGS = {  # the flag: the field of the config
  "num_beams": "decoding.num_beams",
  "length_penalty": "decoding.length_penalty",
  "no_repeat_ngram_size": "decoding.no_repeat_ngram_size",
  "max_new_tokens": "decoding.max_new_tokens",
  "scoring": "decoding.scoring",
  "num_inputs": "decoding.num_inputs",
  "num_shots": "decoding.num_shots",
  "split": "decoding.split",
  "checkpoint": "fit.keep",
  "rounded_to": "model.rounded_to",
}
SHARED_FIELDS = ("experiment", "variant", "method", "seed", "num_train_records", "base_parameters")
SHARED_FIELDS += ("trainable_parameters", "num_train_steps", "best_step")


def evaluate_run(folder: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
  """Decodes and scores a finished run; returns the content of the evaluation's `result.json`.

  Args:
    folder: the run's folder.
    settings: values by the names in `SETTINGS`.
  Raises:
    FileNotFoundError: if the folder is not a run's, or the trained weights are missing.
    ValueError: before any folder is made, if the run is of another experiment or not finished, or
      a setting is out of bounds or has no effect on the run's method.
  """
  read_value(NonEmptyPath, str(folder), "the folder of a run")
  stored, result = read_run(E2EConfig, folder), read_finished(folder)
  config = replace_fields(stored, {SETTINGS[name]: value for name, value in settings.items()})
  check_used(config.method, _changed(stored, config), config.experiment)
  if stored.model.rounded_to not in ("", config.model.rounded_to):
    raise ValueError(
      f"{folder} adapts weights rounded to {stored.model.rounded_to}; only adapters of unrounded "
      "weights can be evaluated on other weights"
    )
  if find_method(stored.method).owns_base and config.model.rounded_to != stored.model.rounded_to:
    raise ValueError(
      f"--rounded_to rounds the base weights of an adapter, and {folder} is a run of "
      f"{stored.method}"
    )
  check_has_model(stored)
  if not config.decoding.num_inputs:
    raise ValueError("the run decoded nothing; give the number of inputs: --num_inputs=630")
  workdir = Path(folder) / "evaluations" / _name(stored, config)
  config = dataclasses.replace(config, workdir=str(workdir))
  evaluation = run_once(config, lambda _: _evaluate(config, stored, result))
  print(markdown([evaluation], TASKS[config.data.name].metrics))
  print(f"\nwrote {workdir}")
  return evaluation


def _evaluate(config: E2EConfig, stored: E2EConfig, result: dict[str, Any]) -> dict[str, Any]:
  start = time.perf_counter()
  mesh = config.mesh.make()
  base = load_base(stored, mesh)
  params, loss = restore_params(stored, config.fit.keep, base, mesh)
  if _is_served_rounded(config, stored):
    changed = rounded(base.params, config.model.rounded_to)
    params, _ = restore_params(stored, config.fit.keep, base, mesh, changed)
    loss = validation_loss(stored, base, params, load_data(stored, base), mesh)
  return {
    **{name: result[name] for name in SHARED_FIELDS if name in result},
    "data": title(stored.data),
    **({"trained_on": "the model's weights"} if _is_served_rounded(config, stored) else {}),
    "valid_loss": loss,
    **decode_and_score(config, base, params, mesh),
    "run": stored.workdir,
    "seconds": time.perf_counter() - start,
    **provenance(),
  }


def _is_served_rounded(config: E2EConfig, stored: E2EConfig) -> bool:
  return config.model.rounded_to != stored.model.rounded_to


def _changed(stored: E2EConfig, config: E2EConfig) -> dict[str, Any]:
  """Returns the settings that differ from the run's, by config field."""
  before, now = flat(dataclasses.asdict(stored)), flat(dataclasses.asdict(config))
  return {field: now[field] for field in SETTINGS.values() if before[field] != now[field]}


def _name(stored: E2EConfig, config: E2EConfig) -> str:
  """Returns the folder's name, made of the changed settings."""
  changed = _changed(stored, config)
  parts = [f"{name}={changed[field]}" for name, field in SETTINGS.items() if field in changed]
  return ",".join(parts) or "unchanged"


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("evaluate", __doc__, argument_default=argparse.SUPPRESS)
  parser.add_argument("folder", help="the folder of a finished run")
  parser.add_argument("--num_beams", type=int, help="1 is greedy")
  parser.add_argument("--length_penalty", type=float, help="the exponent of a text's length")
  parser.add_argument("--no_repeat_ngram_size", type=int, help="0 allows all repetitions")
  parser.add_argument("--max_new_tokens", type=int, help="the longest text")
  parser.add_argument("--scoring", help="the rules: transformers, or reference (the paper's)")
  parser.add_argument("--num_inputs", type=int, help="decodes the first distinct inputs")
  parser.add_argument("--split", choices=("train", "valid", "test"), help="the split of the inputs")
  parser.add_argument("--num_shots", type=int, help="solved examples before each input")
  parser.add_argument("--rounded_to", help="serves the adapter on weights rounded to this format")
  parser.add_argument(
    "--checkpoint", choices=("best", "last"), help="the best by validation loss, or the last"
  )
  options = vars(parser.parse_args(arguments))
  with explained():
    evaluate_run(options["folder"], {n: options[n] for n in SETTINGS if n in options})


if __name__ == "__main__":
  main()
