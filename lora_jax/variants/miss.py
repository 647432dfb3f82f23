"""MiSS (Kang and Yin 2024, arXiv 2409.15371), called Bone in its first versions. With x a row:

    h = x W + scaling * S(x) D          S(x)[r] = the sum of x[r], x[r + rank], x[r + 2 rank], ...

The shard D, (rank, out), is trained: all shards of rank consecutive inputs share it. It is a LoRA
whose A is fixed, 1 where i = r (mod rank) and else 0. D is initialized to 0, so that step 0 is the
base model; the config's `init` is not used. The last shard may be cut off.

    mini    D is (rank, mini) and repeated along the outputs
    bat     W + scaling * (D + W D) per block of rank inputs and rank outputs, with one D, (rank,
            rank), for each block of outputs: the update is formed where the weight is used, in both
            passes. LoRA dropout has no branch to act on, and is refused.

PEFT has no scaling: alpha = rank. Several input or output axes are taken as one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant, no_sizes
from lora_jax.axes import OUT1, RANK, RANK2
from lora_jax.fields import Count, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import OpaqueRule

ARRAYS = {"shard": "batch rank out"}
MINI = {"shard": "batch rank out2"}
BAT = {"shard": "batch out1 rank2 rank"}


@dataclasses.dataclass(frozen=True)
class _Zeros:
  """D = 0; a value, so that configs are compared and pickled."""

  words: str
  sizes: Callable[[Site], Mapping[str, int]]

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    del key
    return {"shard": jnp.zeros(site.array_shape(self.words, **self.sizes(site)))}


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * A D`, where A sums the inputs of each row of D."""
  return w + scaling * (_summed_inputs(w, p) @ p.shard)


def _summed_inputs(w: Factored, p: Any) -> Factor:
  """Returns A, 1 where the input is the rank's modulo rank."""
  rank, sizes = p.shard.size(RANK), [w.shape[d] for d in p.axes.inputs]
  rows = jnp.arange(math.prod(sizes)) % rank
  a = (rows[:, None] == jnp.arange(rank)[None]).astype(jnp.float32)
  return Factor(a.reshape(*sizes, rank), (*p.axes.inputs, RANK), frozen=True)


MISS = Variant("MiSS", ARRAYS, _Zeros(ARRAYS["shard"], no_sizes), weight)


# ---- mini --------------------------------------------------------------------------------------


def miss_mini_variant(mini: int) -> Variant:
  """Returns MiSS with a shard of `mini` outputs, which must divide the weight's.

  Raises:
    ValueError: if `mini` is not a positive integer.
  """
  sizes = _MiniSizes(read_value(Count, mini, "mini"))
  start = _Zeros(MINI["shard"], sizes)
  return Variant(f"MiSS with shards of {mini} outputs", MINI, start, mini_weight, sizes=sizes)


@dataclasses.dataclass(frozen=True)
class _MiniSizes:
  """The outputs of a shard."""

  mini: int

  def __call__(self, site: Site) -> Mapping[str, int]:
    _, num_outputs = site.axes.counts(site.shape)
    if num_outputs % self.mini:
      raise ValueError(
        f"{site.path}: shards of {self.mini} outputs must divide its {num_outputs} outputs (shape "
        f"{site.shape}). Choose another `mini`, or narrow target"
      )
    return {"out2": self.mini}


def mini_weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * A D`, with D repeated along the outputs."""
  shard, sizes = p.shard, [w.shape[d] for d in p.axes.outputs]
  *rest, mini = shard.array.shape
  repeated = jnp.concatenate([shard.array] * (math.prod(sizes) // mini), axis=-1)
  b = Factor(repeated.reshape(*rest, *sizes), (*shard.labels[:-1], *p.axes.outputs))
  return w + scaling * (_summed_inputs(w, p) @ b)


# ---- bat ---------------------------------------------------------------------------------------


def bat_sizes(site: Site) -> Mapping[str, int]:
  """Returns the number of blocks of outputs.

  Raises:
    ValueError: if rank does not divide the inputs and outputs.
  """
  counts, rank = site.axes.counts(site.shape), site.rank
  if any(count % rank for count in counts):
    raise ValueError(
      f"{site.path}: MiSS's bat needs a rank that divides the {counts[0]} inputs and {counts[1]} "
      f"outputs, got {rank}. Choose another rank, or variant=lora_jax.MISS for it"
    )
  return {"out1": counts[1] // rank, "rank2": rank}


def bat_weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * (D + W D)` per block."""
  inputs, outputs = (tuple(d - w.ndim for d in dims) for dims in (p.axes.inputs, p.axes.outputs))
  return w.formed(_Blocks(inputs, outputs), scaling, p.shard, dims=p.axes.batch)


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """The update, `D + W D`, of each block; dimensions are counted from the last one."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def __call__(self, w: Factor, shard: Factor) -> Factor:
    sides = tuple(w.labels[d] for d in (*self.inputs, *self.outputs))
    batch, rank = tuple(label for label in w.labels if label not in sides), shard.size(RANK)
    matrices = w.along((*batch, *sides))
    sizes = matrices.shape[: len(batch)]
    blocks = matrices.reshape(*sizes, -1, rank, shard.size(OUT1), rank)
    d = shard.along((*batch, OUT1, RANK2, RANK))
    update = jnp.einsum("...isop,...osj->...ijop", blocks, d)
    update += jnp.expand_dims(jnp.einsum("...opj->...jop", d), -4)
    return Factor(update.reshape(matrices.shape), (*batch, *sides))


MISS_BAT = Variant(
  "MiSS in bat mode", BAT, _Zeros(BAT["shard"], bat_sizes), bat_weight, sizes=bat_sizes
)


def miss(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by MiSS, as `lora` does with `variant=MISS` in the config.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`.

  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.ones((8, 6))}
  >>> adapted = miss(fn, LoraConfig(rank=2, alpha=2.0, target="kernel"))
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> trainable["kernel"].shard.shape
  (2, 6)
  """
  return adapt_by(MISS, fn, config, opaque)
