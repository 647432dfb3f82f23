"""Does a study's planned runs, each in its folder, and reads them as records.

Beside the files of every run (experiments/harness/workdir.py) a folder has

    failed.json     why its training failed, instead of result.json
    measured.json   a reported run's losses and metrics by input, and its loss on Wikipedia
    planned.json    its study, arm and kind; written last
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.classification.config import GlueConfig
from experiments.comparison.losses import losses_by_input, wikipedia_loss
from experiments.comparison.runs import MEASURED, check_config
from experiments.configs import Config
from experiments.configs.paper import STUDIES, Study
from experiments.harness import sharing
from experiments.harness.attempt import FAILED, attempt
from experiments.harness.methods import find_method
from experiments.harness.sharing import PLANNED, Task
from experiments.harness.workdir import read_result, read_run, write_json
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import decoded_inputs, examples_of, measure_parts, read_predictions
from experiments.nlg.restore import load_run
from experiments.nlg.tasks.task import by_name
from experiments.reproduction.plan import Planned, config_of
from lora_jax.files import read_json

Record = dict[str, Any]
Run = Callable[[Config], Mapping[str, Any]]
KEPT = ("num_train_steps", "train_seconds", "device", "jax", "commit")  # of a result


def carry_out(
  runs: Iterable[Planned], root: Path, run_of: Callable[[Study], Run], *, tiny: bool = False
) -> list[str]:
  """Does runs that are not finished yet; returns the folders of those that could not be done.

  A run whose training is not finite has failed: that is a result, and it is not repeated. Several
  processes share the runs of a root: one that another process does now is waited for.

  Args:
    runs: planned runs.
    root: the folder of all studies.
    run_of: returns the `run` of a study's experiment.
    tiny: whether the runs are cut to minutes.
  Raises:
    ValueError: if a folder has a run with another config.
  """

  def task(planned: Planned) -> Task:
    study, folder = STUDIES[planned.study], root / planned.study / planned.name
    config = config_of(planned, str(folder), tiny)
    kind = GlueConfig if study.base == "minilm" else E2EConfig
    check = functools.partial(check_config, folder, config, kind)
    return Task(folder, check, lambda: _do(planned, config, run_of(study)))

  return sharing.carry_out(map(task, runs))


def _do(planned: Planned, config: Config, run: Run) -> bool:
  """Does a run; returns whether it could be done. If not, the others are still worth doing."""
  folder = Path(config.workdir)
  print(folder, flush=True)

  def do() -> str:
    result = run(config)
    if planned.kind == "reported" and STUDIES[planned.study].base != "minilm":
      write_json(folder / MEASURED, measure(folder, STUDIES[planned.study]))
    return _summary(result)

  if not attempt(folder, do):
    return False
  write_json(folder / PLANNED, planned._asdict())
  return True


def _summary(result: Mapping[str, Any]) -> str:
  if "score" in result:
    return f"{result['metric']} {100 * result['score']:.2f}"
  loss = result["valid_loss"]
  return "scored" if loss is None else f"loss {loss:.4f} nats/token"


def measure(folder: str | Path, study: Study) -> dict[str, Any]:
  """Returns a finished run's losses by input, and the statistics of its metrics by input.

  Returns:
    `input_losses`, the sum of each validation example's token losses, nats, and `input_tokens`, its
    supervised tokens, of a run with a model; `rows`, by metric, the rows of its
    `SegmentStatistics`; `wikipedia_loss`, nats per token, if the study measures forgetting.
  """
  config = read_run(E2EConfig, folder)
  measured: dict[str, Any] = {"rows": _metric_rows(config, study.metrics)}
  if find_method(config.method).is_floor:
    return measured
  run = load_run(folder)
  examples = examples_of(run.config, run.base, "valid")
  losses = losses_by_input(run.base, run.params, examples, run.config)
  measured["input_losses"] = [round(float(loss), 4) for loss in losses]
  measured["input_tokens"] = [len(example.targets) for example in examples]
  if study.forgetting:
    measured["wikipedia_loss"] = wikipedia_loss(run.base, run.params, run.config)
  return measured


def _metric_rows(config: E2EConfig, metrics: Iterable[str]) -> dict[str, list[list[float]]]:
  """Returns the statistics of each decoded input, by metric."""
  decoding = config.decoding
  if not decoding.num_inputs or not metrics:
    return {}
  groups = decoded_inputs(config.data, decoding.split, decoding.num_inputs)
  texts = read_predictions(Path(config.workdir), len(groups))
  parts = measure_parts([texts], groups, config.data, decoding.split)[0]
  statistics = by_name({part: measured.statistics for part, measured in parts.items()})
  return {name: statistics[name].rows.tolist() for name in metrics if name in statistics}


def collect(root: Path) -> list[Record]:
  """Returns a record of each finished or failed run of the studies."""
  return [_record(path.parent) for path in sorted(root.glob(f"*/*/{PLANNED}"))]


def _record(folder: Path) -> Record:
  planned, result = read_json(folder / PLANNED), read_result(folder)
  record: Record = {**planned, "folder": str(folder), "status": "finished"}
  if result is None:
    return record | {"status": "failed", **read_json(folder / FAILED)}
  try:
    return _with_result(record, result)
  except KeyError as error:
    raise ValueError(
      f"{folder / 'result.json'} lacks the field {error}. Remove the folder and rerun the command"
    ) from error


def _with_result(record: Record, result: Mapping[str, Any]) -> Record:
  """Returns a finished run's record with the fields of its result, and what was measured."""
  folder = Path(record["folder"])
  record |= {name: result[name] for name in KEPT if name in result}
  is_glue = "score" in result
  record["valid_loss"] = -result["score"] if is_glue else result["valid_loss"]
  record["parameters"] = result["trainable_parameters"] - result.get("head_parameters", 0)
  record["scores"] = {"score": 100 * result["score"]} if is_glue else result.get("scores", {})
  record["intervals"] = result.get("intervals", {})
  if (folder / MEASURED).exists():
    record |= read_json(folder / MEASURED)
  return record
