"""The card of a pretrained base, and its speed against the machine's."""

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.nlg.config import PretrainConfig
from experiments.nlg.pretraining_text import END_OF_TEXT_ID, Text
from lora_jax.data import corpus
from lora_jax.models.gpt2.model import GPT2Config


def flops_per_token(model: GPT2Config, row_length: int) -> float:
  """Returns the operations of training on one token: three times those of a forward pass."""
  mlp = model.mlp_dim or 4 * model.embed_dim
  layer = 4 * model.embed_dim**2 + 2 * model.embed_dim * mlp
  dense = model.num_layers * layer + model.vocab_size * model.embed_dim
  attention = 2 * model.num_layers * row_length * model.embed_dim  # Q K^T and P V, all places
  return 3 * 2 * (dense + attention)


def matmul_gflops(size: int = 2048, repeats: int = 5) -> float:
  """Returns the machine's speed in a square matmul in float32, the best of some."""
  x = jnp.ones((size, size))
  product = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds) / 1e9


def model_card(
  config: PretrainConfig,
  model: GPT2Config,
  text: Text,
  result: Mapping[str, Any],
  changes: Mapping[str, Any],
) -> str:
  """Returns the model card, every figure of it from the run; `changes` is for its command."""
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
    f"product of 2048 x 2048 matrices: {result['matmul_gflops']:.0f} GFLOP/s",
    "hardware": f"{result['device']}, {os.cpu_count()} CPU cores, JAX {result['jax']}",
    "command": f"`python -m experiments.gpt2_pretrain --config.data.folder=TEXT{flags}`",
    "form": "Hugging Face folder; weights in bfloat16, rounded from float32",
  }
  lines = ["# A small GPT-2", "", "| | |", "|---|---|"]
  return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"
