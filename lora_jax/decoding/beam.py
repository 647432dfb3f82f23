"""Beam search over a cache that is never reordered.

    found = beam_search(model, params, prompts, BeamConfig(eos_ids=(0,), num_beams=10))
    texts = [tokenizer.decode(ids) for ids in found.best()]

A prompt's keys and values are stored once and seen by all W beams of its input. Each step adds
W slots, one a beam, and a mask says which slots a beam descends from:

    slots   prompt (T) | step 1 (W) | step 2 (W) | ...
    beam 0   1 1 1 1     1 0 0        0 1 0             its own path through the steps

Reordering beams gathers rows of that mask and of the token ids; keys and values stay where they
are. The whole search of a batch is one compiled program, which stops when no input can improve.

Whose rules the scores follow, `transformers`' or the paper's code's, is in `scoring.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lora_jax.decoding.beam_step import NO_TOKEN, Finished, Search, choose
from lora_jax.decoding.cached_model import CachedModel, grow_cache, make_batches, read_prompts
from lora_jax.decoding.scoring import BeamConfig

PyTree = Any
SLOT_MULTIPLE = 64  # of which a cache has slots: matrix products are slower with odd sizes


class Hypotheses(NamedTuple):
  """What was found for N inputs, R hypotheses each, the best first.

  Attributes:
    tokens: generated ids, the end token included, then `pad_id`.
    lengths: how many were generated.
    scores: sum of log-probabilities / length ** length_penalty, nats.
    ended: whether an end token ended it, and not the limit.
    steps: of the batch that the input was in.
  """

  tokens: Int[np.ndarray, "N R M"]
  lengths: Int[np.ndarray, "N R"]
  scores: Float[np.ndarray, "N R"]
  ended: Bool[np.ndarray, "N R"]
  steps: Int[np.ndarray, " N"]

  def best(self) -> list[list[int]]:
    """Returns the best hypothesis of each input, without its end token."""
    stops = self.lengths[:, 0] - self.ended[:, 0]
    return [row[:stop].tolist() for row, stop in zip(self.tokens[:, 0], stops, strict=True)]


def beam_search(
  model: CachedModel,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  config: BeamConfig,
  *,
  batch_size: int = 32,
  length_multiple: int = 32,
  mesh: Mesh | None = None,
) -> Hypotheses:
  """Returns the best continuations of each prompt, in the prompts' order.

  Args:
    model: the functions of the model.
    params: for these functions.
    prompts: token ids of each input; no padding, any lengths.
    config: how to search.
    batch_size: inputs that are searched at once (times W rows of the model).
    length_multiple: prompts are padded to a multiple of it; each length compiles a program.
    mesh: spreads the inputs over its axes `data` and `fsdp`; `params` are placed by the caller.
  Raises:
    ValueError: if a prompt is empty, or with the new tokens longer than the model's positions.
  """
  longest = model.max_positions - config.max_new_tokens + 1  # the last token is not read again
  shape = len(prompts), config.num_return
  found = Hypotheses(
    np.full((*shape, config.max_new_tokens), config.pad_id, np.int32),
    np.zeros(shape, np.int32),
    np.zeros(shape, np.float32),
    np.zeros(shape, bool),
    np.zeros(shape[0], np.int32),
  )
  batches = make_batches(prompts, batch_size, length_multiple, longest, mesh)
  running = [
    (batch.rows, search_batch(model, config, params, batch.tokens, batch.lengths))
    for batch in batches
  ]  # which need not wait for each other
  for rows, (finished, steps) in running:
    for whole, part in zip(found, finished, strict=False):
      whole[rows] = np.asarray(part)[: len(rows), : config.num_return]
    found.steps[rows] = int(steps)
  return found


@partial(jax.jit, static_argnames=("model", "config"))
def search_batch(
  model: CachedModel,
  config: BeamConfig,
  params: PyTree,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, " B"],
) -> tuple[Finished, Int[Array, ""]]:
  """Searches one batch of prompts, padded in front; returns the steps it took besides."""
  batch_size, width = tokens.shape
  beams, limit = config.num_beams, config.max_new_tokens
  logits, cache, real = read_prompts(model, params, tokens, lengths)
  history = jnp.pad(
    jnp.where(real, tokens, NO_TOKEN), ((0, 0), (0, limit)), constant_values=NO_TOKEN
  )
  places = (batch_size, beams)
  search = Search(
    jnp.zeros((), jnp.int32),
    cache,
    history[:, None],
    jnp.zeros((batch_size, 1), jnp.float32),
    real[:, None],
    lengths > 0,
    Finished(
      jnp.full((*places, limit), config.pad_id, jnp.int32),
      jnp.zeros(places, jnp.int32),
      jnp.full(places, -jnp.inf),
      jnp.zeros(places, bool),
    ),
  )
  search = choose(config, search, logits[:, None], width)
  for stop in stages(limit):
    search = grow(model, search, width + beams * (stop - 1))
    search = jax.lax.while_loop(
      lambda search, stop=stop: (search.step < stop) & search.open.any(),
      lambda search: choose(config, *extend_beams(model, params, search, width, lengths), width),
      search,
    )
  return search.finished, search.step


def stages(limit: int) -> list[int]:
  """Returns the steps until which each size of the cache lasts.

  Slots not yet in use cost attention as much as others; but each size compiles a loop more.
  """
  return [limit] if limit < 32 else [limit * 3 // 8, limit * 5 // 8, limit]


def grow(model: CachedModel, search: Search, num_slots: int) -> Search:
  """Returns the search with room for `num_slots` slots, rounded up."""
  num_slots = -(-num_slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
  batch_size, _, used = search.seen.shape
  if num_slots <= used:
    return search
  return search._replace(
    cache=grow_cache(model, search.cache, batch_size, num_slots),
    seen=jnp.pad(search.seen, ((0, 0), (0, 0), (0, num_slots - used))),
  )


def extend_beams(
  model: CachedModel, params: PyTree, search: Search, width: int, lengths: Int[Array, " B"]
) -> tuple[Search, Float[Array, "B W V"]]:
  """Reads each beam's last token; returns the logits of the next ones besides."""
  batch_size, beams, _ = search.seen.shape
  index = width + (search.step - 1) * beams
  own = jnp.broadcast_to(jnp.eye(beams, dtype=bool), (batch_size, beams, beams))
  seen = jax.lax.dynamic_update_slice_in_dim(search.seen, own, index, axis=2)
  last = jax.lax.dynamic_index_in_dim(
    search.history, width + search.step - 1, axis=2, keepdims=False
  )
  positions = jnp.broadcast_to((lengths + search.step - 1)[:, None], last.shape)
  hidden, cache = model.extend(params, last, positions, search.cache, index, seen)
  logits = model.logits(params, hidden).astype(jnp.float32)
  return search._replace(cache=cache, seen=seen), logits
