"""Bad inputs of sums, truncation, conversion and alignment."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lj

from tests.bad_inputs import BadInput

PARAMS = {"w": jnp.eye(4)}


@functools.cache
def adapter() -> Any:
  config = lj.LoraConfig(2, 4.0, "w")
  return config, lj.lora(lambda p, x: x @ p["w"], config).init(
    jax.random.key(0), PARAMS, jnp.ones((1, 4))
  )


def row(name: str, call: Callable[[], Any], *words: str) -> BadInput:
  return BadInput(name, lambda _: call(), words)


def summed(weights: Any) -> Any:
  return lj.weighted_sum([adapter(), adapter()], weights, PARAMS)


def truncated(rank: Any) -> Any:
  return lj.truncate_rank(*adapter(), PARAMS, rank)


def by_row(slots: Any) -> Any:
  two = banked()
  apply = lj.by_row(lj.lora(lambda p, x: x @ p["w"], two.config).apply)
  return apply(PARAMS, two.trainable, slots, jnp.ones((2, 4)))


def mixture_by_row() -> Any:
  """Calls a function whose base model multiplies by ragged_dot, as a mixture of experts."""
  two, experts = banked(), jnp.ones((1, 4, 4))

  def fn(params: Any, x: Any) -> Any:
    return jax.lax.ragged_dot(x @ params["w"], experts, jnp.array([1]))

  return lj.by_row(lj.lora(fn, two.config).apply)(
    PARAMS, two.trainable, [0, 1], jnp.ones((2, 1, 4))
  )


def banked(**options: Any) -> Any:
  return lj.bank([adapter(), adapter()], PARAMS, **options)


def dora() -> Any:
  config = lj.LoraConfig(2, 4.0, "w", variant=lj.DORA)
  return config, lj.lora(lambda p, x: x @ p["w"], config).init(
    jax.random.key(0), PARAMS, jnp.ones((1, 4))
  )


def converted(**options: Any) -> Any:
  return lj.convert(*adapter(), PARAMS, **options)


ROWS = [
  row("sum: too few weights", lambda: summed([1.0]), "each of 2 adapters", "got [1.0]"),
  row("sum: weights as text", lambda: summed("12"), "one weight for each", "got '12'"),
  row("sum: weights by name", lambda: summed({"a": 1, "b": 2}), "one weight for each"),
  row("sum: a weight of text", lambda: summed([1.0, "2"]), "weights[1]", "a number", "got '2'"),
  row("sum: a weight NaN", lambda: summed([math.nan, 1]), "weights[0]", "finite", "got nan"),
  row("sum: a boolean weight", lambda: summed([True, 1]), "weights[0]", "got True"),
  row("sum: an array of weights", lambda: summed([jnp.ones(2), 1]), "weights[0]", "(2,)"),
  row("sum: no adapters", lambda: lj.weighted_sum([], [], PARAMS), "a list of", "got []"),
  row(
    "sum: trainable trees",
    lambda: lj.weighted_sum([adapter()[1]], [1], PARAMS),  # pyright: ignore
    "adapters[0] must be a pair (LoraConfig, trainable)",
  ),
  row("align: no adapters", lambda: lj.align([], PARAMS), "a list of", "got []"),
  row("align: one adapter", lambda: lj.align(adapter(), PARAMS), "adapters[0] must be a pair"),
  row("align: other params", lambda: lj.align([adapter()], {"v": jnp.eye(4)}), "target 'w'"),
  row("bank: no adapters", lambda: lj.bank([], PARAMS), "a list of", "got []"),
  row("bank: too few slots", lambda: banked(slots=1), "slots=1", "number of adapters, 2"),
  row("bank: slots 2.5", lambda: banked(slots=2.5), "slots", "an integer", "got 2.5"),
  row("bank: rank 0", lambda: banked(rank=0), "rank", "[1, inf)", "got 0"),
  row("bank: slot outside", lambda: banked().adapter(2), "slot 2", "slots 0 to 1"),
  row("bank: slot -1", lambda: banked().adapter(-1), "slot", "[0, inf)", "got -1"),
  row(
    "bank: another variant",
    lambda: banked().replace(0, dora(), PARAMS),
    "w is adapted by DoRA",
    "lora_jax.convert",
  ),
  row(
    "bank: another weight",
    lambda: banked().replace(
      0, (lj.LoraConfig(2, 4.0, "v"), {"v": adapter()[1]["w"]}), {"w": jnp.eye(4), "v": jnp.eye(4)}
    ),
    "adapts v, which the bank does not",
    "Create the bank with this adapter",
  ),
  row("rows: slot outside", lambda: by_row([0, 2]), "slots[1] is 2", "slots 0 to 1"),
  row("rows: slot -1", lambda: by_row([0, -1]), "slots[1]", "[0, inf)", "got -1"),
  row("rows: slot 0.5", lambda: by_row([0, 0.5]), "slots[1]", "an integer", "got 0.5"),
  row("rows: floats", lambda: by_row(jnp.zeros(2)), "slots must be integers", "float32"),
  row("rows: one slot", lambda: by_row(1), "slots must be a sequence", "got 1"),
  row("rows: too few slots", lambda: by_row([1]), "axis of 1 rows", "(2, 4)"),
  row(
    "rows: a mixture of experts", mixture_by_row, "cannot map this model", "one adapter at a time"
  ),
  row("truncate: rank 0", lambda: truncated(0), "rank", "[1, inf)", "got 0"),
  row("truncate: rank 2.0", lambda: truncated(2.0), "rank", "an integer", "got 2.0"),
  row("truncate: rank True", lambda: truncated(True), "rank", "an integer", "got True"),
  row("convert: nothing asked for", lambda: converted(), "rank=None, energy=None"),
  row("convert: both", lambda: converted(rank=1, energy=0.5), "rank=1, energy=0.5"),
  row("convert: rank 0", lambda: converted(rank=0), "rank", "[1, inf)", "got 0"),
  row("convert: energy 1.5", lambda: converted(energy=1.5), "energy", "(0, 1]", "got 1.5"),
  row("convert: energy 0", lambda: converted(energy=0.0), "energy", "(0, 1]", "got 0.0"),
  row("convert: energy NaN", lambda: converted(energy=math.nan), "energy", "got nan"),
  row("convert: energy as text", lambda: converted(energy="1"), "energy", "got '1'"),
  row(
    "convert: a mapping for a config",
    lambda: lj.convert({}, adapter()[1], PARAMS, rank=1),  # pyright: ignore
    "a lora_jax.LoraConfig",
    "got {}",
  ),
]
