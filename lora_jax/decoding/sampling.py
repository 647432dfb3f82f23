"""Greedy decoding and nucleus sampling (Holtzman et al. 2020)."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from lora_jax.decoding.beam_config import NewTokens, TokenId, as_token_ids
from lora_jax.decoding.cached_model import (
  CachedModel,
  bank_slots_of,
  grow_cache,
  longest_prompt,
  make_batches,
  read_prompts,
  read_slots,
  with_rows,
)
from lora_jax.fields import Within, check_fields
from lora_jax.placement import host_copy


def not_tiny(name: str, value: float) -> None:
  """Raises ValueError if a temperature is so small that logits divided by it may overflow."""
  if 0 < value < 1e-6:
    raise ValueError(f"{name} must be 0, which takes the likeliest token, or >= 1e-6, got {value}")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How to sample.

  Attributes:
    eos_ids: tokens that end an output.
    temperature: divides the logits; 0 takes the likeliest token (greedy decoding).
    top_p: samples only from the smallest set of likeliest tokens whose probabilities sum to this.
    max_new_tokens: the most generated tokens, the end token included.
    pad_id: fills the output after its end.

  Raises:
    ValueError: naming a field that has another type or is out of bounds.
  """

  eos_ids: tuple[TokenId, ...]
  temperature: Annotated[float, Within("[0, 1_000]"), not_tiny] = 1.0
  top_p: Annotated[float, Within("(0, 1]")] = 1.0
  max_new_tokens: NewTokens = 64
  pad_id: TokenId = 0

  def __post_init__(self):
    object.__setattr__(self, "eos_ids", as_token_ids(self.eos_ids))
    check_fields(self)


class _State(NamedTuple):
  """The state between two steps; `step` tokens are generated."""

  step: Int[Array, ""]
  cache: PyTree
  tokens: Int[Array, "B M"]
  open: Bool[Array, " B"]


def generate(
  model: CachedModel,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  config: SamplingConfig,
  key: PRNGKeyArray | None = None,
  *,
  batch_size: int = 32,
  length_multiple: int = 32,
  mesh: Mesh | None = None,
  bank_slots: Sequence[int] | None = None,
) -> list[list[int]]:
  """Returns one continuation of each prompt, without its end token, in the prompts' order.

  Args:
    model: the functions of the model.
    params: for these functions.
    prompts: token ids of each input; no padding, any lengths.
    config: how to sample.
    key: for temperatures above 0; prompt i samples with `fold_in(key, i)`, so that its tokens
      do not depend on its batch.
    batch_size: inputs that are decoded at once.
    length_multiple: prompts are padded to a multiple of it; each length compiles a program.
    mesh: shards the inputs over its axes `data` and `fsdp`; `params` are placed by the caller.
    bank_slots: the slot of a bank for each prompt, for a model of `adapted_by_row`.
  Raises:
    ValueError: if a temperature above 0 has no key, a prompt is empty, too long or not token ids,
      the new tokens exceed the model's positions, or the slots are not those of a bank.
  """
  if key is None:
    if config.temperature > 0:
      raise ValueError("a temperature above 0 samples and needs a key; or set temperature=0")
    key = jax.random.key(0)  # unused
  longest = longest_prompt(model, config.max_new_tokens)
  slots_by_prompt = read_slots(params, bank_slots, len(prompts))
  outputs: list[list[int]] = [[] for _ in prompts]
  for batch in make_batches(prompts, batch_size, length_multiple, longest, mesh):
    rows = np.pad(batch.rows, (0, len(batch.lengths) - len(batch.rows)))
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(rows))
    slots = bank_slots_of(slots_by_prompt, batch)
    out = _generate(model, config, params, batch.tokens, batch.lengths, keys, slots)
    tokens = host_copy(out)
    ends = np.isin(tokens, config.eos_ids)
    stops = np.where(ends.any(1), ends.argmax(1), config.max_new_tokens)
    for row, ids, stop in zip(batch.rows, tokens, stops, strict=False):
      outputs[row] = ids[:stop].tolist()
  return outputs


@partial(jax.jit, static_argnames=("model", "config"))
def _generate(
  model: CachedModel,
  config: SamplingConfig,
  params: PyTree,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, " B"],
  keys: PRNGKeyArray,
  bank_slots: Int[Array, " B"] | None,
) -> Int[Array, "B M"]:
  """Returns the tokens generated after a batch of prompts, padded in front."""
  batch_size, width = tokens.shape
  params = with_rows(params, bank_slots)
  logits, cache, real = read_prompts(model, params, tokens, lengths)
  num_slots = width + config.max_new_tokens - 1
  visible = jnp.pad(real, ((0, 0), (0, num_slots - width)), constant_values=True)
  slots = jnp.arange(num_slots)[None]

  def choose(state, logits):
    chosen = next_tokens(config, logits, keys, state.step)
    token = jnp.where(state.open, chosen, config.pad_id)
    ended = jnp.isin(token, jnp.array(config.eos_ids, jnp.int32))
    written = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
    return _State(state.step + 1, state.cache, written, state.open & ~ended)

  def step(state):
    last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
    positions = (lengths + state.step - 1)[:, None]
    index = width + state.step - 1
    mask = (visible & (slots <= index))[:, None]
    hidden, cache = model.extend(params, last, positions, state.cache, index, mask)
    logits = model.logits(params, hidden[:, 0]).astype(jnp.float32)
    return choose(state._replace(cache=cache), logits)

  empty = jnp.full((batch_size, config.max_new_tokens), config.pad_id, jnp.int32)
  cache = grow_cache(model, cache, batch_size, num_slots)
  state = choose(_State(jnp.zeros((), jnp.int32), cache, empty, lengths > 0), logits)
  return jax.lax.while_loop(
    lambda state: (state.step < config.max_new_tokens) & state.open.any(), step, state
  ).tokens


def next_tokens(
  config: SamplingConfig, logits: Float[Array, "B V"], keys: PRNGKeyArray, step: Int[Array, ""]
) -> Int[Array, " B"]:
  """Returns a token for each row, sampled with the row's key folded with the step."""
  if config.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / config.temperature
  if config.top_p < 1:
    logits = jnp.where(in_nucleus(logits, config.top_p), logits, -jnp.inf)
  folded = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
  return jax.vmap(jax.random.categorical)(folded, logits).astype(jnp.int32)


def in_nucleus(logits: Float[Array, "B V"], top_p: float) -> Bool[Array, "B V"]:
  """Returns the mask of the smallest set of likeliest tokens whose probabilities sum to `top_p`.

  A token belongs to it if the more likely ones sum to less than `top_p`; so the likeliest always
  does. Among equal logits, the lower token id comes first.
  """
  order = jnp.argsort(-logits, axis=-1, stable=True)
  probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  rank = jnp.argsort(order, axis=-1)
  return jnp.take_along_axis(before < top_p, rank, axis=-1)
