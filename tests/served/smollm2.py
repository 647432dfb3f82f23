"""SmolLM2's own file, and adapters that are trained on its blocks for a minute, on E2E examples."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import lora_jax as lj
from lora_jax.data.sets import e2e
from lora_jax.models.checkpoints.pretrained import find_pretrained
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.models.zoo import LanguageModel, load_causal_lm

END = 2  # <|im_end|>, the tokenizer's eos
ROWS, LENGTH = 4, 80  # of a batch; tokens, which 9 in 10 examples do not exceed
TARGET = r"layers/.*/kernel"


class Trained(NamedTuple):
  """An adapter, and the loss of the first and the last steps, nats a token."""

  config: lj.LoraConfig
  trainable: PyTree
  losses: list[float]


def model_file() -> Path | None:
  """Returns SmolLM2's file, or None if it is not cached."""
  try:
    return find_pretrained("smollm2")
  except FileNotFoundError:
    return None


@functools.cache
def load(param_dtype: str) -> LanguageModel:
  return load_causal_lm("smollm2", param_dtype=param_dtype, scan_layers=True)


@functools.cache
def tokenizer() -> Any:
  return load_tokenizer(find_pretrained("smollm2"))


def encode(text: str) -> list[int]:
  return tokenizer().encode(text, add_special_tokens=False).ids


def prompts(count: int) -> list[list[int]]:
  """Returns the tokens of distinct inputs of the test set, each of which a newline ends."""
  contexts = dict.fromkeys(record.context for record in e2e.read("test"))
  return [encode(context + "\n") for context in list(contexts)[:count]]


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns batches of training examples: tokens, and 1.0 where a completion's token is."""
  records = e2e.read("train")
  chosen = np.random.default_rng(0).permutation(len(records))[: count * ROWS]
  made = []
  for rows in chosen.reshape(count, ROWS):
    tokens, weights = np.full((ROWS, LENGTH), END), np.zeros((ROWS, LENGTH), np.float32)
    for i, row in enumerate(rows):
      prompt = encode(records[row].context + "\n")
      ids = [*prompt, *encode(records[row].completion), END][:LENGTH]
      tokens[i, : len(ids)] = ids
      weights[i, len(prompt) : len(ids)] = 1
    made.append((tokens, weights))
  return made


def train(
  method: Any, base: LanguageModel, config: lj.LoraConfig, num_steps: int, learning_rate: float
) -> Trained:
  """Trains an adapter on one batch a step, with Adam and a linear decay.

  Args:
    method: a function of `(fn, config)`, such as `lora_jax.lora`.
    base: the model.
    config: of the adapter.
    num_steps: batches.
    learning_rate: of the first step.
  """
  adapted = method(base.call, config)
  trainable = adapted.init(jax.random.key(0), base.params, jnp.zeros((1, 8), jnp.int32))
  optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, num_steps))

  def loss(trainable: PyTree, params: PyTree, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    logits = adapted.apply(params, trainable, tokens[:, :-1])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return (each * weights[:, 1:]).sum() / weights.sum()

  @jax.jit
  def step(trainable: PyTree, state: Any, params: PyTree, *batch: jax.Array) -> Any:
    value, gradient = jax.value_and_grad(loss)(trainable, params, *batch)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(trainable, updates), state, value

  state, losses = optimizer.init(trainable), []
  for batch in batches(num_steps):
    trainable, state, value = step(trainable, state, base.params, *map(jnp.asarray, batch))
    losses.append(float(value))
  return Trained(config, trainable, losses)
