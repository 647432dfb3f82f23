"""Pretrains a GPT-2 from scratch on a folder of text.

    python -m experiments.gpt2_pretrain --config.data.folder=FOLDER_OF_TEXT

Time: 1.6 hours on 2 CPU cores at the 3,495 tokens/s of docs/gpt2_pretrain.md, and the tokenizer.
Expect: 4.287 nats/token held out, on the Wikipedia text of lora_jax/assets/gpt2/README.md.

text -> tokenizer and tokens -> fit -> held-out loss -> a Hugging Face folder with a model card.
"""

import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

import lora_jax as lj
from experiments.configs.gpt2_pretrain import get_config
from experiments.harness.config import check_attention, flat, read_config
from experiments.harness.fit import fit_run, initialize
from experiments.harness.flops import matmul_flops
from experiments.harness.launch import launch
from experiments.harness.methods import METHODS
from experiments.harness.workdir import check_same, provenance, run_once, write_json
from experiments.nlg.base import random_params
from experiments.nlg.config import PretrainConfig
from experiments.nlg.pretraining import (
  END_OF_TEXT_ID,
  PRETRAINING,
  Text,
  flops_per_token,
  model_card,
  prepare,
  pretrained_config,
)
from lora_jax.data import corpus
from lora_jax.models.gpt2.folder import save_gpt2
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.placement import gathered
from lora_jax.training.loop import evaluate_loss
from lora_jax.training.loss import language_model_loss
from lora_jax.training.metrics_log import read_metrics
from lora_jax.training.processes import from_first, is_first, wait_for_all
from lora_jax.training.step import make_eval_step

ABOUT_BASE = ("train_tokens", "held_out_loss", "bits_per_byte", "commit")


def run(config: ConfigDict) -> dict[str, Any]:
  """Pretrains one model; an interrupted run is resumed, and a finished one not repeated."""
  settings = read_config(PretrainConfig, config)
  if not settings.data.folder:
    raise ValueError("no text is given: add --config.data.folder=FOLDER, with *.txt or *.txt.xz")
  before = flat(get_config())
  changes = {n: value for n, value in flat(config).items() if before.get(n) != value}
  for folder in ("workdir", "data.folder", "data.prepared"):  # these differ between users
    changes.pop(folder, None)
  result = run_once(settings, lambda workdir: _run(settings, workdir, changes))
  if is_first():
    print((Path(settings.workdir) / "base" / "README.md").read_text("utf-8"))
    print(f"wrote {settings.workdir}/base")
  return result


def _run(config: PretrainConfig, workdir: Path, changes: dict[str, Any]) -> dict[str, Any]:
  start = time.perf_counter()
  config.check_steps()
  check_attention(config.model.attention, config.model.dtype)
  if is_first():
    prepare(config)
  wait_for_all()
  mesh, model, text = config.mesh.make(), pretrained_config(config), prepare(config)
  check_same(workdir / "text.json", text.folder.name, "text")
  shape = {"batch_size": config.data.batch_size, "row_length": config.data.row_length}
  steps = config.num_train_steps
  train = corpus.Rows(
    text.train,
    END_OF_TEXT_ID,
    seed=config.seed,
    num_batches=steps,
    local_rows=config.local_rows(config.data.batch_size, config.fit.accumulation_steps),
    **shape,
  )
  local_rows = config.local_rows(config.data.batch_size)
  valid = corpus.Rows(text.held_out, END_OF_TEXT_ID, seed=None, local_rows=local_rows, **shape)
  num_valid = max(1, min(len(valid), config.data.num_valid_rows // config.data.batch_size))

  key, _ = jax.random.split(jax.random.key(config.seed))
  params = random_params(GPT2(model), mesh, key)
  loss = lj.full_finetuning(
    language_model_loss(GPT2(model), chunk_size=config.fit.loss_chunk or None)
  )
  trained = fit_run(
    config,
    METHODS["full_finetuning"],
    loss,
    params,
    initialize(config, loss, params, train[0]),  # the parameters themselves
    train,
    mesh,
    examples=f"{len(text.train):,} tokens of text",
    keep="last",
    eval_loss=loss,
    eval_batches=lambda: (valid[i] for i in range(num_valid)),
  )
  losses = _export(workdir, text, model, loss, trained.kept, valid, mesh)
  tokens_per_second = from_first(
    lambda: statistics.median(
      line["train/tokens_per_second"]
      for line in read_metrics(workdir / "metrics.jsonl")
      if "train/tokens_per_second" in line
    )
  )
  result = {
    "experiment": config.experiment,
    "variant": config.variant,
    "seed": config.seed,
    "parameters": trained.fields["trainable_parameters"],
    "num_train_steps": steps,
    "train_tokens": steps * math.prod(shape.values()),
    "epochs": steps / train.batches_per_epoch,
    **losses,
    "bits_per_byte": losses["held_out_loss"]
    * (len(text.held_out) - 1)
    / (text.held_out_bytes * math.log(2)),
    "tokens_per_second": tokens_per_second,
    "gflops": tokens_per_second * flops_per_token(model, config.data.row_length) / 1e9,
    "matmul_gflops": matmul_flops() / 1e9,
    "seconds": time.perf_counter() - start,
    **provenance(),
  }
  if not is_first():
    return result
  card = model_card(config, model, text, result, changes)
  (workdir / "base" / "README.md").write_text(card, "utf-8")
  write_json(workdir / "base" / PRETRAINING, {name: result[name] for name in ABOUT_BASE})
  return result


def _export(
  workdir: Path,
  text: Text,
  model: GPT2Config,
  loss: lj.Adaptation,
  params: PyTree,
  valid: corpus.Rows,
  mesh: Mesh,
) -> dict[str, float]:
  """Writes the model in bfloat16 to `base/`; returns its losses on the held-out text, nats."""
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
  step, rows = make_eval_step(loss), [valid[i] for i in range(len(valid))]
  losses = {
    "held_out_loss": evaluate_loss(step, widened, widened, rows, mesh),
    "held_out_loss_float32": evaluate_loss(step, params, params, rows, mesh),
  }
  rounded = gathered(rounded)
  if is_first():
    shutil.rmtree(workdir / "base", ignore_errors=True)  # an interrupted session may have left it
    save_gpt2(workdir / "base", model, rounded, text.folder, END_OF_TEXT_ID)
  return losses


if __name__ == "__main__":
  launch(run, "gpt2_pretrain.py")
