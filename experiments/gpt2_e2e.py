"""A language model on the E2E NLG Challenge: trains, decodes and scores one row of a table.

    python -m experiments.gpt2_e2e [--config=experiments/configs/gpt2_e2e.py:VARIANT]
    python -m experiments.gpt2_e2e --config=experiments/configs/gpt2_e2e.py:smollm2   # make smollm2

`--config.model.folder=` takes any causal language model of the zoo.

Time: 4 minutes on 2 CPU cores (`mini`, the default); the paper's variants have not been run here.
Expect: 1.464 to 1.473 nats/token and BLEU 43.2 to 49.6 over two seeds and three machines, with LoRA
of 442,368 parameters on `mini`.

`run` does it all: data -> model -> method -> fit -> decode -> metrics -> result.json.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

import lora_jax as lj
from experiments.harness.config import check_attention, read_config, replace_fields
from experiments.harness.fit import Training, count, fit_run
from experiments.harness.launch import launch
from experiments.harness.methods import adapt, find_method
from experiments.harness.workdir import (
  check_examples,
  check_model,
  open_workdir,
  provenance,
  read_run,
  run_once,
)
from experiments.nlg.base import Base, float_params, load_base, pretraining_tokens
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import (
  Data,
  decode_and_score,
  inputs_of,
  load_data,
  score,
  served,
  validation_loss,
)
from experiments.nlg.from_data import start_from_data
from experiments.nlg.loftq import check_quantized, initial_adapter
from experiments.nlg.scores import markdown
from experiments.nlg.tasks.table import TASKS, title
from experiments.nlg.tokens import with_token_ids
from lora_jax.training.loss import language_model_loss
from lora_jax.training.processes import from_first, is_first


def run(config: ConfigDict) -> dict[str, Any]:
  """Trains, decodes and scores one run; returns the content of `result.json`.

  A finished run is not repeated, and an interrupted one is resumed.
  """
  settings = read_config(E2EConfig, config)
  find_method(settings.method, settings.NAME)
  settings = with_token_ids(settings)
  result = run_once(settings, lambda workdir: _run(settings, workdir))
  if is_first():
    print(report(Path(settings.workdir), result))
  return result


def _run(config: E2EConfig, workdir: Path) -> dict[str, Any]:
  start = time.perf_counter()
  config.check_steps()
  check_quantized(config)
  check_attention(config.model.attention, config.model.dtype)
  mesh, method = config.mesh.make(), find_method(config.method)
  if method.is_floor:
    return from_first(lambda: floor(config, workdir))
  base = load_base(config, mesh)
  base_parameters = count(base.params)
  data = load_data(config, base)
  check_examples(workdir, data.digest)
  check_model(workdir, base.config)
  params, trained = (train if method.trains else measure)(config, base, data, mesh)
  scores: dict[str, Any] = {}
  if config.decoding.num_inputs:
    scores = decode_and_score(config, base, params, mesh)
  return {
    "experiment": config.experiment,
    "variant": config.variant,
    "data": title(config.data),
    "method": config.method,
    "seed": config.seed,
    "num_train_records": data.num_train_records if method.trains else 0,
    "base_parameters": base_parameters,
    "pretraining_tokens": pretraining_tokens(config),
    **trained,
    **scores,
    "seconds": time.perf_counter() - start,
    **provenance(),
  }


def train(config: E2EConfig, base: Base, data: Data, mesh: Mesh) -> tuple[PyTree, dict[str, Any]]:
  """Adapts the base model; returns the served params, and the result's fields about training."""
  training = prepare(config, base, data, mesh)
  trained = fit_run(**training._asdict())
  losses = {"valid_loss": trained.loss, "last_valid_loss": trained.fitted.last_loss}
  return served(config, training.eval_loss, base.params, trained.kept), trained.fields | losses


def prepare(config: E2EConfig, base: Base, data: Data, mesh: Mesh) -> Training:
  """Returns the training of a run: its adapted losses, initial adapter and batches."""
  start_from_data(config, language_model_loss(base.module), base.params, data.train, mesh)
  adapted = adapt(config)
  loss = adapted(
    language_model_loss(
      base.module, config.optimizer.label_smoothing, config.fit.loss_chunk or None
    )
  )
  num_steps = config.fit.num_train_steps or len(data.train)
  return Training(
    with_warmup(config, num_steps),
    find_method(config.method),
    loss,
    base.params,
    initial_adapter(config, loss, base.params, data.train[0], lambda: float_params(config, mesh)),
    data.train,
    mesh,
    examples=f"{data.num_train_records:,} examples",
    num_train_steps=num_steps,
    keep=config.fit.keep,
    eval_loss=adapted(language_model_loss(base.module)),
    eval_batches=lambda: iter(data.valid),
  )


def trainings(config: ConfigDict) -> Callable[[ConfigDict], AbstractContextManager[Training]]:
  """Loads the base model of runs that are trained together, from the config of one of them.

  Returns a function that opens the folder of a run, for as long as it is trained.
  """
  settings = read_config(E2EConfig, config)
  check_attention(settings.model.attention, settings.model.dtype)
  mesh = settings.mesh.make()
  base = load_base(settings, mesh)

  @contextmanager
  def opened(config: ConfigDict) -> Iterator[Training]:
    settings = read_config(E2EConfig, config)
    settings.check_steps()
    with open_workdir(settings) as workdir:
      data = load_data(settings, base)
      check_examples(workdir, data.digest)
      check_model(workdir, base.config)
      yield prepare(settings, base, data, mesh)

  return opened


def with_warmup(config: E2EConfig, num_train_steps: int) -> E2EConfig:
  """Returns the config with `optimizer.warmup_share`, if set, converted to steps."""
  if not config.optimizer.warmup_share:
    return config
  steps = max(1, round(config.optimizer.warmup_share * num_train_steps))
  return replace_fields(config, {"optimizer.warmup_share": 0.0, "optimizer.warmup_steps": steps})


def measure(config: E2EConfig, base: Base, data: Data, mesh: Mesh) -> tuple[PyTree, dict[str, Any]]:
  """Returns the base params and their validation loss, for methods that do not train."""
  params = lj.dequantize(base.params)
  valid_loss = validation_loss(config, base, params, data, mesh)
  return params, {"trainable_parameters": 0, "valid_loss": valid_loss}


def floor(config: E2EConfig, workdir: Path) -> dict[str, Any]:
  """Scores texts that need no model; returns the content of `result.json`.

  Raises:
    ValueError: if the data set has no such texts, or no inputs are decoded.
  """
  start = time.perf_counter()
  task = TASKS[config.data.name]
  if task.floor is None:
    names = [name for name, other in TASKS.items() if other.floor]
    raise ValueError(
      f"data.name={config.data.name} has no method=floor; expected one of {', '.join(names)}"
    )
  groups = inputs_of(config)
  if not groups:
    raise ValueError("method=floor scores texts, and decoding.num_inputs is 0; expected 1 or more")
  texts = task.floor([group.context for group in groups], task.load(config.data, "train"))
  return {
    "experiment": config.experiment,
    "variant": "",
    "data": title(config.data),
    "method": config.method,
    "floor_texts": task.floor_label,
    "seed": config.seed,
    "num_train_records": 0,
    "base_parameters": 0,
    "trainable_parameters": 0,
    "valid_loss": None,
    **score(
      [" ".join(text.split()) for text in texts], groups, workdir, config.data, config.decoding
    ),
    "seconds": time.perf_counter() - start,
    **provenance(),
  }


def report(workdir: Path, result: dict[str, Any]) -> str:
  """Returns a finished run as text: the row, samples, and the paths of its files."""
  config = read_run(E2EConfig, workdir)
  lines = [title(config.data), "", markdown([result], TASKS[config.data.name].metrics)]
  predictions = workdir / "predictions.txt"
  if predictions.is_file():
    texts = predictions.read_text("utf-8").split("\n")
    groups = inputs_of(config)
    for i in range(0, len(groups), max(1, len(groups) // 3)):
      context = " ".join(groups[i].context.split())
      lines += ["", f"input      {context}", f"generated  {texts[i]}"]
      lines += [f"reference  {groups[i].references[0]}"]
  lines.append("")
  if result["valid_loss"] is not None:
    share = 100 * result["trainable_parameters"] / result["base_parameters"]
    lines += [
      f"trainable  {result['trainable_parameters']:,} of {result['base_parameters']:,} parameters "
      f"({share:.2f} %)",
      f"loss       {result['valid_loss']:.4f} nats/token on "
      f"{config.data.num_valid_records or 'all'} validation examples",
    ]
  else:
    lines.append(f"floor      {result['floor_texts']}, without a model")
  lines.append(f"time       {result['seconds']:.0f} s on {result['device']}")
  if errors := result.get("slot_errors"):
    counts = ", ".join(f"{errors[name]:,} {name}" for name in ("missing", "wrong", "added"))
    lines.append(
      f"slots      {counts} of {errors['slots']:,}; SER of the references "
      f"{result['reference_slot_error_rate']:.2f}"
    )
  for name, reason in result.get("scores", {}).get("missing", {}).items():
    lines.append(f"no {name}: {reason}")
  lines += ["", *(f"wrote      {path}" for path in sorted(workdir.glob("[!.]*")))]
  return "\n".join(lines)


if __name__ == "__main__":
  launch(run, "gpt2_e2e.py", trainings=trainings)
