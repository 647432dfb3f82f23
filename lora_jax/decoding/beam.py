"""Beam search over a cache that is never reordered.

    hypotheses = beam_search(model, params, prompts, BeamConfig(eos_ids=(0,), num_beams=10))
    texts = [tokenizer.decode(ids) for ids in hypotheses.best()]

A prompt's keys and values are stored once and shared by all W beams of its input. Each step adds
W slots, one per beam, and a mask says which slots a beam descends from:

    slots   prompt (T) | step 1 (W) | step 2 (W) | ...
    beam 0   1 1 1 1     1 0 0        0 1 0             its own path through the steps

Reordering beams gathers rows of that mask and of the token ids; keys and values do not move. When
the cache is full, the slots from which no beam descends are dropped: beams soon share their first
tokens, so few slots are alive however long the search. The search of a batch is one compiled
program, which stops when no input can improve.

The scoring rules, those of `transformers` or of the paper's code, are in `beam_config.py`.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from lora_jax.decoding.beam_config import BeamConfig
from lora_jax.decoding.beam_step import NO_TOKEN, Finished, Search, choose
from lora_jax.decoding.cached_model import (
  Batch,
  CachedModel,
  bank_slots_of,
  grow_cache,
  longest_prompt,
  make_batches,
  read_prompts,
  read_slots,
  take_slots,
  with_rows,
)
from lora_jax.placement import host_copy

MAX_THREADS = 4  # so that large models' caches do not fill the memory
SLOT_MULTIPLE = 32  # of a cache's slots: matmuls are slower with odd sizes


class Hypotheses(NamedTuple):
  """The hypotheses of N inputs, R each, the best first.

  Attributes:
    tokens: generated ids, the end token included, then `pad_id`.
    lengths: the number of generated ids.
    scores: sum of log-probabilities / length ** length_penalty, nats.
    ended: whether an end token ended it, and not the limit.
    steps: the number of steps of the input's batch.
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
  bank_slots: Sequence[int] | None = None,
) -> Hypotheses:
  """Returns the best continuations of each prompt, in the prompts' order.

  Args:
    model: the functions of the model.
    params: for these functions.
    prompts: token ids of each input; no padding, any lengths.
    config: how to search.
    batch_size: inputs that are searched at once (times W rows of the model).
    length_multiple: prompts are padded to a multiple of it; each length compiles a program.
    mesh: shards the inputs over its axes `data` and `fsdp`; `params` are placed by the caller.
    bank_slots: the slot of a bank for each prompt, for a model of `adapted_by_row`.
  Raises:
    ValueError: if a prompt is empty, not token ids, or with the new tokens longer than the model's
      positions, or the slots are not those of a bank.
  """
  longest = longest_prompt(model, config.max_new_tokens)
  slots_by_prompt = read_slots(params, bank_slots, len(prompts))
  shape = len(prompts), config.num_return
  hypotheses = Hypotheses(
    np.full((*shape, config.max_new_tokens), config.pad_id, np.int32),
    np.zeros(shape, np.int32),
    np.zeros(shape, np.float32),
    np.zeros(shape, bool),
    np.zeros(shape[0], np.int32),
  )
  batches = list(make_batches(prompts, batch_size, length_multiple, longest, mesh))

  def search(batch: Batch) -> tuple[Finished, Int[Array, ""]]:
    slots = bank_slots_of(slots_by_prompt, batch)
    return search_batch(model, config, params, batch.tokens, batch.lengths, slots)

  threads = num_threads(params)
  run = search if threads == 1 else lambda batch: jax.block_until_ready(search(batch))
  with ThreadPoolExecutor(threads) as pool:
    # Several processes must start their programs in one order, those that copy results included.
    results = pool.map(run, batches) if jax.process_count() == 1 else map(search, batches)
    for batch, (finished, steps) in zip(batches, results, strict=True):
      for whole, part in zip(hypotheses, finished, strict=False):
        whole[batch.rows] = host_copy(part)[: len(batch.rows), : config.num_return]
      hypotheses.steps[batch.rows] = int(steps)
  return hypotheses


def num_threads(params: PyTree) -> int:
  """Returns how many batches are searched at once, each with its own cache: several on CPUs.

  XLA runs the small matmuls of a step on one core, and the programs of one thread in turn.
  Programs of several devices wait for each other, and must all start in one order.
  """
  arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
  if jax.default_backend() != "cpu" or any(len(x.sharding.device_set) > 1 for x in arrays):
    return 1
  return min(os.cpu_count() or 1, MAX_THREADS)


@partial(jax.jit, static_argnames=("model", "config"))
def search_batch(
  model: CachedModel,
  config: BeamConfig,
  params: PyTree,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, " B"],
  bank_slots: Int[Array, " B"] | None = None,
) -> tuple[Finished, Int[Array, ""]]:
  """Searches one batch of prompts, padded in front; returns hypotheses and the number of steps."""
  batch_size, width = tokens.shape
  params = with_rows(params, bank_slots)
  beams, limit = config.num_beams, config.max_new_tokens
  logits, cache, real = read_prompts(model, params, tokens, lengths)
  history = jnp.pad(
    jnp.where(real, tokens, NO_TOKEN), ((0, 0), (0, limit)), constant_values=NO_TOKEN
  )
  places = (batch_size, beams)
  search = Search(
    jnp.zeros((), jnp.int32),
    cache,
    jnp.full((), width, jnp.int32),
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
  for num_slots, margin in sizes(width, beams, limit):
    search = grow(model, search, num_slots)
    search = search_within(model, config, params, search, width, lengths, margin)
  return search.finished, search.step


def sizes(width: int, beams: int, limit: int) -> list[tuple[int, int]]:
  """Returns the sizes of the cache in turn, in slots, each with the free slots that it needs.

  Attention is over all slots, in use or not; but each size compiles the loop once more. The last
  size holds all slots that could ever be alive.
  """
  *smaller, most = (
    -(-(width + beams * steps) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    for steps in (10, 18, limit - 1)  # measured on E2E: 75 to 120 slots are alive with 10 beams
  )
  return [*((slots, 4 * beams) for slots in sorted({*smaller}) if slots < most), (most, beams)]


def grow(model: CachedModel, search: Search, num_slots: int) -> Search:
  """Returns the search with a cache of `num_slots` slots."""
  batch_size, _, slots = search.visible.shape
  return search._replace(
    cache=grow_cache(model, search.cache, batch_size, num_slots),
    visible=jnp.pad(search.visible, ((0, 0), (0, 0), (0, num_slots - slots))),
  )


def search_within(
  model: CachedModel,
  config: BeamConfig,
  params: PyTree,
  search: Search,
  width: int,
  lengths: Int[Array, " B"],
  margin: int,
) -> Search:
  """Continues a search while `margin` slots are free; other arguments as in `search_batch`."""
  beams, limit, slots = config.num_beams, config.max_new_tokens, search.visible.shape[-1]

  def is_running(search: Search) -> Bool[Array, ""]:
    return (search.step < limit) & search.open.any()

  def round_of_steps(search: Search) -> Search:
    return jax.lax.while_loop(
      lambda search: is_running(search) & (search.used + beams <= slots),
      lambda search: choose(config, *extend_beams(model, params, search, width, lengths), width),
      drop_slots(model, search),
    )

  return jax.lax.while_loop(
    lambda search: is_running(search) & (alive(search).sum(-1).max() + margin <= slots),
    round_of_steps,
    search,
  )


def alive(search: Search) -> Bool[Array, "B S"]:
  """Returns the mask of slots from which a beam of an open input descends."""
  return (search.visible & search.open[:, None, None]).any(axis=1)


def drop_slots(model: CachedModel, search: Search) -> Search:
  """Returns the search with the live slots first, so that the others are free."""
  live = alive(search)
  order = jnp.argsort(~live, axis=-1, stable=True)
  return search._replace(
    cache=take_slots(model, search.cache, order),
    visible=jnp.take_along_axis(search.visible & live[:, None], order[:, None], axis=-1),
    used=live.sum(-1).max().astype(jnp.int32),
  )


def extend_beams(
  model: CachedModel, params: PyTree, search: Search, width: int, lengths: Int[Array, " B"]
) -> tuple[Search, Float[Array, "B W V"]]:
  """Reads each beam's last token; returns the search and the logits of the next tokens."""
  batch_size, beams, _ = search.visible.shape
  new_slots = jnp.broadcast_to(jnp.eye(beams, dtype=bool), (batch_size, beams, beams))
  visible = jax.lax.dynamic_update_slice_in_dim(search.visible, new_slots, search.used, axis=2)
  last = jax.lax.dynamic_index_in_dim(
    search.history, width + search.step - 1, axis=2, keepdims=False
  )
  positions = jnp.broadcast_to((lengths + search.step - 1)[:, None], last.shape)
  hidden, cache = model.extend(params, last, positions, search.cache, search.used, visible)
  logits = model.logits(params, hidden).astype(jnp.float32)
  return search._replace(cache=cache, visible=visible, used=search.used + beams), logits
