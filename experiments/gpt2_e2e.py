"""GPT-2 on the E2E NLG Challenge: train, decode, score, and one row of the paper's Table 3.

    python -m experiments.gpt2_e2e [--config=experiments/configs/gpt2_e2e.py:VARIANT]

`run` is the whole of it: data -> model -> method -> fit -> decode -> metrics -> result.json.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.harness import table
from experiments.harness.launch import launch
from experiments.harness.recipe import fit_config, make_optimizer
from experiments.harness.workdir import (
  Config,
  check_examples,
  check_experiment,
  check_model,
  examples_digest,
  provenance,
  read_config,
  run_once,
)
from experiments.nlg.gpt2 import Base, cached_model, load_base, method, pretraining_tokens
from experiments.nlg.scoring import score_texts
from lora_jax.data import batches as data_batches
from lora_jax.data import text
from lora_jax.data.sets import e2e, e2e_tfds
from lora_jax.decoding import BeamConfig, beam_search
from lora_jax.training.checkpoint import save_adapter
from lora_jax.training.loop import evaluate_loss, fit
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh
from lora_jax.training.step import make_eval_step


class Data(NamedTuple):
  """The batches of a run, in full."""

  train: data_batches.Batches
  valid: data_batches.Batches
  num_train_records: int
  digest: str  # of the examples


def run(config: Config) -> dict[str, Any]:
  """Trains, decodes and scores one run; returns what `result.json` holds.

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
  data = load_data(config, base)
  check_examples(workdir, data.digest)
  check_model(workdir, base.config)
  merged, trained = train(config, base, data, mesh, workdir)
  scores: dict[str, Any] = {}
  if config.decoding.num_inputs:
    scores = evaluate(config, base, merged, workdir, mesh)
  return {
    "experiment": config.experiment,
    "variant": config.variant,
    "method": config.method,
    "seed": config.seed,
    "num_train_records": data.num_train_records if config.method != "frozen_base" else 0,
    "base_parameters": optax.tree.size(
      base.params if config.method != "full_finetuning" else merged
    ),
    "pretraining_tokens": pretraining_tokens(config),
    **trained,
    **scores,
    "seconds": time.perf_counter() - begun,
    **provenance(),
  }


def load_data(config: Config, base: Base) -> Data:
  """Returns the batches of training and validation."""
  data, limit = config.data, min(512, base.config.num_positions)

  def examples(split: e2e.Split, count: int) -> list[text.Example]:
    def choose(size: int) -> Sequence[int]:
      if count > size:
        raise ValueError(f"the {split} split has {size} records, expected {count} or more")
      if not count:
        return range(size)
      return np.random.default_rng(0).permutation(size)[:count].tolist()  # whatever the seed

    records = e2e_tfds.load(split, data.form, data.source, choose=choose)
    return text.encode(base.tokenizer, records, base.end_of_text, limit, truncate=True)

  train = examples("train", data.num_train_records)
  valid = examples("valid", data.num_valid_records)

  def batches(examples: list[text.Example], seed: int | None, epochs: int):
    shape = {
      "batch_size": data.batch_size,
      "loss_length": data.loss_length,
      "seed": seed,
      "num_epochs": epochs,
      "shard_index": jax.process_index(),
      "shard_count": jax.process_count(),
    }
    if data.packing:
      return data_batches.packed_batches(examples, row_length=data.row_length, **shape)
    return data_batches.padded_batches(examples, row_lengths=[data.row_length], **shape)

  in_epochs, once = batches(train, config.seed, data.num_epochs), batches(valid, None, 1)
  return Data(in_epochs, once, len(train), examples_digest(train, valid))


def train(
  config: Config, base: Base, data: Data, mesh: Mesh, workdir: Path
) -> tuple[PyTree, dict[str, Any]]:
  """Fits the adapter; returns merged params and what the result holds about training."""
  adapt = method(config)
  eval_loss = adapt(language_model_loss(base.module))
  if config.method == "frozen_base":
    step = make_eval_step(eval_loss)
    valid = evaluate_loss(step, base.params, base.params, iter(data.valid), mesh)
    return base.params, {"trainable_parameters": 0, "valid_loss": valid}
  loss = adapt(
    language_model_loss(
      base.module, config.optimizer.label_smoothing, config.fit.loss_chunk or None
    )
  )
  key_init, key_train = jax.random.split(jax.random.key(config.seed))
  trainable = jax.block_until_ready(loss.init(key_init, base.params, data.train[0]))
  steps = config.fit.num_train_steps or len(data.train)
  optimizer, schedule = make_optimizer(config, steps)
  count = optax.tree.size(trainable)
  print(
    f"{config.method} on {workdir}: {count:,} trainable parameters, "
    f"{data.num_train_records:,} lines, {steps:,} steps",
    flush=True,
  )
  fitted = fit(
    loss,
    base.params,
    trainable,
    optimizer,
    iter(data_batches.as_grain(data.train)),
    config=fit_config(config, steps),
    eval_loss=eval_loss,
    eval_batches=lambda: iter(data.valid),
    workdir=workdir,
    key=key_train,
    mesh=mesh,
    schedule=schedule,
  )
  best = config.fit.keep == "best"
  adapter = fitted.best if best else fitted.last
  if config.method == "lora" and not (workdir / "adapter").exists():
    save_adapter(workdir / "adapter", adapter)
  return eval_loss.merge(base.params, adapter), {
    "trainable_parameters": count,
    "num_train_steps": steps,
    "best_step": fitted.best_step,
    "valid_loss": fitted.best_loss if best else fitted.last_loss,
    "last_valid_loss": fitted.last_loss,
    "train_seconds": fitted.seconds,
    "train_tokens": fitted.tokens,
    "base": fitted.base,
  }


def evaluate(
  config: Config, base: Base, params: PyTree, folder: Path, mesh: Mesh
) -> dict[str, Any]:
  """Decodes and scores; writes predictions.txt to `folder`."""
  groups = decoded_inputs(config)
  begun = time.perf_counter()
  print(f"decoding {len(groups)} inputs, beam {config.decoding.num_beams} ...", flush=True)
  texts = generate(config, base, params, [group.context for group in groups], mesh)
  seconds = time.perf_counter() - begun
  return {**score_texts(texts, groups, folder), "decode_seconds": seconds}


def decoded_inputs(config: Config) -> list[e2e.Group]:
  """Returns the distinct inputs that are decoded, with their references."""
  records = e2e_tfds.load(config.decoding.split, config.data.form, config.data.source)
  return e2e.grouped(records)[: config.decoding.num_inputs]


def generate(
  config: Config, base: Base, params: PyTree, contexts: list[str], mesh: Mesh
) -> list[str]:
  """Returns one text for each context, by beam search; each is one line."""
  given = config.decoding
  newlines = base.tokenizer.encode("\n\n", add_special_tokens=False).ids
  search = BeamConfig(
    eos_ids=(base.end_of_text, *(newlines if len(newlines) == 1 else ())),
    num_beams=given.num_beams,
    length_penalty=given.length_penalty,
    no_repeat_ngram_size=given.no_repeat_ngram_size,
    max_new_tokens=given.max_new_tokens,
    pad_id=base.end_of_text,
    scoring=given.scoring,
  )
  room = min(448, base.config.num_positions - given.max_new_tokens)
  prompts = [ids[-room:] for ids in text.encode_context(base.tokenizer, contexts, base.end_of_text)]
  found = beam_search(
    cached_model(base.config), params, prompts, search, batch_size=given.batch_size, mesh=mesh
  )
  texts = (base.tokenizer.decode(ids).split("\n\n")[0] for ids in found.best())
  return [" ".join(text.splitlines()).strip() for text in texts]


def report(workdir: Path, result: dict[str, Any]) -> str:
  """Returns a finished run as text: the row, samples, and where everything is."""
  lines = [table.markdown([result])]
  config: Config = read_config(workdir)
  predictions = workdir / "predictions.txt"
  if predictions.is_file():
    texts = predictions.read_text("utf-8").split("\n")
    groups = decoded_inputs(config)
    for i in range(0, len(groups), max(1, len(groups) // 3)):
      lines += ["", f"input      {groups[i].context}", f"generated  {texts[i]}"]
      lines += [f"reference  {groups[i].references[0]}"]
  share = 100 * result["trainable_parameters"] / result["base_parameters"]
  lines += [
    "",
    f"trainable  {result['trainable_parameters']:,} of {result['base_parameters']:,} parameters "
    f"({share:.2f} %)",
    f"loss       {result['valid_loss']:.4f} nats/token on {config.data.num_valid_records or 'all'} "
    "validation lines",
    f"time       {result['seconds']:.0f} s on {result['device']}",
  ]
  for name, reason in result.get("scores", {}).get("missing", {}).items():
    lines.append(f"no {name}: {reason}")
  lines += ["", *(f"wrote      {path}" for path in sorted(workdir.glob("[!.]*")))]
  return "\n".join(lines)


def _check(config: Config) -> None:
  check_experiment(config, "gpt2_e2e")
  for name, value, known in (
    ("method", config.method, ("lora", "full_finetuning", "frozen_base")),
    ("model.start", config.model.start, ("pretrained", "random")),
    ("fit.keep", config.fit.keep, ("best", "last")),
  ):
    if value not in known:
      raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


if __name__ == "__main__":
  launch(run, "gpt2_e2e.py")
