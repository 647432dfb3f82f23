"""A run of the E2E experiment that takes seconds: real lines, a tiny model with random weights."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import lora_jax
from experiments.configs import gpt2_e2e
from lora_jax.data.sets.e2e_tfds import load
from lora_jax.models.gpt2.folder import save_gpt2
from lora_jax.models.gpt2.model import GPT2, GPT2Config

EMBEDDED = Path(lora_jax.__file__).parent / "assets" / "gpt2"


@functools.cache
def tiny_folder() -> Path:
  """Returns a Hugging Face folder of a random GPT-2, 2 layers x 32, with the embedded tokenizer."""
  config = GPT2Config(vocab_size=8192, num_positions=256, embed_dim=32, num_layers=2, num_heads=2)
  params = jax.jit(GPT2(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  folder = Path(tempfile.mkdtemp(prefix="tiny-gpt2-")) / "model"
  save_gpt2(folder, config, params, tokenizer_from=EMBEDDED, end_of_text_id=0)
  return folder


def chat_folder(folder: Path, template: str) -> Path:
  """Makes an empty folder the tiny GPT-2's, with a chat template; returns it."""
  for file in tiny_folder().iterdir():
    (folder / file.name).symlink_to(file)
  config = {"eos_token": "<|endoftext|>", "chat_template": template}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def write_pairs(path: Path, count: int) -> None:
  """Writes about as many of E2E's examples as a user's file of prompts and completions."""
  records = load("train")
  with path.open("w") as file:
    for record in records[:: len(records) // count]:
      line = {"prompt": record.context + "\n", "completion": record.completion}
      file.write(json.dumps(line) + "\n")


def tiny_config(workdir: str | Path):
  """Returns a config of `experiments.gpt2_e2e`: 60 examples, 4 inputs, beam 2."""
  config = gpt2_e2e.get_config("mini")
  config.workdir = str(workdir)
  config.model.folder = str(tiny_folder())
  config.data.update({"num_train_records": 60, "num_valid_records": 20, "batch_size": 4})
  config.fit.update({"eval_every_steps": 3, "checkpoint_every_steps": 2, "log_every_steps": 1})
  config.fit.checkpoint_every_seconds = 0.0  # a slow machine changes nothing
  config.lora.rank = 4
  config.optimizer.warmup_steps = 2
  config.decoding.update({"num_inputs": 4, "num_beams": 2, "max_new_tokens": 8, "batch_size": 4})
  return config
