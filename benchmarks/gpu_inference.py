"""The sections of `benchmarks.gpu` without training; its head explains them."""

import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

import lora_jax as lj
from benchmarks.decode import lora_jax_search, transformers_search
from benchmarks.gpu_figures import (
  GPT2_MEDIUM,
  TINY_GPT2,
  Figures,
  jax_device,
  peak_gb,
  random_params,
)
from benchmarks.turns import ratio, take_turns, timed
from lora_jax.decoding import BeamConfig, from_linen
from lora_jax.models.gpt2.folder import save_gpt2
from lora_jax.models.gpt2.model import GPT2, GPT2Config, init_cache

LORA = lj.LoraConfig(4, 8.0, r".*/attn/(query|value)/kernel")


def measure_merged(tiny: bool, attention: str, rows: int, length: int) -> Figures:
  """Returns the figures of a prompt's forward pass: the base model, merged LoRA, LoRA."""
  rows, length = (2, 16) if tiny else (rows, length)
  shape = TINY_GPT2 if tiny else GPT2_MEDIUM
  config = GPT2Config(**shape, dtype="bfloat16", param_dtype="bfloat16", attention=attention)
  model = GPT2(config)
  params = random_params(model)
  fn = functools.partial(last_logits, model)
  draw = np.random.default_rng(0)
  tokens = jnp.asarray(draw.integers(0, config.vocab_size, (rows, length)), jnp.int32)
  lora = lj.lora(fn, LORA)
  trainable = jax.jit(lora.init)(jax.random.key(1), params, tokens)
  plain, adapted = jax.jit(fn), jax.jit(lora.apply)
  merged = jax.jit(lora.merge)(params, trainable)
  ways = {
    "base": lambda: timed(plain, params, tokens)[0],
    "merged": lambda: timed(plain, merged, tokens)[0],
    "LoRA": lambda: timed(adapted, params, trainable, tokens)[0],
  }
  take_turns(ways, 1)  # compiles
  times = take_turns(ways, 5 if tiny else 100)
  ratios = {name: ratio(times[name], times["base"]) for name in ("merged", "LoRA")}
  median = statistics.median(times["base"])
  return {
    **jax_device(),
    "rows": rows,
    "length": length,
    "attention": attention,
    "step_s": median,
    "tokens_per_s": rows * length / median,
    "merged": ratios["merged"].median,
    "unmerged": ratios["LoRA"].median,
    "peak_gb": peak_gb(),
    "note": f"{rows} x {length}: merged {ratios['merged']}, LoRA {ratios['LoRA']} of the base",
  }


def last_logits(model: GPT2, params: PyTree, tokens: Int[Array, "B T"]) -> Float[Array, "B V"]:
  """Returns the logits after the last token of each row."""
  hidden: Any = model.apply({"params": params}, tokens, method="hidden")
  logits: Any = model.apply({"params": params}, hidden[:, -1], method="logits")
  return logits


def measure_beam(tiny: bool) -> Figures:
  """Returns the figures of beam search with GPT-2 medium, against `generate` of transformers.

  Beam 10, no repeated 4-grams, float32, random weights and prompts.
  """
  shape = TINY_GPT2 if tiny else GPT2_MEDIUM
  inputs, batch_size, new_tokens = (3, 2, 6) if tiny else (64, 32, 64)
  config = GPT2Config(**shape)
  model, draw = GPT2(config), np.random.default_rng(0)
  params = random_params(model)
  prompts = [
    draw.integers(1, config.vocab_size, draw.integers(20, 50)).tolist() for _ in range(inputs)
  ]
  beams = BeamConfig(eos_ids=(0,), max_new_tokens=new_tokens)
  cached = from_linen(model, functools.partial(init_cache, config), config.num_positions)
  with tempfile.TemporaryDirectory() as scratch, jax.default_matmul_precision("highest"):
    save_gpt2(Path(scratch) / "gpt2", config, params, end_of_text_id=0)
    searches = {
      "lora_jax": lora_jax_search(cached, params, beams),
      "transformers": transformers_search(Path(scratch) / "gpt2", beams, threads=1),
    }
    first = {name: search(prompts, batch_size) for name, search in searches.items()}
    ways = {
      name: lambda search=search: timed(search, prompts, batch_size)[0]
      for name, search in searches.items()
    }
    times = take_turns(ways, 1 if tiny else 3)
  speed = ratio(times["lora_jax"], times["transformers"])
  ours, peer = (first[name].outputs for name in ways)
  equal = sum(a == b for a, b in zip(ours, peer, strict=True))
  median = statistics.median(times["lora_jax"])
  return {
    **jax_device(),
    "step_s": median,
    "transformers_s": statistics.median(times["transformers"]),
    "tokens_per_s": sum(map(len, ours)) / median,
    "of_transformers": speed.median,
    "equal_outputs": equal,
    "peak_gb": peak_gb(),
    "note": f"{speed} of the time of transformers; equal outputs: {equal} of {inputs}",
  }
