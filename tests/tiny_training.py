"""Training runs of a second or two: a tiny GPT-2, random examples, LoRA or full fine-tuning.

python -m tests.tiny_training WORKDIR --method full_finetuning --kill_at 5
"""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.data.batches import Batches, as_grain, packed_batches
from lora_jax.data.text import Example
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.training.checkpoint import Checkpoints
from lora_jax.training.loop import FitConfig, Fitted, fit
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh

TARGET = r".*/(attn/query|mlp/up)/kernel"
VOCABULARY, ROW = 64, 32
STEPS = 8


@cache
def model(
  scan_layers: bool = False,
  num_layers: int = 2,
  vocab_size: int = VOCABULARY,
  num_positions: int = ROW,
):
  """Returns a GPT-2 of 32 dimensions and its params, all random."""
  config = GPT2Config(
    vocab_size=vocab_size,
    num_positions=num_positions,
    embed_dim=32,
    num_layers=num_layers,
    num_heads=2,
    scan_layers=scan_layers,
  )
  module = GPT2(config)
  params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
  draw = np.random.default_rng(0)
  noise = [0.05 * draw.standard_normal(x.shape) for x in jax.tree.leaves(params)]
  noise = jax.tree.unflatten(jax.tree.structure(params), noise)
  return module, jax.tree.map(lambda x, n: np.asarray(x + n, np.float32), params, noise)


def fresh_params(**shape: Any) -> Any:
  """Returns the params in new buffers, which a step may donate."""
  return jax.tree.map(jnp.array, model(**shape)[1])


def examples(count: int, seed: int = 0) -> list[Example]:
  """Returns random examples of 6 to 20 tokens, the second half of each supervised."""
  draw = np.random.default_rng(seed)
  drawn = []
  for _ in range(count):
    ids = draw.integers(1, VOCABULARY, draw.integers(6, 21), dtype=np.int32)
    first = len(ids) // 2
    drawn.append(Example(ids[:-1], ids[first:], np.arange(first - 1, len(ids) - 1, dtype=np.int32)))
  return drawn


def batches(count: int = 80, seed: int | None = 0, batch_size: int = 8, epochs: int = 2) -> Batches:
  return packed_batches(
    examples(count),
    batch_size=batch_size,
    row_length=ROW,
    loss_length=20,
    seed=seed,
    num_epochs=epochs,
  )


def method(name: str, dropout: float = 0.1):
  """Returns `lora` with dropout, or `full_finetuning`, for any function."""
  if name == "full_finetuning":
    return lj.full_finetuning
  return partial(lj.lora, config=lj.LoraConfig(4, 8.0, TARGET, dropout=dropout))


class KillsItself:
  """An iterator of batches that kills the process when asked for the n-th batch."""

  def __init__(self, iterator: Any, n: int):
    self._iterator, self._left = iterator, n

  def __next__(self) -> Any:
    self._left -= 1
    if not self._left:
      os.kill(os.getpid(), signal.SIGKILL)
    return next(self._iterator)

  def get_state(self) -> Any:
    return self._iterator.get_state()

  def set_state(self, state: Any) -> None:
    self._iterator.set_state(state)


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
  """Interrupts the training inside, right after the checkpoint of a step; it must get there."""
  save = Checkpoints.save

  def save_and_stop(self: Checkpoints, now: int, *args: Any) -> None:
    save(self, now, *args)
    if now == step:
      raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
      yield


def train(
  workdir: str | Path,
  name: str = "lora",
  *,
  kill_at: int = 0,
  steps: int = STEPS,
  learning_rate: optax.ScalarOrSchedule = 1e-2,
  accumulation_steps: int = 1,
  eval_every_steps: int = 3,
  checkpoint_every_seconds: float = 0.0,  # a slow machine changes nothing
  seed: int = 0,
  progress: bool = False,
) -> Fitted:
  """Trains in `workdir`, where an interrupted run is resumed."""
  adapt, (module, _) = method(name), model(num_layers=1)
  loss, eval_loss = (adapt(language_model_loss(module, eps)) for eps in (0.1, 0.0))
  data, valid = batches(), batches(20, None, epochs=1)
  params = fresh_params(num_layers=1)
  trainable = loss.init(jax.random.key(2), params, data[0])
  iterator = iter(as_grain(data))
  config = FitConfig(steps, eval_every_steps, 2, 1, accumulation_steps, checkpoint_every_seconds)
  return fit(
    loss,
    params,
    trainable,
    optax.adamw(learning_rate),
    KillsItself(iterator, kill_at) if kill_at else iterator,
    config=config,
    eval_loss=eval_loss,
    eval_batches=lambda: iter(valid),
    workdir=workdir,
    key=jax.random.key(seed),
    mesh=make_mesh(),
    progress=progress,
  )


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("--method", default="lora")
  parser.add_argument("--kill_at", type=int, default=0)
  options = parser.parse_args()
  train(options.workdir, options.method, kill_at=options.kill_at, progress=True)
