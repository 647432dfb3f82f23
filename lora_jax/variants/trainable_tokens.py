"""Trainable tokens: chosen rows of an embedding (PEFT's TRAINABLE_TOKENS; no paper).

    w'[token] = w[token] + delta[i] if token is the i-th of the chosen ones, else w[token]

delta, (tokens, out), is trained and initialized to 0, so that step 0 is the base model. A head that
is tied to the embedding sees the new rows, too. The chosen ids are stored with the adapter, frozen.
There is no rank and no scaling: alpha has no effect.

As a term, delta is multiplied by a matrix of ones and zeros, (vocabulary, tokens), that is made
from the ids where it is used. PEFT trains the new rows themselves, and copies the table to put them
in: with weight decay they shrink to 0, and here to the rows of the base model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.axes import GROUPS
from lora_jax.fields import CountOrZero, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import OpaqueRule

ARRAYS = {"token_ids": "groups", "token_delta": "batch groups out"}


def trainable_tokens_variant(tokens: Sequence[int]) -> Variant:
  """Returns the variant that trains the rows of these tokens.

  Args:
    tokens: their ids, each once.
  Raises:
    ValueError: if there is none, or one is given twice or is not an integer from 0.
  """
  ids = read_value(Sequence[CountOrZero], tokens, "tokens")
  if not ids or len(set(ids)) < len(ids):
    raise ValueError(f"tokens must be ids, each given once, got {list(ids)!r:.100}")
  return Variant(
    f"{len(ids)} trainable tokens",
    ARRAYS,
    _Start(tuple(ids)),
    weight,
    frozen=("token_ids",),
    sizes=_Sizes(len(ids)),
    has_dropout=False,
  )


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """The number of chosen tokens; a value, so that configs are compared and pickled."""

  count: int

  def __call__(self, site: Site) -> Mapping[str, int]:
    del site
    return {"groups": self.count}


@dataclasses.dataclass(frozen=True)
class _Start:
  """The ids, as floats, which have them exactly up to 2^24, and delta = 0."""

  tokens: tuple[int, ...]

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    del key
    if not site.is_lookup or len(site.axes.inputs) != 1:
      raise ValueError(
        f"{site.path}: trainable tokens are rows that are looked up by their ids, and the first "
        "use of this weight is another. Narrow target to the embedding; an untied head can be "
        "fully trained, LoraConfig(extra=...)"
      )
    if max(self.tokens) >= min(site.num_inputs, 2**24):
      raise ValueError(
        f"{site.path}: token {max(self.tokens)} is not among its {site.num_inputs} rows (and at "
        f"most {2**24}). Correct tokens"
      )
    delta = site.array_shape(ARRAYS["token_delta"], groups=len(self.tokens))
    return {"token_ids": jnp.asarray(self.tokens, jnp.float32), "token_delta": jnp.zeros(delta)}


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns W with delta added to the chosen rows."""
  del scaling
  ids, (rows,) = p.token_ids.array, p.axes.inputs
  if ids.dtype != jnp.float32:
    raise ValueError(f"token_ids must be float32, got {ids.dtype}, which does not have all ids")
  is_chosen = jnp.arange(w.shape[rows], dtype=jnp.float32)[:, None] == ids[None]
  return w + Factor(is_chosen.astype(jnp.int8), (rows, GROUPS), frozen=True) @ p.token_delta


def trainable_tokens(
  fn: Callable[..., Any],
  config: LoraConfig,
  tokens: Sequence[int],
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Trains the rows of some tokens in the embedding that the config targets.

  It is `lora` with `variant=trainable_tokens_variant(tokens)` in the config; in a `LoraRule` for
  the embedding, that variant trains tokens together with LoRA of other weights. The config's rank
  and alpha have no effect, and dropout is refused. For the arguments, the further arguments of
  `apply` and the errors, see `lora_jax.adapters.adapt.adapt`.

  >>> fn = lambda params, ids: params["embed"][ids]
  >>> params = {"embed": jnp.ones((10, 4))}
  >>> adapted = trainable_tokens(fn, LoraConfig(1, 1.0, target="embed"), tokens=[3, 7])
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.array([3, 4]))
  >>> trainable["embed"].token_delta.shape
  (2, 4)
  >>> trainable["embed"] = trainable["embed"].replace(token_delta=jnp.ones((2, 4)))
  >>> adapted.apply(params, trainable, jnp.array([3, 4]))[:, 0]
  Array([2., 1.], dtype=float32)
  """
  return adapt_by(trainable_tokens_variant(tokens), fn, config, opaque)
