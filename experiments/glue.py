"""An encoder on a task of GLUE or SuperGLUE: train, evaluate, and one cell of the paper's Table 2.

    python -m experiments.glue --config=experiments/configs/glue.py:MODEL,TASK \\
      --config.data.source=FOLDER

`run` is the whole of it: data -> model -> method -> fit -> metrics -> result.json.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.classification.encoder import Base, load_base, method, start_from
from experiments.harness.launch import launch
from experiments.harness.recipe import make_optimizer
from experiments.harness.workdir import (
  Config,
  check_examples,
  check_experiment,
  check_model,
  examples_digest,
  provenance,
  run_once,
)
from lora_jax.data import classification
from lora_jax.data.batches import as_grain
from lora_jax.data.sets.glue import Record
from lora_jax.data.sets.glue_tfds import load
from lora_jax.metrics import glue as metrics
from lora_jax.training.checkpoint import save_adapter
from lora_jax.training.classification import classification_loss, classifier, label_loss
from lora_jax.training.loop import Evaluation, FitConfig, Fitted, fit
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.metrics_log import read_metrics
from lora_jax.trees import key_parts, leaves_with_path, matches

METHODS = {
  "lora": "LoRA",
  "full_finetuning": "full fine-tuning",
  "head_only": "head only",
}


class Data(NamedTuple):
  """The batches of a run, in full, and the records that it is evaluated on."""

  train: classification.Batches
  valid: classification.Batches
  num_train_records: int
  valid_records: list[Record]
  num_matched: int  # of MNLI: the records of its matched part, which come first
  digest: str  # of the examples


def run(config: Config) -> dict[str, Any]:
  """Trains and evaluates one run; returns what `result.json` holds.

  A finished run is not done again, and a broken one goes on where it was.
  """
  _check(config)
  result = run_once(config, lambda workdir: _run(config, workdir))
  print(report(Path(config.workdir), result))
  return result


def _run(config: Config, workdir: Path) -> dict[str, Any]:
  begun = time.perf_counter()
  mesh = make_mesh(**config.mesh)
  base = load_base(config, mesh)
  base_parameters = optax.tree.size(base.params)
  data = load_data(config, base)
  check_examples(workdir, data.digest)
  check_model(workdir, base.module.config)
  trained = train(config, base, data, mesh, workdir)
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
    "seconds": time.perf_counter() - begun,
    **provenance(),
  }


def _hold_out(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
  """Splits records, the same way whatever the seed; those of one question stay together."""
  groups: dict[int, list[Record]] = {}
  for i, record in enumerate(records):
    groups.setdefault(i if record.group is None else record.group, []).append(record)
  order = np.random.default_rng(0).permutation(len(groups)).tolist()
  of_groups = list(groups.values())
  count = round(share * len(groups))
  valid, train = (
    [r for i in part for r in of_groups[i]] for part in (order[:count], order[count:])
  )
  return train, valid


def load_data(config: Config, base: Base) -> Data:
  """Returns the batches of training and evaluation.

  With `data.tuning` both are parts of the training set, and the dev set is not looked at.
  """
  given = config.data
  how = {"suite": given.suite, "data_dir": given.tfds_dir or None}
  how |= {"skip_malformed": given.skip_malformed, "any_size": given.any_size}
  train = load(given.task, "train", given.source, **how)
  num_matched = 0
  if given.tuning:
    train, valid = _hold_out(train, given.tuning_share)
  elif given.task == "mnli":  # the paper's accuracy is over both parts
    matched, other = (
      load("mnli", f"validation_{part}", given.source, **how) for part in ("matched", "mismatched")
    )
    valid, num_matched = [*matched, *other], len(matched)
  else:
    valid = load(given.task, "validation", given.source, **how)
  if given.num_train_records:
    train = train[: given.num_train_records]
  shape = {
    "row_lengths": given.row_lengths,
    "shard_index": jax.process_index(),
    "shard_count": jax.process_count(),
  }

  def encode(records: list[Record]) -> list[classification.Example]:
    return classification.encode(base.tokenizer, records, max(given.row_lengths))

  of_train, of_valid = encode(train), encode(valid)
  return Data(
    classification.bucketed_batches(
      of_train,
      batch_size=given.batch_size,
      seed=config.seed,
      num_epochs=config.fit.num_epochs,
      window=given.window,
      **shape,
    ),
    classification.bucketed_batches(of_valid, batch_size=given.eval_batch_size, seed=None, **shape),
    len(train),
    valid,
    num_matched,
    examples_digest(of_train, of_valid),
  )


def train(config: Config, base: Base, data: Data, mesh: Mesh, workdir: Path) -> dict[str, Any]:
  """Fits the adapter and the head; returns what the result holds about it."""
  adapt = method(config)
  loss = adapt(classification_loss(base.module))
  key_init, key_train = jax.random.split(jax.random.key(config.seed))
  trainable = jax.block_until_ready(loss.init(key_init, base.params, data.train[0]))
  if config.method == "lora" and config.lora.start:
    trainable = start_from(config, trainable)
  steps = len(data.train)
  per_epoch = data.train.epoch_ends[0]
  optimizer, rates = make_optimizer(config, steps, decays, _warmup(config, steps))
  counts = parameter_counts(config, trainable)
  print(
    f"{config.method} on {workdir}: {counts['trainable_parameters']:,} trainable parameters, "
    f"{data.num_train_records:,} records, {steps:,} steps",
    flush=True,
  )
  evaluator = Evaluator(config, base, data, mesh)
  fitted = fit(
    loss,
    base.params,
    trainable,
    optimizer,
    iter(as_grain(data.train)),
    config=FitConfig(
      num_train_steps=steps,
      eval_every_steps=config.fit.eval_every_steps or per_epoch,
      checkpoint_every_steps=config.fit.checkpoint_every_steps,
      log_every_steps=config.fit.log_every_steps,
      accumulation_steps=config.fit.accumulation_steps,
    ),
    evaluate=evaluator,
    workdir=workdir,
    key=key_train,
    mesh=mesh,
    schedule=rates,
  )
  if config.method != "full_finetuning" and not (workdir / "adapter").exists():
    save_adapter(workdir / "adapter", fitted.best)
  params = fitted.best if config.method == "full_finetuning" else base.params
  write_predictions(workdir / "predictions.txt", evaluator.outputs(params, fitted.best))
  return {**counts, **_of_log(config, workdir, fitted, steps, per_epoch)}


def _warmup(config: Config, steps: int) -> int:
  """Returns the steps of the warmup, which is given so or as a share of all."""
  given = config.optimizer
  return math.ceil(given.warmup_ratio * steps) if given.warmup_ratio else given.warmup_steps


def decays(trainable: PyTree) -> PyTree:
  """Returns which leaves have weight decay: not biases and normalizations, as the paper's code."""

  def decays_one(keys: Any, leaf: Any) -> bool:
    del leaf
    parts = key_parts(keys)
    return parts[-1] not in ("bias", "scale")

  return jax.tree_util.tree_map_with_path(decays_one, trainable)


def parameter_counts(config: Config, trainable: PyTree) -> dict[str, int]:
  """Returns the trained parameters, and those outside the head, which the paper counts."""
  heads = [leaf for path, leaf in leaves_with_path(trainable) if matches(config.model.head, path)]
  return {
    "trainable_parameters": optax.tree.size(trainable),
    "head_parameters": optax.tree.size(heads),
  }


def _of_log(
  config: Config, workdir: Path, fitted: Fitted, steps: int, per_epoch: int
) -> dict[str, Any]:
  """Returns the metrics of the best and the last step, from the run's log."""
  found = {}
  for line in read_metrics(workdir / "metrics.jsonl"):
    values = {n.removeprefix("valid/"): v for n, v in line.items() if n.startswith("valid/")}
    if values:
      found[line["step"]] = values
  main = metrics.main_metric(config.data.task)
  best, last = found[fitted.best_step], found[steps]
  return {
    "metric": main,
    "score": best[main],
    "last_score": last[main],
    "scores": best,
    "last_scores": last,
    "best_step": fitted.best_step,
    "best_epoch": fitted.best_step / per_epoch,
    "num_train_steps": steps,
    "train_seconds": fitted.seconds,
    "train_tokens": fitted.tokens,
    "base": fitted.base,
  }


class Evaluator:
  """Measures a trainable tree on all records, each exactly once."""

  def __init__(self, config: Config, base: Base, data: Data, mesh: Mesh):
    adapted = method(config)(classifier(base.module))
    self._task, self._data, self._mesh = config.data.task, data, mesh
    self._logits = jax.jit(lambda p, t, batch: adapted.apply(p, t, batch, lora_key=None))

  def __call__(self, params: PyTree, trainable: PyTree) -> Evaluation:
    """Returns the task's metrics; the best checkpoint is that of the highest main metric."""
    outputs, data = self.outputs(params, trainable), self._data
    labels = [record.label for record in data.valid_records]
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
      raise ValueError(f"{self._task}: {len(labels) - len(known)} of {len(labels)} have no label")
    groups = [record.group for record in data.valid_records if record.group is not None]
    answers = [record.answer for record in data.valid_records]
    found = metrics.score(self._task, outputs, known, groups, answers)
    for name, part in self._parts():
      found |= {
        f"accuracy_{name}": metrics.score(self._task, outputs[part], known[part])["accuracy"]
      }
    loss = label_loss(jnp.asarray(outputs), jnp.asarray(known), jnp.ones(len(known)))
    mean = float(loss.total / loss.weight)
    return Evaluation(-found[metrics.main_metric(self._task)], {"loss": mean, **found})

  def _parts(self) -> list[tuple[str, slice]]:
    first = self._data.num_matched
    return [("matched", slice(first)), ("mismatched", slice(first, None))] if first else []

  def outputs(self, params: PyTree, trainable: PyTree) -> np.ndarray:
    """Returns the head's outputs (records, L), in the order of the records."""
    batches = self._data.valid
    parts = [
      self._logits(params, trainable, place_batch(self._mesh, batches[i]))
      for i in range(len(batches))
    ]
    found = np.zeros((len(self._data.valid_records), parts[0].shape[-1]), np.float32)
    for i, part in enumerate(parts):
      numbers = batches.numbers(i)
      found[numbers] = multihost_utils.process_allgather(part, tiled=True)[: len(numbers)]
    return found


def write_predictions(path: Path, outputs: np.ndarray) -> None:
  """Writes a line for each record: the class's number, or the score of a regression."""
  if outputs.shape[1] == 1:
    lines = [f"{value:.6g}" for value in outputs[:, 0]]
  else:
    lines = [str(number) for number in np.argmax(outputs, axis=1)]
  path.write_text("\n".join(lines) + "\n", "utf-8")


def report(workdir: Path, result: dict[str, Any]) -> str:
  """Returns a finished run as text."""
  body = result["trainable_parameters"] - result["head_parameters"]
  scores = ", ".join(f"{name} {value:.4f}" for name, value in result["scores"].items())
  lines = [
    f"{result['model']} on {result['task']}, {METHODS[result['method']]}, seed {result['seed']}",
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


def _check(config: Config) -> None:
  check_experiment(config, "glue")
  if config.method not in METHODS:
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {config.method!r}")
  metrics.main_metric(config.data.task)
  if not config.data.source:
    raise ValueError(
      "data.source must name the folder of the original files, which holds "
      f"{config.data.task}'s own; or tfds. Give --config.data.source=FOLDER"
    )
  if config.method == "lora" and config.lora.start == "required":
    raise ValueError(
      f"the paper's {config.data.task} run starts from the adapter of an MNLI run: give "
      "--config.lora.start=<the folder of one>, or --config.lora.start= for new factors"
    )


if __name__ == "__main__":
  launch(run, "glue.py")
