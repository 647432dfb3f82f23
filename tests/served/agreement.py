"""Compares what llama.cpp computes with what a function computes here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.served.llama_cpp import Adapter, LlamaCpp

NUM_GREEDY = 64


class Agreement(NamedTuple):
  """How far the probabilities of next tokens differ, and how many greedy tokens agree.

  Attributes:
    difference: of any probability after any token of the prompt, the largest.
    tokens: the greedy ones of llama.cpp.
    num_equal: how many of them are greedy here too, before the first that is not.
    probabilities: ours, (T, V), after each token of the prompt.
  """

  difference: float
  tokens: list[int]
  num_equal: int
  probabilities: np.ndarray

  def __str__(self) -> str:
    equal = f"{self.num_equal} of {len(self.tokens)} greedy tokens equal"
    return f"probabilities differ by at most {self.difference:.1e}, {equal}"


def compare(
  llama_cpp: LlamaCpp,
  model: Path,
  fn: Callable[..., Any],
  arguments: tuple[Any, ...],
  prompt: list[int],
  *adapters: Adapter,
  **options: Any,
) -> Agreement:
  """Compares a file in llama.cpp with `fn(*arguments, tokens)`, of tokens (1, T) to logits."""
  theirs = softmax(llama_cpp.logits(model, prompt, *adapters, **options))
  steps = llama_cpp.greedy(model, prompt, NUM_GREEDY, *adapters, **options)
  tokens = [step.token for step in steps]
  run = jax.jit(lambda arguments, x: fn(*arguments, x))
  ours = softmax(np.asarray(run(arguments, jnp.asarray([prompt + tokens]))[0]))
  difference = float(np.abs(ours[: len(prompt)] - theirs).max())
  same = ours[len(prompt) - 1 : -1].argmax(-1) == np.asarray(tokens)
  num_equal = len(tokens) if same.all() else int(same.argmin())
  return Agreement(difference, tokens, num_equal, ours[: len(prompt)])


def softmax(logits: np.ndarray) -> np.ndarray:
  exponents = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
  return exponents / exponents.sum(-1, keepdims=True)
