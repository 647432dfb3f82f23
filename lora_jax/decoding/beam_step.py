"""One step of beam search: from the beams' logits to the next beams and finished hypotheses.

The shapes' letters: B inputs, W beams each, K candidates, V tokens of the vocabulary, M new
tokens at most, L positions of the history (the padded prompt's and M), S slots of the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from lora_jax.decoding.beam_config import BeamConfig

NO_TOKEN = -1  # padding before a prompt in the history: in no n-gram


class Finished(NamedTuple):
  """The best finished hypotheses, best first; a score of -inf marks an empty one."""

  tokens: Int[Array, "B W M"]
  lengths: Int[Array, "B W"]
  scores: Float[Array, "B W"]
  ended: Bool[Array, "B W"]


class Search(NamedTuple):
  """The state between two steps; `step` tokens are generated.

  Attributes:
    used: the number of slots of the cache in use, from the first on.
    history: the prompt after NO_TOKENs, and the generated tokens.
    sums: of the running beams' log-probabilities, best first.
    visible: the slots from which a beam descends.
    open: whether an input may still improve.
  """

  step: Int[Array, ""]
  cache: PyTree
  used: Int[Array, ""]
  history: Int[Array, "B W L"]
  sums: Float[Array, "B W"]
  visible: Bool[Array, "B W S"]
  open: Bool[Array, " B"]
  finished: Finished


def choose(config: BeamConfig, search: Search, logits: Float[Array, "B W V"], width: int) -> Search:
  """Takes one step: from the beams' logits to the next beams and finished hypotheses."""
  limit = config.max_new_tokens
  sums, parents, tokens = best_candidates(config, search, logits, width)
  ended = jnp.isin(tokens, jnp.array(config.eos_ids, jnp.int32))
  length = search.step + 1
  history = take_beams(search.history, parents)
  history = jax.lax.dynamic_update_slice_in_dim(
    history, tokens[..., None], width + search.step, axis=2
  )
  stops = ended | (length == limit)
  finished = add_finished(config, search, sums, history[..., width:], length, ended, stops)
  running, order = jax.lax.top_k(jnp.where(stops, -jnp.inf, sums), config.num_beams)
  still_open = search.open & may_improve(config, running[:, 0], finished, length)
  return Search(
    length,
    search.cache,
    search.used,
    take_beams(history, order),
    running,
    take_beams(search.visible, take_beams(parents, order)),
    still_open,
    finished,
  )


def best_candidates(
  config: BeamConfig, search: Search, logits: Float[Array, "B W V"], width: int
) -> tuple[Float[Array, "B K"], Int[Array, "B K"], Int[Array, "B K"]]:
  """Returns the sums, beams and tokens of the best continuations of each input, best first."""
  count, vocab_size = config.num_candidates, logits.shape[-1]
  if count > vocab_size:
    raise ValueError(
      f"{config.num_beams} beams need a vocabulary of at least {count} tokens, got {vocab_size}; "
      "lower num_beams"
    )
  start = width if config.scoring == "reference" else 0
  allowed = forbid_repeats(config.no_repeat_ngram_size, search, logits, start, width)
  normalizer = jax.nn.logsumexp(
    allowed if config.scoring == "reference" else logits, axis=-1, keepdims=True
  )
  best, tokens = jax.lax.top_k(allowed, count)  # of each beam: the best of all are among them
  sums = (search.sums[..., None] + (best - normalizer)).reshape(best.shape[0], -1)
  sums, order = jax.lax.top_k(sums, count)
  return sums, order // count, take_beams(tokens.reshape(sums.shape[0], -1), order)


def forbid_repeats(
  size: int, search: Search, logits: Float[Array, "B W V"], start: int, width: int
) -> Float[Array, "B W V"]:
  """Returns the logits with -inf where a token would repeat an n-gram of the history.

  Args:
    size: n; 0 leaves the logits unchanged.
    search: its history is searched from `start` on.
    logits: of the next tokens.
    start: the first position of the history that counts.
    width: T, positions of the prompt; the next token's position is T + step.
  """
  if size == 0:
    return logits
  history, end = search.history, width + search.step
  num_windows = history.shape[-1] - start - size + 1
  if num_windows < 1:
    return logits
  fits = start + jnp.arange(num_windows) + size - 1 < end
  repeats = jnp.broadcast_to(fits, (*history.shape[:2], num_windows))
  for i in range(size - 1):
    last = jax.lax.dynamic_index_in_dim(history, end - size + 1 + i, axis=2)
    repeats &= history[..., start + i : start + i + num_windows] == last
  banned = jnp.where(repeats, history[..., start + size - 1 :], logits.shape[-1])
  rows = jnp.arange(history.shape[0])[:, None, None], jnp.arange(history.shape[1])[None, :, None]
  return logits.at[(*rows, banned)].set(-jnp.inf, mode="drop")


def add_finished(
  config: BeamConfig,
  search: Search,
  sums: Float[Array, "B K"],
  generated: Int[Array, "B K M"],
  length: Int[Array, ""],
  ended: Bool[Array, "B K"],
  stops: Bool[Array, "B K"],
) -> Finished:
  """Returns the best W of the finished hypotheses and those of this step's best W that stop."""
  counts = stops & search.open[:, None] & (jnp.arange(sums.shape[1]) < config.num_beams)[None]
  penalty = length.astype(jnp.float32) ** config.length_penalty
  places = jnp.arange(generated.shape[-1])[None, None]
  stopped = Finished(
    jnp.where(places < length, generated, config.pad_id),
    jnp.broadcast_to(length, sums.shape),
    jnp.where(counts, sums / penalty, -jnp.inf),
    ended,
  )
  candidates = Finished(
    *(jnp.concatenate(pair, axis=1) for pair in zip(search.finished, stopped, strict=True))
  )
  _, order = jax.lax.top_k(candidates.scores, config.num_beams)
  return Finished(*(take_beams(part, order) for part in candidates))


def may_improve(
  config: BeamConfig, best_sum: Float[Array, " B"], finished: Finished, length: Int[Array, ""]
) -> Bool[Array, " B"]:
  """Returns for which inputs a running beam may still be among the returned hypotheses."""
  if config.scoring == "reference":
    final = config.max_new_tokens if config.length_penalty > 0 else length + 1
    to_beat = finished.scores[:, config.num_return - 1]
  else:
    final, to_beat = length, finished.scores[:, -1]
  return best_sum / jnp.asarray(final, jnp.float32) ** config.length_penalty > to_beat


def take_beams(
  array: Shaped[Array, "B W *rest"], beams: Int[Array, "B K"]
) -> Shaped[Array, "B K *rest"]:
  """Returns some beams of each input of `array` (B, W, ...)."""
  beams = beams.reshape(*beams.shape, *(1,) * (array.ndim - 2))
  return jnp.take_along_axis(array, beams, axis=1)
