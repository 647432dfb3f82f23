"""QA-LoRA (Xu et al. 2023, arXiv 2309.14717, sec. 3.3 and algorithm 1). With x a row vector:

    h = x W + scaling * pool(x) A B          pool(x)[group] = the sum of x over the group

A, (in / group_size, rank), has one row for each group of consecutive inputs, so that A B is the
same for all inputs of a group. If a weight is quantized in blocks along its inputs, each with its
own minimum, w = d * code + m, the update is merged into the minima: see `merge_quantized`.

The paper's code averages over the group and multiplies by its size, which is this sum. PEFT 0.21
averages and multiplies by the number of groups: in / group_size**2 times the output here. A and B
are initialized as LoRA's, with the number of inputs as A's fan-in: x A varies as LoRA's does.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.axes import RANK
from lora_jax.fields import Count, read_value
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.lora import initial_pair

ARRAYS = {"lora_a": "batch groups rank", "lora_b": "batch rank out"}


def qa_lora_variant(group_size: int = 32) -> Variant:
  """Returns QA-LoRA with groups of `group_size` inputs: the block of a format, or whole blocks.

  Groups of a weight with several input axes (a kernel of heads, a convolution) divide the last.
  Embeddings have none: `init` refuses weights whose rows are looked up.

  Raises:
    ValueError: if `group_size` is not a positive integer.
  """
  size = read_value(Count, group_size, "group_size")
  return Variant(f"QA-LoRA in groups of {size}", ARRAYS, _Start(size), weight, sizes=_Sizes(size))


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """The number of groups of a weight; a value, so that configs are compared and pickled."""

  group_size: int

  def __call__(self, site: Site) -> Mapping[str, int]:
    return {"groups": num_groups(site, self.group_size)}


@dataclasses.dataclass(frozen=True)
class _Start:
  """The initial A and B, drawn by the config's `init`."""

  group_size: int

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    sizes = {"groups": num_groups(site, self.group_size)}
    return initial_pair(key, site, *(site.array_shape(words, **sizes) for words in ARRAYS.values()))


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * A B`, with each row of A repeated for the inputs of its group."""
  inputs = p.axes.inputs
  return w + scaling * (ungrouped(p.lora_a, inputs, [w.shape[dim] for dim in inputs]) @ p.lora_b)


def ungrouped(a: Factor, inputs: Sequence[int], sizes: Sequence[int]) -> Factor:
  """Repeats the rows of A for input axes of these sizes."""
  *batch, count, rank = a.array.shape
  rows = jnp.repeat(a.array, math.prod(sizes) // count, axis=-2)
  return Factor(rows.reshape(*batch, *sizes, rank), (*a.dims, *inputs, RANK), a.frozen)


def num_groups(site: Site, group_size: int) -> int:
  """Returns the groups of a weight's inputs.

  Raises:
    ValueError: if they do not divide the inputs, are fewer than the rank, or rows are looked up.
  """
  dim, shape = site.axes.inputs[-1], site.shape
  if site.is_lookup:
    raise ValueError(
      f"{site.path}: QA-LoRA groups the inputs of a matmul, and this weight's rows are looked up. "
      "Narrow target, or adapt it by LoRA: LoraRule(pattern, variant=lora_jax.LORA)"
    )
  if shape[dim] % group_size:
    raise ValueError(
      f"{site.path}: groups of {group_size} inputs must divide its input axis {dim}, of size "
      f"{shape[dim]} (shape {shape}). Choose another group_size, or narrow target"
    )
  count = site.num_inputs // group_size
  if site.rank > count:
    raise ValueError(
      f"{site.path}: rank {site.rank} is larger than its {count} groups of {group_size} inputs. "
      "Lower the rank or group_size, or give LoraRule(pattern, rank=...) for it"
    )
  return count


QA_LORA = qa_lora_variant()
"""Groups of 32, the block of Q4_1 and Q5_1."""


def qa_lora(
  fn: Callable[..., Any],
  config: LoraConfig,
  group_size: int = 32,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by QA-LoRA.

  It is `lora` with `variant=qa_lora_variant(group_size)` in the config; see there for the
  arguments, the further arguments of `apply` and the errors. Dropout is applied to the layer's
  input, before the sum over groups.

  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.ones((64, 6))}
  >>> adapted = qa_lora(fn, LoraConfig(rank=2, alpha=4.0, target="kernel"), group_size=16)
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 64)))
  >>> trainable["kernel"].lora_a.shape
  (4, 2)
  """
  return adapt_by(qa_lora_variant(group_size), fn, config, opaque)
