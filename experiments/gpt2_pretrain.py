"""Pretrains a GPT-2 from scratch on a folder of text.

    python -m experiments.gpt2_pretrain --config.data.folder=FOLDER_OF_TEXT

text -> tokenizer and tokens -> fit -> held-out loss -> a Hugging Face folder with a model card.
"""

import hashlib
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.configs.gpt2_pretrain import get_config
from experiments.harness.launch import launch
from experiments.harness.recipe import fit_config, make_optimizer
from experiments.harness.workdir import (
  Config,
  check_experiment,
  check_same,
  file_digest,
  flat,
  provenance,
  run_once,
  write_json,
)
from experiments.nlg.gpt2 import PRETRAINING, random_params
from lora_jax.data import batches, corpus
from lora_jax.models.gpt2.folder import save_gpt2
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.training.loop import evaluate_loss, fit
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh
from lora_jax.training.metrics_log import read_metrics
from lora_jax.training.step import make_eval_step

END_OF_TEXT_ID = 0
ABOUT_BASE = ("train_tokens", "held_out_loss", "bits_per_byte", "commit")


class Text(NamedTuple):
  """Prepared text: streams of tokens, and the UTF-8 bytes of the held-out documents."""

  folder: Path
  train: np.ndarray
  held_out: np.ndarray
  held_out_bytes: int
  files: list[str]


def run(config: Config) -> dict[str, Any]:
  """Pretrains one model; goes on where it was, and does not repeat a finished run."""
  check_experiment(config, "gpt2_pretrain")
  if config.data.row_length > config.model.num_positions:
    raise ValueError(
      f"data.row_length {config.data.row_length} exceeds model.num_positions "
      f"{config.model.num_positions}"
    )
  if not config.data.folder:
    raise ValueError("no text is given: add --config.data.folder=FOLDER, with *.txt or *.txt.xz")
  result = run_once(config, lambda workdir: _run(config, workdir))
  print((Path(config.workdir) / "base" / "README.md").read_text("utf-8"))
  print(f"wrote {config.workdir}/base")
  return result


def _run(config: Config, workdir: Path) -> dict[str, Any]:
  begun = time.perf_counter()
  mesh = make_mesh(**config.mesh)
  model = model_config(config)
  text = prepare(config)
  check_same(workdir / "text.json", text.folder.name, "text")
  shape = {"batch_size": config.data.batch_size, "row_length": config.data.row_length}
  tokens_per_step = math.prod(shape.values())
  steps = max(1, config.data.num_train_tokens // tokens_per_step)
  train = corpus.Rows(text.train, END_OF_TEXT_ID, seed=config.seed, num_batches=steps, **shape)
  valid = corpus.Rows(text.held_out, END_OF_TEXT_ID, seed=None, **shape)
  num_valid = max(1, min(len(valid), config.data.num_valid_rows // config.data.batch_size))

  key_init, key_train = jax.random.split(jax.random.key(config.seed))
  params = random_params(model, mesh, key_init)
  module = GPT2(model)
  loss = lj.full_finetuning(language_model_loss(module, chunk_size=config.fit.loss_chunk or None))
  optimizer, schedule = make_optimizer(config, steps)
  count = optax.tree.size(params)
  print(
    f"{count:,} parameters, {len(text.train):,} tokens of text; {steps:,} steps of "
    f"{tokens_per_step:,} tokens",
    flush=True,
  )
  fitted = fit(
    loss,
    params,
    loss.init(key_init, params, train[0]),  # the parameters themselves
    optimizer,
    iter(batches.as_grain(train)),
    config=fit_config(config, steps),
    eval_loss=loss,
    eval_batches=lambda: (valid[i] for i in range(num_valid)),
    workdir=workdir,
    key=key_train,
    mesh=mesh,
    schedule=schedule,
  )
  losses = _export(workdir, text, model, loss, fitted.last, valid, mesh)
  tokens_per_second = statistics.median(
    line["train/tokens_per_second"]
    for line in read_metrics(workdir / "metrics.jsonl")
    if "train/tokens_per_second" in line
  )
  result = {
    "experiment": config.experiment,
    "variant": config.variant,
    "seed": config.seed,
    "parameters": count,
    "num_train_steps": steps,
    "train_tokens": steps * tokens_per_step,
    "epochs": steps / train.batches_per_epoch,
    **losses,
    "bits_per_byte": losses["held_out_loss"]
    * (len(text.held_out) - 1)
    / (text.held_out_bytes * math.log(2)),
    "tokens_per_second": tokens_per_second,
    "gflops": tokens_per_second * flops_per_token(model, config.data.row_length) / 1e9,
    "matmul_gflops": matmul_gflops(),
    "seconds": time.perf_counter() - begun,
    **provenance(),
  }
  (workdir / "base" / "README.md").write_text(card(config, model, text, result), "utf-8")
  write_json(workdir / "base" / PRETRAINING, {name: result[name] for name in ABOUT_BASE})
  return result


def model_config(config: Config) -> GPT2Config:
  """Returns the shape of the model; `auto` computes in bfloat16, on CPUs in float32."""
  given = config.model.to_dict()
  if given["dtype"] == "auto":
    given["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return GPT2Config(vocab_size=config.data.vocab_size, **given)


def prepare(config: Config) -> Text:
  """Makes tokenizer and tokens of the text, or finds those that another run has made.

  They lie in `text-<hash of the files and settings>` of `config.data.prepared`.
  """
  files = corpus.find_files(config.data.folder)
  about = {
    "files": [f"{path.name}, {path.stat().st_size:,} bytes" for path in files],
    "digests": [file_digest(path) for path in files],
    "vocab_size": config.data.vocab_size,
    "held_out_every": config.data.held_out_every,
  }
  root = Path(config.data.prepared)
  folder = root / f"text-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"
  if not folder.exists():
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".text-") as name:
      _prepare(config, files, about, Path(name) / "new")
      if not folder.exists():  # another run may have been faster
        (Path(name) / "new").rename(folder)
  about = json.loads((folder / "about.json").read_text("utf-8"))
  train, held_out = (np.load(folder / f"{name}.npy", "r") for name in ("train", "held_out"))
  return Text(folder, train, held_out, about["held_out_bytes"], about["files"])


def _prepare(config: Config, files: list[Path], about: dict[str, Any], folder: Path) -> None:
  begun = time.perf_counter()
  print(f"making a vocabulary of {about['vocab_size']:,} from {len(files)} files ...", flush=True)
  train, held_out = corpus.split(corpus.documents(files), about["held_out_every"])
  tokenizer = corpus.train_tokenizer(train[:: max(1, len(train) // 20_000)], about["vocab_size"])
  folder.mkdir()
  tokenizer.save(str(folder / "tokenizer.json"))
  for name, texts in (("train", train), ("held_out", held_out)):
    np.save(folder / f"{name}.npy", corpus.encode_stream(tokenizer, texts, END_OF_TEXT_ID))
  held_out_bytes = sum(len(text.encode("utf-8")) for text in held_out)
  write_json(folder / "about.json", about | {"held_out_bytes": held_out_bytes})
  print(f"done in {time.perf_counter() - begun:.0f} s", flush=True)


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
  again = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
  step, rows = make_eval_step(loss), [valid[i] for i in range(len(valid))]
  losses = {
    "held_out_loss": evaluate_loss(step, again, again, rows, mesh),
    "held_out_loss_float32": evaluate_loss(step, params, params, rows, mesh),
  }
  shutil.rmtree(workdir / "base", ignore_errors=True)  # of a sitting that was broken off here
  save_gpt2(workdir / "base", model, rounded, text.folder, END_OF_TEXT_ID)
  return losses


def flops_per_token(model: GPT2Config, row_length: int) -> float:
  """Returns the operations of training on one token: three times those of a forward pass."""
  mlp = model.mlp_dim or 4 * model.embed_dim
  layer = 4 * model.embed_dim**2 + 2 * model.embed_dim * mlp
  dense = model.num_layers * layer + model.vocab_size * model.embed_dim
  attention = 2 * model.num_layers * row_length * model.embed_dim  # Q K^T and P V, all places
  return 3 * 2 * (dense + attention)


def matmul_gflops(size: int = 2048, repeats: int = 5) -> float:
  """Returns the machine's rate of a square product in float32, the best of some."""
  x = jnp.ones((size, size))
  product = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(repeats + 1):
    begun = time.perf_counter()
    jax.block_until_ready(product(x, x))
    seconds.append(time.perf_counter() - begun)
  return 2 * size**3 / min(seconds) / 1e9


def card(config: Config, model: GPT2Config, text: Text, result: dict[str, Any]) -> str:
  """Returns the model card, every figure of it from the run."""
  loss, given = result["held_out_loss"], config.optimizer
  changes = "".join(f" --config.{name}={value}" for name, value in _changes(config).items())
  rows = {
    "parameters": f"{result['parameters']:,}: {model.num_layers} layers, {model.embed_dim} wide, "
    f"{model.num_heads} heads, {model.num_positions} positions, tied head",
    "vocabulary": f"byte-level BPE of {model.vocab_size:,}, made from the text; "
    f"`{corpus.END_OF_TEXT}` = {END_OF_TEXT_ID}",
    "text": f"{len(text.train):,} tokens of {'; '.join(text.files)}",
    "held out": f"{len(text.held_out):,} tokens, {text.held_out_bytes:,} bytes: one document in "
    f"{config.data.held_out_every}",
    "tokens seen": f"{result['train_tokens']:,} ({result['epochs']:.2f} epochs)",
    "held-out loss": f"{loss:.3f} nats/token: perplexity {math.exp(loss):.1f}, "
    f"{result['bits_per_byte']:.3f} bits per byte (before rounding: "
    f"{result['held_out_loss_float32']:.3f} nats)",
    "training": f"AdamW, peak learning rate {given.learning_rate:g}, {given.schedule}, "
    f"{result['num_train_steps']:,} steps of {config.data.batch_size} x {config.data.row_length}",
    "speed": f"{result['tokens_per_second']:,.0f} tokens/s, {result['gflops']:.0f} GFLOP/s; a "
    f"product of 2048 x 2048 matrices: {result['matmul_gflops']:.0f} GFLOP/s",
    "hardware": f"{result['device']}, {os.cpu_count()} CPU cores, JAX {result['jax']}",
    "command": f"`python -m experiments.gpt2_pretrain --config.data.folder=TEXT{changes}`",
    "form": "Hugging Face folder; weights in bfloat16, rounded from float32",
  }
  lines = ["# A small GPT-2", "", "| | |", "|---|---|"]
  return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


def _changes(config: Config) -> dict[str, Any]:
  """Returns the fields that differ from the default config's; the folders are left out."""
  before = flat(get_config())
  own = {name: value for name, value in flat(config).items() if before.get(name) != value}
  return {
    name: value
    for name, value in own.items()
    if name not in ("workdir", "data.folder", "data.prepared")
  }


if __name__ == "__main__":
  launch(run, "gpt2_pretrain.py")
