"""Prepares the tokens of a pretraining, once for all runs, and writes its model card."""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.harness.workdir import file_digest, write_json
from experiments.nlg.config import PretrainConfig
from lora_jax.data import corpus
from lora_jax.files import read_json
from lora_jax.models.gpt2.model import GPT2Config

END_OF_TEXT_ID = 0
PRETRAINING = "pretraining.json"  # written by `experiments.gpt2_pretrain` into the model's folder


class Text(NamedTuple):
  """Prepared text: streams of tokens, and the UTF-8 bytes of the held-out documents."""

  folder: Path
  train: np.ndarray
  held_out: np.ndarray
  held_out_bytes: int
  files: list[str]


def pretrained_config(config: PretrainConfig) -> GPT2Config:
  """Returns the model's shape; dtype `auto` is bfloat16, or float32 on CPUs."""
  shape = dataclasses.asdict(config.model)
  if shape["dtype"] == "auto":
    shape["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return GPT2Config(vocab_size=config.data.vocab_size, **shape)


def prepare(config: PretrainConfig) -> Text:
  """Trains the tokenizer and encodes the text, or reuses those of another run.

  Their folder is `text-<hash of the files and settings>` in `config.data.prepared`.
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
      _prepare(files, about, Path(name) / "text")
      if not folder.exists():  # another run may have been faster
        (Path(name) / "text").rename(folder)
  about = read_json(folder / "about.json")
  train, held_out = (np.load(folder / f"{name}.npy", "r") for name in ("train", "held_out"))
  return Text(folder, train, held_out, about["held_out_bytes"], about["files"])


def _prepare(files: list[Path], about: dict[str, Any], folder: Path) -> None:
  start = time.perf_counter()
  print(f"making a vocabulary of {about['vocab_size']:,} from {len(files)} files ...", flush=True)
  train, held_out = corpus.split(corpus.documents(files), about["held_out_every"])
  tokenizer = corpus.train_tokenizer(train[:: max(1, len(train) // 20_000)], about["vocab_size"])
  folder.mkdir()
  tokenizer.save(str(folder / "tokenizer.json"))
  for name, texts in (("train", train), ("held_out", held_out)):
    np.save(folder / f"{name}.npy", corpus.encode_stream(tokenizer, texts, END_OF_TEXT_ID))
  held_out_bytes = sum(len(text.encode("utf-8")) for text in held_out)
  write_json(folder / "about.json", about | {"held_out_bytes": held_out_bytes})
  print(f"done in {time.perf_counter() - start:.0f} s", flush=True)


def flops_per_token(model: GPT2Config, row_length: int) -> float:
  """Returns the FLOPs of training on one token: three times those of a forward pass."""
  mlp = model.mlp_dim or 4 * model.embed_dim
  layer = 4 * model.embed_dim**2 + 2 * model.embed_dim * mlp
  dense = model.num_layers * layer + model.vocab_size * model.embed_dim
  attention = 2 * model.num_layers * row_length * model.embed_dim  # Q K^T and P V, unmasked
  return 3 * 2 * (dense + attention)


def model_card(
  config: PretrainConfig,
  model: GPT2Config,
  text: Text,
  result: Mapping[str, Any],
  changes: Mapping[str, Any],
) -> str:
  """Returns the model card, with numbers from the run; `changes` are its command's flags."""
  loss, optimizer = result["held_out_loss"], config.optimizer
  flags = "".join(f" --config.{name}={value}" for name, value in changes.items())
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
    "training": f"AdamW, peak learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, "
    f"{result['num_train_steps']:,} steps of {config.data.batch_size} x {config.data.row_length}",
    "speed": f"{result['tokens_per_second']:,.0f} tokens/s, {result['gflops']:.0f} GFLOP/s; a "
    f"2048 x 2048 matmul: {result['matmul_gflops']:.0f} GFLOP/s",
    "hardware": f"{result['device']}, {os.cpu_count()} CPU cores, JAX {result['jax']}",
    "command": f"`python -m experiments.gpt2_pretrain --config.data.folder=TEXT{flags}`",
    "format": "Hugging Face folder; weights in bfloat16, rounded from float32",
  }
  lines = ["# A small GPT-2", "", "| | |", "|---|---|"]
  return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"
