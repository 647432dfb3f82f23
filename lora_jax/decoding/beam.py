"""Beam search over a cache that is never reordered.

    found = beam_search(model, params, prompts, BeamConfig(eos_ids=(0,), num_beams=10))
    texts = [tokenizer.decode(ids) for ids in found.best()]

A prompt's keys and values are stored once and seen by all W beams of its input. Each step adds
W slots, one a beam, and a mask says which slots a beam descends from:

    slots   prompt (T) | step 1 (W) | step 2 (W) | ...
    beam 0   1 1 1 1     1 0 0        0 1 0             its own path through the steps

Reordering beams gathers rows of that mask and of the token ids; keys and values stay where they
are. The whole search of a batch is one compiled program, which stops when no input can improve.

Scoring, s the sum of a hypothesis's log-probabilities, n its tokens (the end token counts, the
prompt doesn't), score = s / n ** length_penalty:

`transformers`: as its `generate(num_beams=W, early_stopping=False)`. The best max(2, 1 + E) W
  candidates of a step are considered, E the number of end tokens. Those among the best W that
  end become finished, the best W that don't go on. No n-gram of prompt and generated tokens
  comes twice; the ban leaves the other tokens' probabilities as they are. An input is done when
  W hypotheses are finished and s / n ** length_penalty of its best running beam, at the present
  n, is no better than the worst of them: a heuristic where the penalty is positive.
`reference`: as microsoft/LoRA decodes for the paper's tables. The best W candidates of a step
  are considered; one that ends is finished, keeps its score, and leaves its place to others in
  the next step. No n-gram of the generated tokens alone comes twice; a banned token's
  probability goes to the others. The reference always runs `max_new_tokens` steps; here an
  input is done once no running beam could still win, which changes nothing: s only falls, and
  the largest possible n bounds the score.

In both, what runs at `max_new_tokens` is finished there. Of equal scores the one of the lower
beam, then of the lower token id, comes first.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from lora_jax.decoding.cached_model import CachedModel, grow_cache, make_batches, read_prompts

PyTree = Any
Scoring = Literal["transformers", "reference"]
NO_TOKEN = -1  # in the history, in front of a prompt: part of no n-gram


@dataclasses.dataclass(frozen=True)
class BeamConfig:
  """How to search; the defaults are the paper's for E2E (Table 11), but for `eos_ids`.

  Attributes:
    eos_ids: tokens that end a hypothesis.
    num_beams: W, at least 1.
    length_penalty: the power of the length that a score is divided by; larger favours longer.
    no_repeat_ngram_size: n-grams of this size come once only; 0 for no such rule.
    max_new_tokens: at most so many generated tokens, the end token included.
    pad_id: fills the output after a hypothesis.
    num_return: hypotheses returned for each input, at most W.
    scoring: whose rules; the module's text has them.
  """

  eos_ids: tuple[int, ...]
  num_beams: int = 10
  length_penalty: float = 0.9
  no_repeat_ngram_size: int = 4
  max_new_tokens: int = 64
  pad_id: int = 0
  num_return: int = 1
  scoring: Scoring = "transformers"

  def __post_init__(self):
    object.__setattr__(self, "eos_ids", tuple(int(token) for token in self.eos_ids))
    for name, least in (("num_beams", 1), ("no_repeat_ngram_size", 0), ("max_new_tokens", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
    if not 1 <= self.num_return <= self.num_beams:
      raise ValueError(f"num_return must be 1 to {self.num_beams} beams, got {self.num_return}")
    if self.scoring not in get_args(Scoring):
      raise ValueError(
        f"scoring must be one of {', '.join(get_args(Scoring))}, got {self.scoring!r}"
      )

  @property
  def num_candidates(self) -> int:
    """K, the continuations of an input that a step considers."""
    if self.scoring == "reference":
      return self.num_beams
    return max(2, 1 + len(self.eos_ids)) * self.num_beams


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


class Finished(NamedTuple):
  """The best finished hypotheses, best first; a score of -inf is an empty place."""

  tokens: Int[Array, "B W M"]
  lengths: Int[Array, "B W"]
  scores: Float[Array, "B W"]
  ended: Bool[Array, "B W"]


class Search(NamedTuple):
  """The state between two steps; `step` tokens are generated.

  Attributes:
    history: the prompt, NO_TOKEN in front, and the generated tokens.
    sums: of the running beams' log-probabilities, best first.
    seen: the slots that a beam descends from.
    open: whether an input may still improve.
  """

  step: Int[Array, ""]
  cache: PyTree
  history: Int[Array, "B W L"]
  sums: Float[Array, "B W"]
  seen: Bool[Array, "B W S"]
  open: Bool[Array, " B"]
  finished: Finished


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
  """Returns the steps at which the cache grows: slots not yet in use cost time in attention."""
  return [limit]


def grow(model: CachedModel, search: Search, num_slots: int) -> Search:
  """Returns the search with room for `num_slots` slots."""
  batch_size, _, used = search.seen.shape
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


def choose(config: BeamConfig, search: Search, logits: Float[Array, "B W V"], width: int) -> Search:
  """Takes one step: from the logits of the beams to the next beams and what has finished."""
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
    take_beams(history, order),
    running,
    take_beams(search.seen, take_beams(parents, order)),
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
    size: n; 0 leaves the logits as they are.
    search: its history is looked through from `start` on.
    logits: of the next tokens.
    start: the first place in the history that counts.
    width: T, places of the prompt; the next token comes to place T + step.
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
  new = Finished(
    jnp.where(places < length, generated, config.pad_id),
    jnp.broadcast_to(length, sums.shape),
    jnp.where(counts, sums / penalty, -jnp.inf),
    ended,
  )
  both = Finished(
    *(jnp.concatenate(pair, axis=1) for pair in zip(search.finished, new, strict=True))
  )
  _, order = jax.lax.top_k(both.scores, config.num_beams)
  return Finished(*(take_beams(part, order) for part in both))


def may_improve(
  config: BeamConfig, best_sum: Float[Array, " B"], finished: Finished, length: Int[Array, ""]
) -> Bool[Array, " B"]:
  """Tells for which inputs a running beam may still enter what is returned."""
  if config.scoring == "reference":
    final = config.max_new_tokens if config.length_penalty > 0 else length + 1
    to_beat = finished.scores[:, config.num_return - 1]
  else:
    final, to_beat = length, finished.scores[:, -1]
  return best_sum / jnp.asarray(final, jnp.float32) ** config.length_penalty > to_beat


def take_beams(
  array: Shaped[Array, "B W *rest"], beams: Int[Array, "B K"]
) -> Shaped[Array, "B K *rest"]:
  """Returns for each input the given beams of `array` (B, W, ...)."""
  beams = beams.reshape(*beams.shape, *(1,) * (array.ndim - 2))
  return jnp.take_along_axis(array, beams, axis=1)
