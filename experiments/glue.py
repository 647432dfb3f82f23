"""An encoder on a GLUE or SuperGLUE task: trains and evaluates one cell of the paper's Table 2.

    python -m experiments.glue --config=experiments/configs/glue.py:MODEL,TASK \\
      --config.data.source=FOLDER

Time: 5 hours on 2 CPU cores for MiniLM's table in docs/glue.md: 4 tasks, 3 methods, 3 seeds and the
tuning of learning rates, without DoRA, which the sweeps now include. We have not run the paper's
models.
Expect: MiniLM on CoLA: Matthews 28.0 with LoRA, 29.8 with full fine-tuning, 7.4 with the head only.

`run` does it all: data -> model -> method -> fit -> metrics -> result.json.
"""

import math
import time
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from experiments.classification.config import GlueConfig
from experiments.classification.data import Data, load_data
from experiments.classification.encoder import Base, load_base, start_from
from experiments.classification.evaluator import Evaluator, write_predictions
from experiments.harness.config import read_config, replace_fields
from experiments.harness.fit import count, fit_run, initialize
from experiments.harness.launch import launch
from experiments.harness.methods import adapt, find_method
from experiments.harness.optimizer import decays
from experiments.harness.workdir import check_examples, check_model, provenance, run_once
from lora_jax.adapters.parts import path_in_part
from lora_jax.metrics import glue as metrics
from lora_jax.training.classification import classification_loss
from lora_jax.training.metrics_log import read_metrics
from lora_jax.training.processes import from_first, is_first
from lora_jax.trees import leaves_with_path, matches


def run(config: ConfigDict) -> dict[str, Any]:
  """Trains and evaluates one run; returns the content of `result.json`.

  A finished run is not repeated, and an interrupted one is resumed.
  """
  settings = read_config(GlueConfig, config)
  _check(settings)
  result = run_once(settings, lambda workdir: _run(settings, workdir))
  if is_first():
    print(report(Path(settings.workdir), result))
  return result


def _run(config: GlueConfig, workdir: Path) -> dict[str, Any]:
  start = time.perf_counter()
  mesh = config.mesh.make()
  base = load_base(config, mesh)
  base_parameters = count(base.params)
  data = load_data(config, base)
  check_examples(workdir, data.digest)
  check_model(workdir, base.module.config)
  trained = train(config, base, data, mesh)
  return {
    "experiment": config.experiment,
    "variant": config.variant,
    "model": config.model.name,
    "task": config.data.task,
    "method": config.method,
    "seed": config.seed,
    "learning_rate": config.optimizer.learning_rate,
    "evaluated_on": "part of train" if config.data.tuning else "dev",
    "num_train_records": data.num_train_records,
    "num_valid_records": len(data.valid_records),
    "base_parameters": base_parameters,
    **trained,
    "seconds": time.perf_counter() - start,
    **provenance(),
  }


def train(config: GlueConfig, base: Base, data: Data, mesh: Mesh) -> dict[str, Any]:
  """Adapts the base model and trains the head; returns the fields of the result."""
  loss, method = adapt(config)(classification_loss(base.module)), find_method(config.method)
  trainable = initialize(config, loss, base.params, data.train[0])
  if config.lora.start and method.uses("lora.start"):
    trainable = start_from(config, trainable)
  head_parameters = _head_parameters(config, trainable)
  evaluator = Evaluator(config, base, data, mesh)
  trained = fit_run(
    _with_steps(config, data),
    method,
    loss,
    base.params,
    trainable,
    data.train,
    mesh,
    examples=f"{data.num_train_records:,} records",
    decays=decays,
    evaluate=evaluator,
  )
  params = method.remaining_base(base.params, trained.kept)
  workdir = Path(config.workdir)
  outputs = evaluator.outputs(params, trained.kept)
  if is_first():
    write_predictions(workdir / "predictions.txt", outputs)
  best_epoch = trained.fitted.best_step / data.train.epoch_ends[0]
  scores = from_first(lambda: _scores(config, trained.fitted.best_step, len(data.train)))
  return trained.fields | {"head_parameters": head_parameters, "best_epoch": best_epoch} | scores


def _with_steps(config: GlueConfig, data: Data) -> GlueConfig:
  """Returns the config with numbers of steps in place of shares and epochs."""
  optimizer = config.optimizer
  warmup = math.ceil(optimizer.warmup_ratio * len(data.train)) or optimizer.warmup_steps
  every = config.fit.eval_every_steps or data.train.epoch_ends[0]
  changes = {"optimizer.warmup_steps": warmup, "fit.eval_every_steps": every}
  return replace_fields(config, changes)


def _head_parameters(config: GlueConfig, trainable: PyTree) -> int:
  """Returns the number of the head's trained parameters, which the paper does not count."""
  paths = leaves_with_path(trainable)
  return count([leaf for path, leaf in paths if matches(config.head, path_in_part(path))])


def _scores(config: GlueConfig, best_step: int, last_step: int) -> dict[str, Any]:
  """Returns the metrics of the best and the last step, from the run's log."""
  by_step = {}
  for line in read_metrics(Path(config.workdir) / "metrics.jsonl"):
    values = {n.removeprefix("valid/"): v for n, v in line.items() if n.startswith("valid/")}
    if values:
      by_step[line["step"]] = values
  for step in (best_step, last_step):
    if step not in by_step:
      raise ValueError(
        f"{config.workdir}/metrics.jsonl lacks the evaluation of step {step}. Restore the file, or "
        "give another --config.workdir"
      )
  main = metrics.main_metric(config.data.task)
  best, last = by_step[best_step], by_step[last_step]
  return {
    "metric": main,
    "score": best[main],
    "last_score": last[main],
    "scores": best,
    "last_scores": last,
  }


def report(workdir: Path, result: dict[str, Any]) -> str:
  """Returns a finished run as text."""
  body = result["trainable_parameters"] - result["head_parameters"]
  scores = ", ".join(f"{name} {value:.4f}" for name, value in result["scores"].items())
  method = find_method(result["method"]).label
  lines = [
    f"{result['model']} on {result['task']}, {method}, seed {result['seed']}",
    f"{result['metric']:<10} {100 * result['score']:.2f} at epoch {result['best_epoch']:.2f}, "
    f"{100 * result['last_score']:.2f} at the end, on {result['num_valid_records']:,} records of "
    f"{result['evaluated_on'].removeprefix('part of ')}",
    f"all        {scores}",
    f"trainable  {body:,} parameters and {result['head_parameters']:,} of the head, of "
    f"{result['base_parameters']:,}",
    f"time       {result['seconds']:.0f} s on {result['device']}",
    "",
    *(f"wrote      {path}" for path in sorted(workdir.glob("[!.]*"))),
  ]
  return "\n".join(lines)


def _check(config: GlueConfig) -> None:
  method = find_method(config.method, config.NAME)
  if not config.data.source:
    raise ValueError(
      f"data.source must name the folder with {config.data.task}'s original files, or be tfds. "
      "Give --config.data.source=FOLDER"
    )
  if method.uses("lora") and config.lora.start == "required":
    raise ValueError(
      f"the paper's {config.data.task} run starts from the adapter of an MNLI run: give "
      "--config.lora.start=FOLDER, or --config.lora.start= for random A"
    )


if __name__ == "__main__":
  launch(run, "glue.py")
