"""Prefix tuning: trained vectors in the places of special tokens (Hu et al. 2021, section 5.1).

    PreEmbed    embedding of slot i           = vectors[i]       (slots, D)
    PreLayer    input of layer l at slot i    = vectors[l, i]    (L, slots, D)

Slots are placeholder tokens before and after a prompt, which `lora_jax.Slots` puts there. PreEmbed
is prompt tuning (Lester et al. 2021, arXiv 2104.08691), and PreLayer the prefix tuning of Li and
Liang 2021 (arXiv 2101.00190) without their reparametrization: the paper counts L D (lp + li)
parameters for "the activations after every Transformer layer". We take those that a layer reads,
the embeddings and the outputs of all layers but the last. After the last one nothing reads a slot
but the head at the last infix slot, which has to depend on the prompt.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.parts import ADDED
from lora_jax.adapters.targets import array_leaves, select_arrays
from lora_jax.fields import Count, NonNegative, read_value
from lora_jax.marks import LAYER_INPUT, TOKEN_EMBEDDINGS, TOKENS
from lora_jax.quantization.leaf import is_quantized
from lora_jax.slots import FIRST_SLOT
from lora_jax.transform.marks import Mark, MarkedCall, count_layers, require_marks, trace_marks
from lora_jax.transform.tracing import is_array
from lora_jax.trees import as_patterns, leaves_with_path

TOKEN_TABLES = r"(.*/)?(wte|token_embedding)/embedding"
"""The tables of token embeddings of this project's models."""

PREFIX_EMBEDDING, PREFIX_LAYER = "prefix_embedding", "prefix_layer"


def prefix_embedding(
  fn: Callable[..., Any],
  num_slots: int,
  *,
  table: str = TOKEN_TABLES,
  std: float | None = None,
) -> Adaptation:
  """Returns prefix-embedding tuning of `fn(params, *args, **kwargs)` as an `Adaptation`.

  The trainable tree is `{"lora_added": {"prefix_embedding": (num_slots, D)}}`, float32. `fn` gets
  tokens among which are slots, as `Slots.around` or `with_slots` of `lora_jax.data` puts them, and
  has to mark its tokens and their embeddings; the zoo's models do.

  Vectors start as the embeddings of random tokens of the vocabulary, distinct ones if there are
  enough (Lester et al. 2021, section 3.2.1); with `std` as N(0, std^2).

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    num_slots: lp + li.
    table: a pattern for the path of the table of token embeddings (V, D), read by `init` only.
    std: of random vectors, or None.
  Raises:
    ValueError: by `init`, if `fn` lacks the marks, the slots of the tokens are not exactly
      `num_slots`, or the pattern does not match one table of rows of D; by `merge` always: the
      vectors are inputs, not weights.
  """
  read_value(Count, num_slots, "num_slots")
  read_value(NonNegative | None, std, "std")

  def start(key: Array, params: PyTree, call: MarkedCall) -> Float[Array, "slots D"]:
    (mark,) = _marks(call, TOKEN_EMBEDDINGS)
    if std is not None:
      return std * jax.random.normal(key, (num_slots, mark.shape[-1]), jnp.float32)
    rows = _table(params, table, mark.shape[-1])
    few = rows.shape[0] < num_slots
    chosen = jax.random.choice(key, rows.shape[0], (num_slots,), replace=few)
    return rows[chosen].astype(jnp.float32)

  return _prefix(fn, PREFIX_EMBEDDING, TOKEN_EMBEDDINGS, num_slots, start)


def prefix_layer(fn: Callable[..., Any], num_slots: int, *, std: float = 0.02) -> Adaptation:
  """Returns prefix-layer tuning of `fn(params, *args, **kwargs)` as an `Adaptation`.

  The trainable tree is `{"lora_added": {"prefix_layer": (L, num_slots, D)}}`, float32, whether
  layers are scanned or not. `fn` marks its tokens and the inputs of its layers; the slots are those
  of `prefix_embedding`. What a model computes at a slot in one layer reaches no other layer.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    num_slots: lp + li.
    std: vectors start as N(0, std^2).
  Raises:
    ValueError: as `prefix_embedding`.
  """
  read_value(Count, num_slots, "num_slots")
  read_value(NonNegative, std, "std")

  def start(key: Array, params: PyTree, call: MarkedCall) -> Float[Array, "layers slots D"]:
    del params
    marks = _marks(call, LAYER_INPUT)
    shape = count_layers(marks), num_slots, marks[0].shape[-1]
    return std * jax.random.normal(key, shape, jnp.float32)

  return _prefix(fn, PREFIX_LAYER, LAYER_INPUT, num_slots, start)


def _prefix(
  fn: Callable[..., Any], name: str, marked: str, num_slots: int, start: Callable[..., Array]
) -> Adaptation:
  """Returns the method that replaces the marked values at slots.

  Args:
    fn: the function to adapt.
    name: of the method, and of its array.
    marked: the name of the marks.
    num_slots: the number of slots.
    start: `start(key, params, call)` returns the initial array.
  """

  def init(key, params, *args, **kwargs):
    _check_slots((args, kwargs), num_slots)
    call = trace_marks(fn, (TOKENS, marked), params, args, kwargs)
    require_marks(call, (TOKENS, marked), f"lora_jax.{name}")
    return {ADDED: {name: start(key, params, call)}}

  def apply(params, trainable, *args, lora_key=None, scaling=None, dropout_rate=None, **kwargs):
    del lora_key, scaling, dropout_rate
    call = trace_marks(fn, (TOKENS, marked), params, args, kwargs)
    vectors = _vectors(trainable, name, num_slots, _marks(call, marked))
    if vectors:
      require_marks(call, (TOKENS,), f"lora_jax.{name}")
    slots: list[Array] = []

    def visit(mark: Mark, x: Array, rows: PyTree) -> Array:
      if mark.name == TOKENS:
        slots.append(x - FIRST_SLOT)
        return jnp.where(x < FIRST_SLOT, x, 0)
      return _replaced(x, rows, slots[-1])

    try:
      return call.evaluate(visit, {**dict.fromkeys(_marks(call, TOKENS), ()), **vectors})
    except jax.errors.UnexpectedTracerError as error:
      raise ValueError(
        f"{name} reads the slots where the function marks its tokens, and layers outside of that "
        "jit, checkpoint or loop cannot see them. Mark the tokens before it: "
        f"tokens = jax.ad_checkpoint.checkpoint_name(tokens, {TOKENS!r})"
      ) from error

  def merge(params, trainable):
    del params, trainable
    raise ValueError(
      f"{name} cannot be merged: its vectors are inputs at {num_slots} slots, not weights. Call "
      "apply; to decode, lora_jax.decoding.adapted(model, method)"
    )

  return Adaptation(init, apply, merge)


def _replaced(
  x: Float[Array, "B T D"], vectors: Float[Array, "slots D"], slots: Array
) -> Float[Array, "B T D"]:
  """Returns values with a vector at each slot; a slot that has none gives NaN.

  Args:
    x: of each token.
    vectors: of each slot.
    slots: (B, T) the number of the slot, negative for a token that is none.
  """
  rows = vectors.astype(x.dtype).at[jnp.maximum(slots, 0)].get(mode="fill", fill_value=jnp.nan)
  return jnp.where((slots >= 0)[..., None], rows, x)


def _marks(call: MarkedCall, name: str) -> list[Mark]:
  return [mark for mark in call.marks if mark.name == name]


def _vectors(
  trainable: PyTree, name: str, num_slots: int, marks: list[Mark]
) -> Mapping[Mark, Float[Array, "*layers slots D"]]:
  """Returns the trained vectors of each mark, those of a stack with its axis first.

  Raises:
    ValueError: if the trainable tree is of another method, number of slots or model.
  """
  leaves = dict(leaves_with_path(trainable))
  path = f"{ADDED}/{name}"
  if set(leaves) != {path}:
    raise ValueError(
      f"expected the trainable tree of {name}, with the leaf {path}, got "
      f"{', '.join(sorted(leaves)) or 'no leaf'}"
    )
  vectors = leaves[path]
  if not marks:  # a function of the head, for instance
    return {}
  shape = (num_slots, marks[0].shape[-1])
  if name == PREFIX_LAYER:
    shape = (count_layers(marks), *shape)
  if vectors.shape != shape or not jnp.issubdtype(vectors.dtype, jnp.floating):
    raise ValueError(
      f"{path} is {vectors.dtype} of shape {vectors.shape}, expected floats of shape {shape}"
    )
  if name == PREFIX_LAYER and not marks[0].layers:
    return {mark: vectors[mark.number] for mark in marks}
  same: dict[Mark, Any] = dict.fromkeys(marks, vectors)
  return same


def _table(params: PyTree, pattern: str, width: int) -> Float[Array, "V D"]:
  """Returns the table of token embeddings.

  Raises:
    ValueError: if the pattern does not match a single table of rows of `width`.
  """
  leaves = array_leaves(params)
  paths = select_arrays(as_patterns(pattern, "table"), params, leaves, "table")
  leaf: Any = leaves[paths[0]][1]
  if len(paths) > 1 or len(leaf.shape) != 2 or leaf.shape[1] != width:
    described = ", ".join(f"{path} {leaves[path][1].shape}" for path in paths)
    raise ValueError(
      f"table={pattern!r} must match one table of token embeddings (V, {width}), got {described}. "
      "Name its path, or give std"
    )
  return leaf.dequantize() if is_quantized(leaf) else jnp.asarray(leaf)


def _check_slots(inputs: PyTree, num_slots: int) -> None:
  """Raises ValueError unless the slots among known tokens are 0 to `num_slots - 1`."""
  leaves = [leaf for leaf in jax.tree.leaves(inputs) if is_array(leaf)]
  if any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in leaves):
    return
  ids = [np.ravel(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.integer)]
  slots = np.unique(np.concatenate(ids)) - FIRST_SLOT if ids else np.zeros(0, int)
  slots = slots[slots >= 0]
  if not np.array_equal(slots, np.arange(num_slots)):
    raise ValueError(
      f"expected the slots 0 to {num_slots - 1} among the tokens, got "
      f"{', '.join(map(str, slots)) or 'none'}. Put them there: "
      "lora_jax.Slots(num_prefix, num_infix).around(prompt)"
    )
