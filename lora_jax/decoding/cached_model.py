"""Defines the model interface of decoding, and batches prompts into few shapes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.arithmetic.rows import check_slots, map_adapters, row_axes, take_adapters
from lora_jax.fields import Count, read_value


@dataclasses.dataclass(frozen=True)
class CachedModel:
  """The interface of a language model for decoding: pure functions of parameters and a cache.

  `params` may be any tree: merged parameters, or base and adapter with an `extend` that calls
  `Adaptation.apply`. Each new `CachedModel` is compiled again, so keep one and reuse it.

  Attributes:
    extend: `(params, tokens (B, T), positions (B, T), cache, index, mask (B, T, S))` to
      `(hidden (B, T, D), cache)`: processes further tokens, whose keys and values it writes
      into the T slots from `index` on. Only the mask decides which slots a token sees.
    logits: `(params, hidden (..., D))` to logits (..., V).
    make_cache: `(batch_size, num_slots)` to an empty cache. Each array in it has one axis of the
      inputs and one of the slots, and a smaller cache is the front part of a larger one.
    max_positions: the longest sequence that the model accepts, tokens.
  """

  extend: Callable[..., Any]
  logits: Callable[..., Any]
  make_cache: Callable[[int, int], PyTree]
  max_positions: int


def from_linen(
  module: nn.Module, make_cache: Callable[[int, int], PyTree], max_positions: int
) -> CachedModel:
  """Returns a Linen module with the interface of decoding.

  Args:
    module: with the methods `extend` and `logits`, as `GPT2`.
    make_cache: as in `CachedModel`.
    max_positions: as in `CachedModel`.
  """

  def extend(params: PyTree, *args: Any) -> Any:
    return module.apply({"params": params}, *args, method="extend")

  def logits(params: PyTree, hidden: Array) -> Any:
    return module.apply({"params": params}, hidden, method="logits")

  return CachedModel(extend, logits, make_cache, max_positions)


def adapted(model: CachedModel, method: Callable[[Callable[..., Any]], Adaptation]) -> CachedModel:
  """Returns a model that decodes with an adapter, without merging it.

  It takes `{"base": params, "adapter": trainable}` as params. Methods that cannot be merged decode
  in this way, and others without a second copy of the base model.

  Args:
    model: the base model.
    method: adapts a function, as `functools.partial(lora_jax.prefix_layer, num_slots=16)`; slots
      are part of the prompts (`lora_jax.Slots.around`).
  """
  extend, logits = method(model.extend).apply, method(model.logits).apply

  def adapted_extend(params: PyTree, *args: Any) -> Any:
    return extend(params["base"], params["adapter"], *args, lora_key=None)

  def adapted_logits(params: PyTree, hidden: Array) -> Any:
    return logits(params["base"], params["adapter"], hidden, lora_key=None)

  return dataclasses.replace(model, extend=adapted_extend, logits=adapted_logits)


def adapted_by_row(
  model: CachedModel, method: Callable[[Callable[..., Any]], Adaptation]
) -> CachedModel:
  """Returns a model that decodes each row with the adapter of its own slot of a bank.

  It takes `{"base": params, "bank": bank}` as params, and `generate` and `beam_search` then take
  the `bank_slots` of the prompts. Another bank of the same shapes compiles nothing.

  Args:
    model: the base model.
    method: adapts a function, `functools.partial(lora_jax.lora, config=bank.config)`.
  """
  extend, logits = method(model.extend).apply, method(model.logits).apply
  single, double = (jax.eval_shape(partial(model.make_cache, size, 1)) for size in (1, 2))
  cache_axes = jax.tree.map(_differing_axis, single, double)

  def extend_rows(
    params: PyTree, tokens: Array, positions: Array, cache: PyTree, index: Any, mask: Array
  ) -> Any:
    def extend_row(adapter, tokens, positions, cache, mask):
      inputs = tokens[None], positions[None], cache, index, mask[None]
      hidden, cache = extend(params["base"], adapter, *inputs, lora_key=None)
      return hidden[0], cache

    # A row's axis of one input is added outside `vmap`, which would transpose a scanned cache.
    cache = jax.tree.map(lambda x, axis: jnp.expand_dims(x, axis + 1), cache, cache_axes)
    in_axes = row_axes(params["rows"]), 0, 0, cache_axes, 0
    mapped = map_adapters(extend_row, in_axes, (0, cache_axes))
    hidden, cache = mapped(params["rows"], tokens, positions, cache, mask)
    return hidden, jax.tree.map(lambda x, axis: jnp.squeeze(x, axis + 1), cache, cache_axes)

  def logits_of_rows(params: PyTree, hidden: Array) -> Any:
    def logits_of_row(adapter, hidden):
      return logits(params["base"], adapter, hidden, lora_key=None)

    return map_adapters(logits_of_row, (row_axes(params["rows"]), 0))(params["rows"], hidden)

  return dataclasses.replace(model, extend=extend_rows, logits=logits_of_rows)


def read_slots(
  params: PyTree, slots: Sequence[int] | None, num_prompts: int
) -> Int[np.ndarray, " N"] | None:
  """Returns the slot of each prompt, None without a bank.

  Raises:
    ValueError: if there are slots and no bank or a bank and no slots, not one slot for each prompt,
      or a slot that is not in the bank.
  """
  bank = params.get("bank") if isinstance(params, Mapping) else None
  if (bank is None) != (slots is None):
    raise ValueError(
      "bank_slots and a bank go together: bank_slots has one slot for each prompt, and params is "
      '{"base": params, "bank": lora_jax.bank(...)}; got '
      f"bank_slots={slots!r:.100} and {'no bank' if bank is None else 'a bank'}"
    )
  if bank is None:
    return None
  checked = np.asarray(check_slots(slots, bank.slots))
  if len(checked) != num_prompts:
    raise ValueError(
      f"bank_slots must have one slot for each of {num_prompts} prompts, got {len(checked)}"
    )
  return checked


def bank_slots_of(slots: Int[np.ndarray, " N"] | None, batch: "Batch") -> Int[Array, " B"] | None:
  """Returns the slots of a batch's rows; those of padding have slot 0."""
  if slots is None:
    return None
  padded = np.pad(slots[batch.rows], (0, len(batch.lengths) - len(batch.rows)))
  return jax.device_put(padded, batch.lengths.sharding)


def with_rows(params: PyTree, slots: Int[Array, " B"] | None) -> PyTree:
  """Returns params with the adapters of the rows in the place of the bank."""
  if slots is None:
    return params
  return {"base": params["base"], "rows": take_adapters(params["bank"].trainable, slots)}


class Batch(NamedTuple):
  """Prompts of one padded length.

  Attributes:
    rows: indices of the prompts, (n,), n <= B.
    tokens: (B, T), padded in front; rows of padding fill the batch.
    lengths: (B,), tokens of each prompt; 0 for a row of padding.
  """

  rows: Int[np.ndarray, " n"]
  tokens: Int[Array, "B T"]
  lengths: Int[Array, " B"]


def longest_prompt(model: CachedModel, max_new_tokens: int) -> int:
  """Returns the longest prompt after which a model can generate some tokens.

  Raises:
    ValueError: if there is no such prompt.
  """
  longest = model.max_positions - max_new_tokens + 1  # the last token is not read again
  if longest < 1:
    raise ValueError(
      f"max_new_tokens must be at most the model's {model.max_positions} positions, got "
      f"{max_new_tokens}"
    )
  return longest


def make_batches(
  prompts: Sequence[Sequence[int]],
  batch_size: int,
  length_multiple: int,
  max_length: int,
  mesh: Mesh | None = None,
) -> Iterator[Batch]:
  """Yields the prompts by length, the longest first, in batches of fixed shapes.

  Args:
    prompts: token ids of each input.
    batch_size: B; fewer prompts make one batch of their own size.
    length_multiple: prompts are padded to the next multiple of this, so that few programs are
      compiled; tokens.
    max_length: of a prompt, tokens.
    mesh: shards the rows over its axes `data` and `fsdp`, whose size must divide B.
  Raises:
    ValueError: if a prompt is empty, too long or not token ids, or the mesh does not divide the
      batch.
  """
  batch_size = read_value(Count, batch_size, "batch_size")
  length_multiple = read_value(Count, length_multiple, "length_multiple")
  for row, prompt in enumerate(prompts):
    ids = np.asarray(prompt)
    is_ids = ids.ndim == 1 and (ids.size == 0 or np.issubdtype(ids.dtype, np.integer))
    if not is_ids or (ids < 0).any() or (ids >= 2**31).any():
      raise ValueError(f"prompt {row} must be a sequence of token ids, got {repr(prompt)[:100]}")
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  for fault, bad in (("is empty", lengths == 0), (f"exceeds {max_length}", lengths > max_length)):
    if bad.any():
      row = int(np.flatnonzero(bad)[0])
      raise ValueError(
        f"prompt {row} has {lengths[row]} tokens, which {fault}; the prompt and the new tokens "
        "must fit the model's positions. Cut the prompt, or lower max_new_tokens"
      )
  place = _placement(mesh)
  shards = 1 if mesh is None else _num_shards(mesh)
  batch_size = min(batch_size, -(-len(prompts) // shards) * shards)
  if batch_size < 1 or batch_size % shards:
    raise ValueError(f"batch_size must be a positive multiple of {shards}, got {batch_size}")
  order = np.argsort(-lengths, kind="stable")
  for start in range(0, len(prompts), batch_size):
    rows = order[start : start + batch_size]
    longest = -(-int(lengths[rows[0]]) // length_multiple) * length_multiple
    tokens = np.zeros((batch_size, min(longest, max_length)), np.int32)
    for row, prompt in enumerate(rows):
      tokens[row, tokens.shape[1] - lengths[prompt] :] = prompts[prompt]
    padded = np.pad(lengths[rows], (0, batch_size - len(rows)))
    yield Batch(rows, place(tokens), place(padded))


def _num_shards(mesh: Mesh) -> int:
  return int(np.prod([mesh.shape[axis] for axis in _batch_axes(mesh)], dtype=int))


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
  return tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)


def _placement(mesh: Mesh | None) -> Callable[[np.ndarray], Array]:
  if mesh is None:
    return jnp.asarray
  sharding = NamedSharding(mesh, PartitionSpec(_batch_axes(mesh)))
  return lambda array: jax.device_put(array, sharding)


def read_prompts(
  model: CachedModel,
  params: PyTree,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B V"], PyTree, Bool[Array, "B T"]]:
  """Returns the logits after each prompt, the cache of T slots, and which of them are real."""
  batch_size, width = tokens.shape
  places = jnp.arange(width)[None]
  padding = (width - lengths)[:, None]
  real = places >= padding
  mask = real[:, None, :] & jnp.tril(jnp.ones((width, width), bool))[None]
  cache = model.make_cache(batch_size, width)
  positions = jnp.maximum(places - padding, 0)
  hidden, cache = model.extend(params, tokens, positions, cache, 0, mask)
  return model.logits(params, hidden[:, -1]).astype(jnp.float32), cache, real


def grow_cache(model: CachedModel, cache: PyTree, batch_size: int, num_slots: int) -> PyTree:
  """Returns a cache of `num_slots` slots whose first slots are those of a smaller cache."""
  larger = model.make_cache(batch_size, num_slots)
  return jax.tree.map(
    lambda target, source: jax.lax.dynamic_update_slice(target, source, (0,) * target.ndim),
    larger,
    cache,
  )


def take_slots(model: CachedModel, cache: PyTree, order: Int[Array, "B S"]) -> PyTree:
  """Returns the cache with the slots of each input in another order."""
  shapes = [jax.eval_shape(partial(model.make_cache, *sizes)) for sizes in ((1, 1), (2, 1), (1, 2))]

  def take(leaf: Array, single: Any, two_inputs: Any, two_slots: Any) -> Array:
    batch_axis, slot_axis = _differing_axis(single, two_inputs), _differing_axis(single, two_slots)
    other_axes = [axis for axis in range(leaf.ndim) if axis not in (batch_axis, slot_axis)]
    index = order if batch_axis < slot_axis else order.T
    return jnp.take_along_axis(leaf, jnp.expand_dims(index, other_axes), axis=slot_axis)

  return jax.tree.map(take, cache, *shapes)


def _differing_axis(single: Any, double: Any) -> int:
  axes = [axis for axis, size in enumerate(single.shape) if size != double.shape[axis]]
  if len(axes) != 1:
    raise ValueError(
      "each array of a cache needs one axis of the inputs and one of the slots, but make_cache "
      f"returns {single.shape} for one of each and {double.shape} for one more"
    )
  return axes[0]
