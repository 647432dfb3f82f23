"""Finds the rank at which an arm has as many trained parameters as the control."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxtyping import PyTree

from experiments.harness.fit import count_trained
from experiments.harness.methods import adapt, find_method
from experiments.nlg.base import model_folder
from experiments.nlg.config import E2EConfig
from experiments.nlg.restore import trainable_shapes
from lora_jax.models.parts.causal_lm import CausalLM
from lora_jax.models.zoo import plan_causal_lm
from lora_jax.training.loss import language_model_loss


class Size(NamedTuple):
  """The size of an arm on a base model.

  Attributes:
    rank: of its adapters; None if the method has none.
    parameters: that are trained at once.
    is_matched: whether they are within the tolerance of the control's.
    reason: why not; "" if they are.
  """

  rank: int | None
  parameters: int
  is_matched: bool
  reason: str = ""


@functools.cache
def _planned(folder: Path) -> tuple[CausalLM, PyTree]:
  model = plan_causal_lm(folder)
  return model.module, model.params


def count_parameters(config: E2EConfig) -> int:
  """Returns the parameters of a run that are trained at once, from its base model's shapes."""
  module, shapes = _planned(model_folder(config))
  adaptation = adapt(config)(language_model_loss(module))
  parameters = count_trained(trainable_shapes(adaptation, shapes))
  return trained_at_once(config.method, parameters)


def trained_at_once(method: str, parameters: int) -> int:
  """Returns how many of an adapter's parameters are trained at once: those of one of its cycles."""
  return parameters // find_method(method).num_cycles


def match_rank(count: Callable[[int], int], wanted: int, tolerance: float, first: int = 1) -> Size:
  """Returns a rank with `wanted` parameters within the tolerance; if there is none, the closest.

  >>> match_rank(lambda rank: 100 * rank, wanted=390, tolerance=0.05)
  Size(rank=4, parameters=400, is_matched=True, reason='')

  Args:
    count: from a rank to the number of parameters, which grows or shrinks with it, or stays as it
      is from some rank on; ValueError if the rank is too large for a weight.
    wanted: the control's number of parameters.
    tolerance: the largest difference, as a share of `wanted`.
    first: the rank to try first.
  """
  counts: dict[int, int | None] = {}

  def number(rank: int) -> int | None:
    if rank not in counts:
      try:
        counts[rank] = count(rank)
      except ValueError:
        if rank == 1:
          raise
        counts[rank] = None
    return counts[rank]

  value = number(first)
  if value is not None and abs(value / wanted - 1) <= tolerance:
    return Size(first, value, True)
  low, high = 1, 2
  shrinks = (number(high) or math.inf) < (number(low) or 0)

  def is_low(rank: int) -> bool:
    value = number(rank)
    return value is not None and (value >= wanted if shrinks else value <= wanted)

  while is_low(high):
    if number(high) == number(low):
      high = low  # it grows no more
      break
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if is_low(middle) else (low, middle)
  known = {rank: value for rank in (low, high) if (value := number(rank)) is not None}
  rank = min(known, key=lambda rank: abs(known[rank] - wanted))
  if abs(known[rank] / wanted - 1) <= tolerance:
    return Size(rank, known[rank], True)
  shares = ", ".join(f"rank {r} has {100 * (n / wanted - 1):+.1f} %" for r, n in known.items())
  return Size(rank, known[rank], False, f"no rank fits: {shares}")
